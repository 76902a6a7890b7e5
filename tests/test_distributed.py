"""Processes on this machine that train and adapt together, against one process."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from grpocem_jax.utils import cluster
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import HEAD
from studies import communication
from tests.runs import ROOT, read_lines, thin_model


def free_port():
    with socket.socket() as sought:
        sought.bind(("127.0.0.1", 0))
        return sought.getsockname()[1]


def start(arguments, devices, **variables):
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **variables}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder, what two processes of two devices each and one of four find, and errors of 1."""
    folder, port = tmp_path_factory.mktemp("distributed"), free_port()
    shutil.copytree(thin_model(), folder / "model")
    module = ["-m", "tests.many_processes", folder, port]
    started = [start([*module, 2, index], 2) for index in (0, 1)] + [start([*module, 1, 0], 4)]
    ended = [process.communicate(timeout=900) for process in started]
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err
    *two, one = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    return folder, two, one, ended[1][1]


def test_two_processes_find_what_one_finds_to_rounding(both):
    _, two, one, _ = both
    for name in ("adapter", "likelihood", "reward"):
        # The same everywhere, bit for bit.
        assert two[0]["found"][name] == two[1]["found"][name]
        for site, values in one["found"][name].items():
            assert np.abs(values).max() > 1e-3
            np.testing.assert_allclose(two[0]["found"][name][site], values, rtol=0, atol=1e-6)


def test_two_processes_write_the_same_tokens_and_only_the_first_one_writes(both):
    folder, two, one, errors = both
    runs = [folder / name for name in ("run2-0", "run1-0")]
    texts = [[x["completion"] for x in read_lines(run / "completions.jsonl")] for run in runs]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3 * 16  # of the steps 1, 3 and 4
    assert [len(read_lines(run / "metrics.jsonl")) for run in runs] == [4, 4]
    assert not (folder / "run2-1").exists()
    assert two[0]["devices used"] == one["devices used"] == 4
    assert "step" not in errors
    assert two[1]["said"] == ""
    assert "device    2 processes x 2 x cpu" in two[0]["said"]
    assert "divided   4 prompts of a step: 2 in each process; process 0 writes" in two[0]["said"]


def test_one_that_samples_and_one_that_updates_are_one_process_one_step_behind(both):
    """To the same bits, as no row of a stage is divided."""
    folder, port = both[0], free_port()
    module = ["-m", "tests.many_processes", folder]
    started = [start([*module, port, 2, index, 1], 1) for index in (0, 1)]
    started.append(start([*module, port, 1, 0, 1], 1))
    ended = [process.communicate(timeout=300) for process in started]
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err
    *two, one = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    assert two[0]["found"] == two[1]["found"] == one["found"]
    runs = [folder / name for name in ("run2-apart-0", "run1-apart-0")]
    assert read_lines(runs[0] / "completions.jsonl") == read_lines(runs[1] / "completions.jsonl")
    assert not (folder / "run2-apart-1").exists()
    divided = "1 process updates, 1 completes the 4 prompts of the next step meanwhile"
    assert divided in two[0]["said"]
    # Each held-out prompt is completed four times, by one of them; the sampler draws all others.
    drawn = [each["done"]["prompts completed"] for each in two]
    assert drawn[1] - drawn[0] == 4 * 4
    # Adapters go to one, completions to the other: kilobytes.
    assert two[0]["traffic"]["bytes"] < 300_000


def test_each_process_does_its_share(both):
    _, two, one, _ = both
    for name in ("prompts completed", "completions judged"):
        shares = [each["done"][name] / one["done"][name] for each in two]
        assert max(shares) <= 0.55, name
        assert sum(shares) >= 1
    # One process has these in programs of their own. The first update of process 0 was in vain, as
    # memory ran out in the other one.
    assert [each["done"]["prompts updated"] for each in two] == [4 * 2 + 2, 4 * 2]
    assert [each["done"]["scored"] for each in two] == [2 * 4] * 2


def test_memory_that_runs_out_in_one_process_halves_the_micro_batch_of_both(both):
    _, two, one, _ = both
    assert [each["summary"]["micro_batch"] for each in (*two, one)] == [8, 8, 16]


def test_an_update_that_one_process_makes_not_finite_is_skipped_by_both(both):
    folder, two, one, _ = both
    assert [each["summary"]["skipped_updates"] for each in (*two, one)] == [1, 1, 1]
    for run in (folder / "run2-0", folder / "run1-0"):
        assert [line["skipped"] for line in read_lines(run / "metrics.jsonl")] == [0, 0, 0, 1]
        assert [line["step"] for line in read_lines(run / "nonfinite.jsonl")] == [4] * 4


