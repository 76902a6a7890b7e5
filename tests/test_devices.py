"""Several devices: what they compute together is what one computes, each a part of it."""

import json
import os
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.fixture(scope="module")
def found():
    """What `two_devices.py` found with two devices, which the CPU is made to show."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_devices"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_rollouts_are_those_of_one_device(found):
    assert found["rollouts"]["same tokens"]
    assert found["rollouts"]["logps"] < 1e-4


@pytest.mark.parametrize("micro_batches", ["1", "2"])
def test_an_update_is_that_of_one_device_and_half_the_work_for_each(found, micro_batches):
    update = found["update"][micro_batches]
    assert update["moved"] > 1e-3
    assert update["difference"] < 1e-3 * update["moved"]
    # All of it on both would be 1.
    assert 0.4 < update["work"] < 0.65


@pytest.mark.parametrize("chunk", ["0", "3"])
def test_a_search_is_that_of_one_device(found, chunk):
    """Ten candidates, all at once or in chunks of 3, which are three chunks of 4 on two devices."""
    search = found["search"][chunk]
    assert search["moved"] > 1e-2
    assert search["difference"] < 1e-3 * search["moved"]


def test_a_generation_is_half_the_work_for_each_device(found):
    assert 0.4 < found["generation"] < 0.65


def test_a_gradient_search_is_that_of_one_device(found):
    assert found["gradient"]["difference"] < 1e-3 * found["gradient"]["moved"]


def test_a_run_is_that_of_one_device_and_says_how_many_it_used(found):
    run = found["run"]
    assert run["devices_used"] == [1, 2]
    assert run["same completions"]
    assert run["difference"] < 1e-3 * run["moved"]
    assert run["screen"] == "device    2 x cpu (cpu), float32"


def test_a_run_continues_on_another_number_of_devices(found):
    assert found["continued"]["resumed_after_step"] == 1
    assert found["continued"]["difference"] < 1e-3 * found["run"]["moved"]


def test_as_many_devices_work_as_share_the_prompts_evenly_and_that_is_said(found):
    assert found["sharing"] == [1, 2, 1, 2]  # of 1, 2, 3 and 4 prompts
    assert found["one of two"] == "device    1 of 2 x cpu (cpu), float32"
