"""Several devices: what they compute together is what one computes, each a part of it."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT


def of_devices(count, *arguments):
    """What `two_devices.py` finds with so many devices, which the CPU is made to show."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_devices", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return of_devices(2)


@pytest.fixture(scope="module")
def shared():
    """Two times four devices, of which four hold the weights together."""
    return of_devices(8, "4")


def test_rollouts_are_those_of_one_device(found):
    assert found["rollouts"]["same tokens"]
    assert found["rollouts"]["logps"] < 1e-4


def test_an_update_is_that_of_one_device_and_half_the_work_for_each(found):
    """In two micro-batches; the one of divided weights, below, is in one."""
    update = found["update"]
    assert update["moved"] > 1e-3
    assert update["difference"] < 1e-3 * update["moved"]
    # All of it on both would be 1.
    assert 0.4 < update["work"] < 0.65


@pytest.mark.parametrize("chunk", ["0", "3"])
def test_a_search_is_that_of_one_device(found, chunk):
    """Ten candidates, on two devices all at once or in chunks of 3, which become chunks of 4."""
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


# Weights divided among devices


def test_four_devices_hold_a_quarter_of_the_weights_each(shared):
    assert 0.25 <= shared["weights"] < 0.27  # vectors lie whole on each
    assert shared["sharing"] == [4, 8, 4, 8]


def test_with_divided_weights_rollouts_update_and_search_are_those_of_one_device(shared):
    assert shared["rollouts"]["same tokens"]
    assert shared["rollouts"]["logps"] < 1e-4
    for part in ("update", "search"):
        assert shared[part]["moved"] > 1e-3
        assert shared[part]["difference"] < 1e-3 * shared[part]["moved"]
    # Of eight devices each does an eighth, and not much more.
    assert 0.1 < shared["update"]["work"] < 0.2
    assert 0.1 < shared["generation"] < 0.2


def test_a_run_with_divided_weights_is_that_of_one_device(shared, found):
    run, alone = shared["run"], found["run"]
    assert run["devices_used"] == 8
    assert run["screen"] == "device    8 x cpu (cpu), float32, weights in 4 parts"
    assert run["completions"] == alone["completions"]
    for name, values in alone["adapter"].items():
        np.testing.assert_allclose(run["adapter"][name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "shards", "spec"),
    [
        ((64, 192), 4, (None, "weights")),
        ((64, 190), 4, ("weights",)),  # of the axes that four divides, the last
        ((63, 190), 4, ()),
        ((64,), 4, ()),
        ((3, 8, 6), 2, (None, None, "weights")),
    ],
)
def test_matrices_are_divided_along_their_outputs_and_vectors_not_at_all(shape, shards, spec):
    assert devices.weights_spec(shape, shards) == PartitionSpec(*spec)


def test_parts_that_do_not_divide_the_devices_are_refused():
    said = (
        r"model\.weight_shards=3 does not divide the number of devices of this process, 1; give 1"
    )
    with pytest.raises(InputError, match=said):
        devices.sharing(8, weight_shards=3)
    with pytest.raises(InputError, match="4; give 1 or 2 or 4"):
        devices.make_mesh(jax.devices() * 4, weight_shards=3)