def test_what_goes_from_one_to_the_other_is_kilobytes_and_recorded(both):
    folder, two, one, _ = both
    assert one["traffic"] == {"rounds": 0, "bytes": 0}
    assert two[0]["traffic"] == two[1]["traffic"]
    assert two[0]["traffic"]["bytes"] < 300_000
    lines = read_lines(folder / "run2-0" / "metrics.jsonl")
    first, second, *others = [line["received_bytes"] for line in lines]
    # As on paper, where texts are not written down; but for the agreement behind each step.
    trained = sum(map(len, one["found"]["adapter"].values()))
    paper = communication.cost(2, lambda x: communication.step(x, 8, trained, judges=1))
    assert abs(second - (paper.received - 2 * HEAD)) < 64
    assert second < first < 16_000  # memory ran out in between
    assert all(second <= each < 16_000 for each in others)  # short texts fit into the kilobyte
    assert "received_bytes" not in read_lines(folder / "run1-0" / "metrics.jsonl")[0]
    # What is counted is what the compiled programs exchange.
    assert two[0]["compiled"] == {"gather": 2 * 1024, "total": 4 * 1024}


# Where a process finds the others


@pytest.fixture
def nowhere(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "JOB_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_is_alone_unless_something_says_otherwise(nowhere):
    assert cluster.find() is None
    assert cluster.find(False) is None
    assert cluster.find(None, "host:1234", 1, 0) is None
    nowhere.setenv("SLURM_JOB_ID", "7")  # a batch script without srun
    nowhere.setenv("SLURM_NTASKS", "4")
    assert cluster.find() is None


def test_flags_and_variables_say_where_the_others_are(nowhere):
    assert cluster.find(None, "10.0.0.1:81", 4, 3) == cluster.Place("10.0.0.1:81", 4, 3)
    nowhere.setenv("JAX_COORDINATOR_ADDRESS", "head:82")
    nowhere.setenv("JAX_NUM_PROCESSES", "3")
    nowhere.setenv("JOB_COMPLETION_INDEX", "2")
    assert cluster.find() == cluster.Place("head:82", 3, 2)
    nowhere.setenv("JAX_PROCESS_ID", "1")
    assert cluster.find() == cluster.Place("head:82", 3, 1)
    assert cluster.find(None, None, 5, None) == cluster.Place("head:82", 5, 1)
    assert cluster.find(False) is None


def test_slurm_and_open_mpi_say_where_the_others_are(nowhere):
    task = {"JOB_ID": "8192", "STEP_NODELIST": "node[04-05]", "NTASKS": "2", "PROCID": "1"}
    with nowhere.context() as patch:
        for name, value in {**task, "LOCALID": "0"}.items():
            patch.setenv(f"SLURM_{name}", value)
        place = cluster.find()
    assert (place.count, place.index, place.devices) == (2, 1, [0])
    assert place.coordinator.startswith("node04:")
    world = {"SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    nowhere.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in world.items():
        nowhere.setenv(f"OMPI_COMM_WORLD_{name}", value)
    place = cluster.find()
    assert (place.count, place.index, place.devices) == (4, 3, [1])
    assert place.coordinator.startswith("10.96.0.1:")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, "h:1", 0, 0), "--num_processes=0: must be at least 1"),
        ((None, "h:1", 4, 4), "--process_id=4 does not fit --num_processes=4: the indices go from"),
        ((None, "h:1", 4, -1), "--process_id=-1 does not fit"),
        ((None, "h", 2, 0), "--coordinator_address='h': must be HOST:PORT"),
        ((None, "h:x", 2, 0), "must be HOST:PORT"),
        ((None, "h:70000", 2, 0), "must be HOST:PORT"),
        ((True, None, None, None), "--coordinator_address (or JAX_COORDINATOR_ADDRESS) and"),
        ((None, "h:1", None, 0), "--num_processes (or JAX_NUM_PROCESSES) is missing"),
        ((False, "h:1", None, None), "--coordinator_address is for several processes"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(given, said, nowhere):
    with pytest.raises(InputError) as error:
        cluster.find(*given)
    assert said in str(error.value)


def test_a_number_that_is_none_is_refused(nowhere):
    nowhere.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match=r"JAX_NUM_PROCESSES='two': must be a whole number"):
        cluster.find(True)


def test_a_coordinator_that_does_not_answer_is_said_in_time():
    place = cluster.Place(f"127.0.0.1:{free_port()}", 2, 1)
    with pytest.raises(InputError, match=r"process 0 could not be reached within 1 s .*refused"):
        cluster.join(place, wait_s=1)


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = cluster.Place(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)
        with pytest.raises(InputError, match="process 0 cannot listen at port"):
            cluster.join(place, wait_s=1)


def test_limits_out_of_range_are_refused():
    with pytest.raises(InputError, match="--wait_s=0: must be from 1"):
        cluster.join(None, wait_s=0)
    with pytest.raises(InputError, match="--dead_after_s=3: must be from 10"):
        cluster.join(None, dead_after_s=3)
