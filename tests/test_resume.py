"""A run that was cut off continues to the same bits; what must not continue is refused."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpocem_jax import checkpoints, grpo, metrics, rundir, training
from grpocem_jax.config import parse_config
from grpocem_jax.config_files import load_config
from grpocem_jax.errors import InputError
from tests.conftest import ROOT

STEPS = 6
SMALL = {
    "data.tasks": ("sentiment",),
    "data.max_samples": 32,
    "data.heldout_samples": 2,
    "generation.max_new_tokens": 4,
    "grpo.group_size": 4,
    "logging.interval": 2,
    "train.batch_size": 16,
    "train.checkpoint_every_steps": 2,
    "train.eval_samples": 1,
    "train.max_steps": STEPS,
    "train.warmup_steps": 1,
}


def settings(**changes):
    config = load_config("tiny")
    config.update_from_flattened_dict({**SMALL, **changes})
    return config


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_runs(one, other):
    """Whether two run directories hold the same numbers, times apart."""
    adapters = [load_file(x / "adapter" / "adapter_model.safetensors") for x in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, values in adapters[0].items():
        np.testing.assert_array_equal(values, adapters[1][name])
    records = [lines(x / "metrics.jsonl") for x in (one, other)]
    for record in (*records[0], *records[1]):
        del record["step_time"]
    assert records[0] == records[1]
    assert [record["step"] for record in records[0]] == list(range(1, STEPS + 1))
    completions = [(x / "completions.jsonl").read_bytes() for x in (one, other)]
    assert completions[0] == completions[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    training.train(settings(), workdir)
    return workdir


class Killed(BaseException):
    """Stands for the end of the process."""


def cut_off(workdir, monkeypatch, after):
    """A run that ends without notice inside a step, and inside a line of its log."""
    step = training.Run.step

    def die(self, state, number):
        if number == after:
            raise Killed
        return step(self, state, number)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", die)
        with pytest.raises(Killed):
            training.train(settings(), workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


def test_a_run_that_was_cut_off_ends_with_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    cut_off(workdir, monkeypatch, after=3)
    summary = training.train(settings(), workdir)
    same_runs(whole, workdir)
    assert summary["resumed_after_step"] == 2
    assert "resumed   after step 2" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    cut_off(workdir, monkeypatch, after=5)
    folder = workdir / "checkpoints" / "4"
    for file in (folder / "train").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    summary = training.train(settings(), workdir)
    assert f"passed over: {folder}" in capsys.readouterr().err
    assert (workdir / "checkpoints" / "damaged-4").is_dir()
    assert summary["resumed_after_step"] == 2
    same_runs(whole, workdir)


STATE = grpo.init_state({"a": jnp.arange(3.0)}, grpo.Hyperparameters())


@pytest.fixture
def stored(tmp_path):
    """Checkpoints of steps 1 and 2."""
    found = checkpoints.Checkpoints(tmp_path)
    for step in (1, 2):
        state = STATE._replace(step=jnp.int32(step), adapter={"a": jnp.full(3, float(step))})
        found.save(state, jax.random.key(7), {"step": step})
    found.close()
    return tmp_path / "checkpoints"


def test_what_is_restored_is_what_was_saved(stored, tmp_path):
    (state, key, position), damaged = checkpoints.Checkpoints(tmp_path).restore_latest(STATE)
    assert damaged == []
    assert position == {"step": 2}
    np.testing.assert_array_equal(state.adapter["a"], [2.0, 2.0, 2.0])
    assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(7)).tolist()


@pytest.mark.parametrize("damage", ["arrays of another", "position", "missing arrays", "no json"])
def test_a_checkpoint_that_is_not_what_was_written_is_passed_over(stored, tmp_path, damage):
    if damage == "arrays of another":
        shutil.rmtree(stored / "2" / "train")
        shutil.copytree(stored / "1" / "train", stored / "2" / "train")
    elif damage == "missing arrays":
        shutil.rmtree(stored / "2" / "train")
    else:
        path = stored / "2" / "position" / "metadata"
        path.write_text('{"step": 3' if damage == "no json" else '{"step": 1}')
    (state, _, position), damaged = checkpoints.Checkpoints(tmp_path).restore_latest(STATE)
    assert position == {"step": 1}
    np.testing.assert_array_equal(state.adapter["a"], [1.0, 1.0, 1.0])
    assert len(damaged) == 1
    assert str(stored / "2") in damaged[0]
    assert checkpoints.Checkpoints(tmp_path).steps() == [1]


def test_without_a_whole_checkpoint_there_is_nothing_to_restore(stored, tmp_path):
    for step in ("1", "2"):
        shutil.rmtree(stored / step / "train")
    found, damaged = checkpoints.Checkpoints(tmp_path).restore_latest(STATE)
    assert found is None
    assert len(damaged) == 2


def test_a_run_that_is_complete_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    summary = training.train(settings(), whole)
    assert summary == json.loads((whole / "summary.json").read_text())
    assert "is complete" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}


# What must not continue


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"train.learning_rate": 0.5}, ["train.learning_rate is 0.02 there and 0.5 here"]),
        ({"seed": 3}, ["seed is 0 there and 3 here"]),
        (
            {"train.max_steps": 7, "grpo.beta": 0.5},
            ["grpo.beta is 0.01 there and 0.5 here", "train.max_steps is 6 there and 7 here"],
        ),
        ({"data.tasks": ("qa",)}, ["data.tasks is ['sentiment'] there and ['qa'] here"]),
    ],
)
def test_other_settings_are_refused_with_the_list_of_differences(whole, changes, fragments):
    with pytest.raises(InputError) as error:
        training.train(settings(**changes), whole)
    for fragment in [f"--workdir={whole}", "another folder", *fragments]:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"cem.generations": 7}, {"logging.interval": 1}, {"train.keep_checkpoints": 1}]
)
def test_settings_that_do_not_alter_training_may_change(whole, changes):
    assert rundir.check_settings(whole, settings(**changes).to_dict())


@pytest.mark.parametrize("what", ["model", "data"])
def test_another_model_or_other_data_under_the_same_name_are_refused(whole, what):
    stored = json.loads((whole / "run.json").read_text())
    identity = {"model": stored["model"], "data": stored["data"], what: "another hash"}
    claim = rundir.claim(whole, settings().to_dict(), identity)
    with pytest.raises(InputError, match=f"started on another {what}"), claim:
        pass


def test_a_second_process_in_the_run_directory_is_refused(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(InputError, match="another process is running there"),
            rundir.claim(workdir, settings().to_dict(), {}),
        ):
            pass
    assert not (workdir / "config.json").exists()
    with rundir.claim(workdir, settings().to_dict(), {}):
        assert (workdir / "config.json").exists()


def test_a_log_that_is_shorter_than_its_checkpoint_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl: has 12 bytes, .* made at 24"):
        metrics.JsonLines(path, 24)


def test_a_log_continues_after_the_bytes_of_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    log = metrics.JsonLines(path, 12)
    assert log.size == 12
    log.write({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_the_last_checkpoints_are_kept(whole, tmp_path):
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"2", "4", "6"}
    stored = checkpoints.Checkpoints(tmp_path, keep=2)
    state = grpo.init_state({"a": jnp.zeros(3)}, grpo.Hyperparameters())
    for step in range(1, 5):
        stored.save(state._replace(step=jnp.int32(step)), jax.random.key(0), {})
    stored.close()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"3", "4"}


# Updates that are not finite


def test_a_run_of_updates_that_are_not_finite_stops_with_the_prompts(tmp_path, monkeypatch):
    broken = jnp.full((8, 4, 4), jnp.nan)
    monkeypatch.setattr(training.Run, "advantages", lambda *args: broken[: len(args[1])])
    with pytest.raises(InputError, match=r"not finite 3 times in a row, at last in step 3"):
        training.train(settings(**{"train.max_skipped_updates": 2}), tmp_path / "run")
    prompts = lines(tmp_path / "run" / "nonfinite.jsonl")
    assert {line["step"] for line in prompts} == {1, 2, 3}
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["loss"] for record in records] == [None, None]
    assert [record["skipped"] for record in records] == [1.0, 1.0]


# Processes


COMMAND = [
    *(sys.executable, "train.py", "--config", "tiny"),
    *(f"--config.{name}={value}" for name, value in SMALL.items()),
    "--workdir",
]


def start(workdir):
    return subprocess.Popen(
        [*COMMAND, str(workdir)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, workdir, step):
    """Waits until this process has done its steps up to one, or has ended."""
    path, began = workdir / "metrics.jsonl", time.time_ns()

    def done():
        written = path.exists() and path.stat().st_mtime_ns > began
        return written and path.read_bytes().count(b"\n") >= step

    while process.poll() is None and not done():
        time.sleep(0.01)


def test_killed_and_signalled_processes_continue_to_the_same_bits(whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_step(process, workdir, 1)
    time.sleep(random.Random(time.time_ns()).random() * 0.3)
    process.kill()
    process.communicate()
    process = start(workdir)
    wait_for_step(process, workdir, 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    if process.returncode:  # 0 where it had just ended
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "the same command continues the run" in err
        assert not (workdir / "summary.json").exists()
    process = start(workdir)
    _, err = process.communicate()
    assert process.returncode == 0, err
    same_runs(whole, workdir)


# Memory


@pytest.mark.parametrize(
    ("what", "changes", "advice"),
    [
        (
            "update",
            {"train.batch_size": 16, "train.accumulation_steps": 1},
            "lower train.batch_size=16 to 8 and raise train.accumulation_steps=1 to 2",
        ),
        ("update", {"train.batch_size": 4}, "lower generation.max_new_tokens=4 to 2"),
        ("rollouts", {"train.accumulation_steps": 2}, "lower train.accumulation_steps=2 to 1"),
        ("rollouts", {}, "lower generation.max_new_tokens=4 to 2"),
    ],
)
def test_what_to_lower_is_said_where_memory_runs_out(what, changes, advice):
    run = object.__new__(training.Run)
    run.config = parse_config(settings(**changes))
    with pytest.raises(InputError) as error, run.memory(what):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    assert f"out of device memory in a step's {what}: {advice}" in str(error.value)


def test_other_errors_of_the_device_pass_through():
    run = object.__new__(training.Run)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), run.memory("update"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_device_that_is_not_there_is_said_in_one_sentence(tmp_path):
    result = subprocess.run(
        [*COMMAND, str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "error: JAX_PLATFORMS='cuda': JAX finds no such device" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
