"""A run that was cut off continues to the same bits; what must not continue is refused."""

import errno
import fcntl
import importlib.util
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

from grpocem_jax import adaptation, grpo, rollouts
from grpocem_jax.config import parse_config
from grpocem_jax.rollouts import policy
from grpocem_jax.runs import checkpoints, metrics, rundir
from grpocem_jax.training import evaluation
from grpocem_jax.training import loop as training
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.data import load_data
from grpocem_jax.training.run import LastStep
from grpocem_jax.training.update import micro_batch
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from tests.runs import OUT_OF_MEMORY, ROOT, TRAINING, read_lines, thin_model, training_config

STEPS = TRAINING["train.max_steps"]
pytestmark = pytest.mark.usefixtures("one_policy")


def same_runs(one, other):
    """Whether two run directories hold the same numbers, times apart."""
    adapters = [load_file(x / "adapter" / "adapter_model.safetensors") for x in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, values in adapters[0].items():
        np.testing.assert_array_equal(values, adapters[1][name])
    records = [read_lines(x / "metrics.jsonl") for x in (one, other)]
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
    training.train(training_config(), workdir)
    return workdir


class Killed(BaseException):
    """Stands for the end of the process."""


def cut_off(workdir, monkeypatch, after, **changes):
    """A run that ends without notice inside a step, and inside a line of its log."""
    step = training.Run.step

    def die(self, state, number):
        if number == after:
            raise Killed
        return step(self, state, number)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", die)
        patch.setattr(LastStep, "rescue", lambda self: None)
        with pytest.raises(Killed):
            training.train(training_config(**changes), workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


def test_a_run_that_was_cut_off_ends_with_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    cut_off(workdir, monkeypatch, after=3)
    summary = training.train(training_config(), workdir)
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
    summary = training.train(training_config(), workdir)
    assert f"passed over: {folder}" in capsys.readouterr().err
    assert (workdir / "checkpoints" / "damaged-4").is_dir()
    assert summary["resumed_after_step"] == 2
    same_runs(whole, workdir)


STATE = grpo.init_state({"a": jnp.arange(3.0)}, grpo.adamw())


@pytest.fixture
def stored(tmp_path):
    """Checkpoints of steps 1 and 2."""
    found = checkpoints.Checkpoints(tmp_path)
    for step in (1, 2):
        state = STATE._replace(step=jnp.int32(step), offsets={"a": jnp.full(3, float(step))})
        found.save(state, jax.random.key(7), {"step": step})
    found.close()
    return tmp_path / "checkpoints"


def test_what_is_restored_is_what_was_saved(stored, tmp_path):
    (state, key, position), damaged = checkpoints.Checkpoints(tmp_path).restore_latest(STATE)
    assert damaged == []
    assert position == {"step": 2}
    np.testing.assert_array_equal(state.offsets["a"], [2.0, 2.0, 2.0])
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
    np.testing.assert_array_equal(state.offsets["a"], [1.0, 1.0, 1.0])
    assert len(damaged) == 1
    assert str(stored / "2") in damaged[0]
    assert checkpoints.Checkpoints(tmp_path).steps() == [1]


def test_arrays_that_are_cut_off_are_said_once(tmp_path, monkeypatch):
    offsets = {str(i): jnp.zeros(300) for i in range(40)}
    state = grpo.init_state(offsets, grpo.adamw())
    found = checkpoints.Checkpoints(tmp_path)
    found.save(state, jax.random.key(7), {"step": 0})
    found.close()
    for path in (tmp_path / "checkpoints" / "0" / "train" / "d").iterdir():
        os.truncate(path, 100)
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    stored = checkpoints.Checkpoints(tmp_path)
    for _ in range(8):  # which reads are abandoned is chance
        with pytest.raises(InputError, match="cannot be read"):
            stored.restore(state, 0)
    time.sleep(0.2)
    assert said == []


def test_without_a_whole_checkpoint_there_is_nothing_to_restore(stored, tmp_path):
    for step in ("1", "2"):
        shutil.rmtree(stored / step / "train")
    found, damaged = checkpoints.Checkpoints(tmp_path).restore_latest(STATE)
    assert found is None
    assert len(damaged) == 2


def test_a_run_that_is_complete_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    summary = training.train(training_config(), whole)
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
        ({"data.tasks": ("qa",)}, ["data.tasks is ['general'] there and ['qa'] here"]),
    ],
)
def test_other_settings_are_refused_with_the_list_of_differences(whole, changes, fragments):
    with pytest.raises(InputError) as error:
        training.train(training_config(**changes), whole)
    for fragment in [f"--workdir={whole}", "another folder", *fragments]:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"search.generations": 7}, {"logging.interval": 1}, {"train.keep_checkpoints": 1}]
)
def test_settings_that_do_not_alter_training_may_change(whole, changes):
    assert rundir.check_settings(whole, training_config(**changes).to_dict())


@pytest.mark.parametrize("what", ["model", "data"])
def test_another_model_or_other_data_under_the_same_name_are_refused(whole, what):
    stored = json.loads((whole / "run.json").read_text())
    identity = {"model": stored["model"], "data": stored["data"], what: "another hash"}
    claim = rundir.claim(whole, training_config().to_dict(), identity)
    with pytest.raises(InputError, match=f"started on another {what}"), claim:
        pass


def test_a_complete_run_is_refused_on_other_data_and_without_its_identity(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    stored = json.loads((workdir / "run.json").read_text())
    (workdir / "run.json").write_text(json.dumps({**stored, "data": "another hash"}))
    with pytest.raises(InputError, match="started on another data"):
        training.train(training_config(), workdir)
    (workdir / "run.json").unlink()
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        training.train(training_config(), workdir)


def test_the_page_of_a_complete_run_that_lacks_it_is_drawn(whole, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    page = workdir / "report" / "index.html"
    drawn = []

    def draw(folder):
        drawn.append(folder)
        page.parent.mkdir()
        page.touch()
        return page

    monkeypatch.setattr(training.report, "write", draw)
    for _ in range(2):
        training.train(training_config(), workdir)
        assert f"its page is {page}" in capsys.readouterr().out
    assert drawn == [workdir]


def test_a_run_whose_adapter_is_gone_is_finished_again(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "adapter")
    assert training.train(training_config(), workdir)["resumed_after_step"] == STEPS
    same_runs(whole, workdir)


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter", "checkpoints"])
def test_files_of_a_run_without_its_settings_are_not_written_over(name, whole, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    copy = shutil.copytree if (whole / name).is_dir() else shutil.copyfile
    copy(whole / name, workdir / name)
    with pytest.raises(InputError, match=rf"holds {name} but no config\.json"):
        training.train(training_config(), workdir)
    assert [path.name for path in workdir.iterdir()] == [name]


def test_checkpoints_of_other_settings_than_config_json_are_refused(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    cut_off(workdir, monkeypatch, after=3)
    stored = json.loads((workdir / "config.json").read_text())
    # With which the arrays have other shapes.
    stored["adapter"]["sites"] = ["mlp.c_fc"]
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="checkpoints are of other settings"):
        training.train(training_config(**{"adapter.sites": ("mlp.c_fc",)}), workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]


def test_a_second_process_in_the_run_directory_is_refused(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(InputError, match="another process is running there"),
            rundir.claim(workdir, training_config().to_dict(), {}),
        ):
            pass
    assert not (workdir / "config.json").exists()
    with rundir.claim(workdir, training_config().to_dict(), {}):
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
    state = grpo.init_state({"a": jnp.zeros(3)}, grpo.adamw())
    # The best one after each step, and what is left of four.
    for folder, best, left in (
        ("none", [None] * 4, {"3", "4"}),
        ("first", [1, 1, 1, 1], {"1", "3", "4"}),
        ("second", [1, 2, 2, 2], {"2", "3", "4"}),
        ("last", [1, 1, 1, 4], {"3", "4"}),
    ):
        stored = checkpoints.Checkpoints(tmp_path / folder, keep=2)
        for step, number in enumerate(best, start=1):
            position = {"best": number and {"step": number, "eval_reward": 0.5}}
            stored.save(state._replace(step=jnp.int32(step)), jax.random.key(0), position)
        stored.close()
        assert {p.name for p in (tmp_path / folder / "checkpoints").iterdir()} == left


def test_checkpoints_come_every_few_epochs_and_at_the_last_step(tmp_path):
    changes = {
        "data.max_samples": 8,  # two steps an epoch
        "train.checkpoint_every_steps": 0,
        "train.epochs": 3,
        "train.keep_checkpoints": 0,
        "train.save_interval": 2,
    }
    training.train(training_config(**changes), tmp_path / "run")
    found = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {4, 6}  # 2 as well, if every epoch had one


# The best checkpoint

JUDGED = {
    "data.validation_samples": 2,
    "train.checkpoint_every_steps": 0,
    "train.evaluate_every_steps": 2,
    "train.keep_checkpoints": 1,
}


def test_comparing_checkpoints_changes_nothing_that_is_trained(whole, tmp_path):
    workdir = tmp_path / "run"
    summary = training.train(training_config(**JUDGED), workdir)
    records = read_lines(workdir / "metrics.jsonl")
    found = {record["step"]: record.pop("eval_reward", None) for record in records}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    same_runs(whole, workdir)
    rewards = {step: reward for step, reward in found.items() if reward is not None}
    assert list(rewards) == [2, 4, 6]
    best = max(rewards.values())
    # Of equals the first.
    step = next(step for step, reward in rewards.items() if reward == best)
    assert summary["adapter"] == "last"
    assert summary["best_adapter"] == {"step": step, "eval_reward": best}
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {str(step), "6"}


def test_the_best_adapter_is_that_of_its_checkpoint_and_resuming_judges_none_again(
    tmp_path, monkeypatch
):
    rewards, workdir = iter([0.25, 0.75, 0.5]), tmp_path / "run"
    monkeypatch.setattr(evaluation, "mean_reward", lambda *args: next(rewards))
    cut_off(workdir, monkeypatch, after=5, **JUDGED)
    summary = training.train(training_config(**JUDGED), workdir)
    assert next(rewards, None) is None
    judged = [record.get("eval_reward") for record in read_lines(workdir / "metrics.jsonl")]
    assert judged == [None, 0.25, None, 0.75, None, 0.5]
    assert summary["best_adapter"] == {"step": 4, "eval_reward": 0.75}
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"4", "6"}
    run = adaptation.load_run(workdir, adapter=workdir / "best_adapter")
    template = grpo.init_state(run.policy.zero, make_algorithm(run.config).optimizer)
    stored = checkpoints.Checkpoints(workdir)
    for name, values in stored.restore(template, 4)[0].offsets.items():
        np.testing.assert_array_equal(run.offsets[name], values)
    stored.close()
    last = adaptation.load_run(workdir).offsets
    assert any(np.any(last[name] != run.offsets[name]) for name in last)
    assert "after step 4 of 6" in (workdir / "best_adapter" / "README.md").read_text()


def test_prompts_are_trained_on_held_out_or_for_validation_and_never_two_of_them():
    config = parse_config(training_config(**JUDGED))
    loaded = policy.load_policy(config)
    data = load_data(config, loaded)
    parts = [
        {x.example.prompt for x in part} for part in (data.train, data.heldout, data.validation)
    ]
    assert [len(part) for part in parts] == [32, 2, 2]
    assert len(set.union(*parts)) == 36
    without = load_data(parse_config(training_config()), loaded)
    assert [x.example for x in without.heldout] == [x.example for x in data.heldout]
    assert without.validation == []


def test_too_few_rows_to_compare_checkpoints_are_an_error(tmp_path):
    # The held-out split has 120 rows.
    changes = JUDGED | {"data.tasks": ("sentiment",), "data.heldout_samples": 120}
    with pytest.raises(InputError, match=r"data.heldout_samples=120: .* sentiment has no other"):
        training.train(training_config(**changes), tmp_path / "run")


def test_a_held_out_split_without_an_interval_is_refused_before_training(tmp_path):
    for split, count in (("train", 40), ("test", 1)):
        rows = [{"text": f"The {split} soup was good {i}", "label": i % 2} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.tasks": ("sentiment",),
        "data.sentiment.source": str(tmp_path),
        "data.sentiment.label_names": ("negative", "positive"),
    }
    with pytest.raises(InputError, match=r"data.sentiment: .* gives 1 prompt, .* at least 2"):
        training.train(training_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_best_checkpoint_that_is_damaged_is_named(stored, tmp_path, capsys):
    run = object.__new__(training.Run)
    run.workdir, run.template, run.best = tmp_path, STATE, {"step": 2, "eval_reward": 0.5}
    np.testing.assert_array_equal(run.best_adapter()["a"], [2.0, 2.0, 2.0])
    (stored / "2" / "position" / "metadata").write_text("{}")
    assert run.best_adapter() is None
    assert f"no best adapter: {stored / '2'}" in capsys.readouterr().err


# Updates that are not finite


def break_advantages(monkeypatch):
    """From now on, runs have advantages that are not a number."""
    make = training.make_algorithm

    def broken(rewards, step_rewards, tokens, mask):
        return jnp.full(mask.shape, jnp.nan)

    monkeypatch.setattr(
        training, "make_algorithm", lambda config: make(config)._replace(advantages=broken)
    )


def test_a_run_of_updates_that_are_not_finite_stops_with_the_prompts(tmp_path, monkeypatch):
    break_advantages(monkeypatch)
    with pytest.raises(InputError, match=r"not finite 3 times in a row, at last in step 3"):
        training.train(training_config(**{"train.max_skipped_updates": 2}), tmp_path / "run")
    prompts = read_lines(tmp_path / "run" / "nonfinite.jsonl")
    assert {line["step"] for line in prompts} == {1, 2, 3}
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["loss"] for record in records] == [None] * 3
    assert [record["skipped"] for record in records] == [1.0] * 3


def test_prompts_of_skipped_updates_are_not_repeated(tmp_path, monkeypatch):
    break_advantages(monkeypatch)
    changes = {"train.max_skipped_updates": 9}
    cut_off(tmp_path / "run", monkeypatch, after=3, **changes)
    training.train(training_config(**changes), tmp_path / "run")
    prompts = read_lines(tmp_path / "run" / "nonfinite.jsonl")
    assert [line["step"] for line in prompts] == [step for step in range(1, 7) for _ in range(4)]


# Nobody reads what is printed


@pytest.fixture
def unread(monkeypatch):
    """A standard error that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        yield
        monkeypatch.undo()


@pytest.mark.usefixtures("unread")
def test_a_run_goes_on_unseen(whole, tmp_path):
    training.train(training_config(), tmp_path / "run")
    same_runs(whole, tmp_path / "run")


@pytest.mark.usefixtures("unread")
def test_a_signal_is_heard_where_what_it_prints_is_not():
    with rundir.Signals() as signals:
        signals.at_once = False
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


# Processes


COMMAND = [
    *(sys.executable, "train.py", "--config", "tiny"),
    *(f"--config.{name}={value}" for name, value in TRAINING.items()),
    f"--config.model.source={thin_model()}",
    "--workdir",
]


def test_a_killed_process_continues_to_the_same_bits(whole, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, str(workdir)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    first = workdir / "checkpoints" / "2"
    while process.poll() is None and not first.exists():
        time.sleep(0.01)
    time.sleep(random.Random(time.time_ns()).random() * 0.3)
    process.kill()
    process.communicate()
    assert first.exists()
    last = max(int(p.name) for p in first.parent.iterdir() if p.name.isdigit())
    finished = (workdir / "summary.json").exists()
    # A child that fails ends with another status.
    assert process.returncode in ((0, -signal.SIGKILL) if finished else (-signal.SIGKILL,))
    resumed = training.train(training_config(), workdir)["resumed_after_step"]
    assert resumed == (0 if finished else last)
    same_runs(whole, workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_and_a_checkpoint(
    number, whole, tmp_path, monkeypatch, capsys
):
    step, workdir = training.Run.step, tmp_path / "run"

    def interrupted(self, state, done):
        if done == 2:
            os.kill(os.getpid(), number)
        return step(self, state, done)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", interrupted)
        with pytest.raises(rundir.Interrupted) as error:
            training.train(training_config(), workdir)
    assert error.value.code == 128 + number
    err = capsys.readouterr().err
    assert f"{number.name}: the step under way and a checkpoint are finished first" in err
    assert "stopped after step 3 of 6; the same command continues the run" in err
    assert not (workdir / "summary.json").exists()
    # Step 3 has a checkpoint, though `checkpoint_every_steps` is 2.
    assert training.train(training_config(), workdir)["resumed_after_step"] == 3
    same_runs(whole, workdir)


def test_a_second_signal_leaves_the_step_out_and_a_third_ends_the_process_at_once(monkeypatch):
    def end(status):
        raise Killed(status)

    monkeypatch.setattr(rundir.os, "_exit", end)
    with rundir.Signals() as signals:
        signals.at_once = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(rundir.Interrupted) as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.value.code == 128 + signal.SIGINT
        assert signals.received == signal.SIGTERM
        with pytest.raises(Killed, match=str(128 + signal.SIGINT)):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_during_a_reward_saves_the_steps_before(
    whole, tmp_path, monkeypatch, capsys
):
    score, workdir, calls = rollouts.score, tmp_path / "run", []

    def waits(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return score(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "score", waits)
        with pytest.raises(rundir.Interrupted):
            training.train(training_config(), workdir)
    assert "a second signal leaves that step out" in capsys.readouterr().err
    assert training.train(training_config(), workdir)["resumed_after_step"] == 3
    same_runs(whole, workdir)


# Whatever ends a run


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("rollouts.score", InputError("The reward function judge raised ConnectionError.")),
        ("rollouts.complete", RuntimeError("the device is gone")),
        ("rollouts.score", KeyboardInterrupt()),
        ("steps.prepare", MemoryError()),
    ],
)
def test_whatever_ends_a_run_its_last_step_is_saved_first(
    where, error, whole, tmp_path, monkeypatch, capsys
):
    module, name = where.split(".")
    module = {"rollouts": rollouts, "steps": training.steps}[module]
    workdir, calls = tmp_path / "run", []
    original = getattr(module, name)

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(type(error)) as raised:
            training.train(training_config(), workdir)
    assert raised.value is error
    # Steps 1 to 3 are done; `checkpoint_every_steps` has saved the second only.
    assert "saved after step 3 of 6; the same command continues" in capsys.readouterr().err
    assert training.train(training_config(), workdir)["resumed_after_step"] == 3
    same_runs(whole, workdir)


def test_a_log_on_a_full_disk_costs_the_step_under_way_only(whole, tmp_path, monkeypatch):
    write, workdir = metrics.JsonLines.write, tmp_path / "run"

    def full(self, record):
        if record.get("step") == 4:
            full_disk()
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.JsonLines, "write", full)
        with pytest.raises(InputError, match=r"No space left on device.*same command continues"):
            training.train(training_config(), workdir)
    assert training.train(training_config(), workdir)["resumed_after_step"] == 3
    same_runs(whole, workdir)


def test_a_checkpoint_that_fails_too_does_not_hide_what_ended_the_run(
    tmp_path, monkeypatch, capsys
):
    def fails(*args):
        raise InputError("The reward function judge raised ConnectionError.")

    step = training.Run.step
    monkeypatch.setattr(
        training.Run, "step", lambda self, state, n: fails() if n == 1 else step(self, state, n)
    )
    monkeypatch.setattr(training.checkpoints.Checkpoints, "save", full_disk)
    with pytest.raises(InputError, match="judge raised ConnectionError"):
        training.train(training_config(), tmp_path / "run")
    assert "step 1 could not be saved (OSError" in capsys.readouterr().err


# A finished run that goes on


@pytest.mark.parametrize("length", [{"train.max_steps": 4}, {"train.max_steps": 1}])
def test_a_finished_run_goes_on_to_the_bits_of_one_that_had_all_steps_at_once(
    length, whole, tmp_path, capsys
):
    workdir, before = tmp_path / "run", length["train.max_steps"]
    training.train(training_config(**length), workdir)
    assert "is complete" not in capsys.readouterr().out
    summary = training.train(training_config(), workdir)
    assert (summary["resumed_after_step"], summary["steps"]) == (before, STEPS)
    assert summary["continued"] == []
    same_runs(whole, workdir)
    assert json.loads((workdir / "config.json").read_text())["train"]["max_steps"] == STEPS
    capsys.readouterr()
    training.train(training_config(), workdir)
    assert "is complete" in capsys.readouterr().out


def test_more_epochs_go_on_too_and_fewer_steps_than_were_done_are_refused(tmp_path):
    # 32 prompts in steps of 4 are 8 steps an epoch.
    workdir, length = tmp_path / "run", {"train.max_steps": 0, "data.max_samples": 8}
    training.train(training_config(**length), workdir)
    summary = training.train(training_config(**length, **{"train.epochs": 2}), workdir)
    assert (summary["resumed_after_step"], summary["steps"]) == (2, 4)
    stored = (workdir / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"has done 4 steps, but train.max_steps=0 .* give 2"):
        training.train(training_config(**length), workdir)
    assert (workdir / "config.json").read_bytes() == stored


def test_what_differs_in_a_run_that_goes_on_is_said(tmp_path, capsys):
    changes = {
        "generation.final_temperature": 0.5,
        "train.evaluate_every_steps": 2,
        "train.final_lr_scale": 0.5,
    }
    workdir = tmp_path / "run"
    training.train(training_config(**changes, **{"train.max_steps": 1}), workdir)
    capsys.readouterr()
    summary = training.train(training_config(**changes, **{"train.max_steps": 3}), workdir)
    first, rates, second = summary["continued"]
    assert "learning rates of steps 1 to 1 were those of a run of 1 steps, not of 3" in rates
    # One step of warmup, then half of the way down to 0.5 and all of it.
    last = [line["learning_rate"] for line in read_lines(workdir / "metrics.jsonl")]
    peak = training_config().train.learning_rate
    assert last[-2:] == pytest.approx([0.75 * peak, 0.5 * peak])
    assert "temperatures of steps 1 to 1 were those of a run of 1 steps, not of 3" in first
    assert "step 1 was judged" in second
    assert f"differs   {first}" in capsys.readouterr().out


def test_a_finished_run_without_its_checkpoints_is_not_started_over(tmp_path):
    workdir = tmp_path / "run"
    training.train(training_config(**{"train.max_steps": 1}), workdir)
    offsets = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(InputError, match=r"ended after 1 steps, but its checkpoint .* not there"):
        training.train(training_config(), workdir)
    assert (workdir / "adapter" / "adapter_model.safetensors").read_bytes() == offsets


def test_of_many_other_settings_the_first_five_are_listed(tmp_path):
    stored = {f"setting_{n}": "x" * 500 for n in range(9)}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError) as error:
        rundir.check_settings(tmp_path, dict.fromkeys(stored, "y"))
    assert "setting_4 is 'xxx" in str(error.value)
    assert "setting_5" not in str(error.value)
    assert "; and 4 more)" in str(error.value)
    assert len(str(error.value)) < 1000


# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_trained(
    number, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir.Path, "mkdir", refuse)
    workdir = tmp_path / "run"
    with (
        pytest.raises(InputError, match=f"--workdir={workdir}: cannot be written.*give another"),
        rundir.claim(workdir, training_config().to_dict(), {}),
    ):
        pass


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"):
        training.train(training_config(), tmp_path / "file" / "run")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["log", "adapter"])
def test_a_disk_that_is_full_is_said_and_the_run_continues_after(
    what, whole, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        if what == "log":
            # Every line written to this device fails as on a full disk.
            workdir.mkdir()
            for name in ("config.json", "run.json"):
                shutil.copyfile(whole / name, workdir / name)
            (workdir / "metrics.jsonl").symlink_to("/dev/full")
        else:
            patch.setattr(files, "save_file", full_disk)
        with pytest.raises(InputError) as error:
            training.train(training_config(), workdir)
    for part in (f"--workdir={workdir}", "No space left on device", "same command continues"):
        assert part in str(error.value)
    assert not (workdir / "summary.json").exists()
    assert not list(workdir.rglob("*.partial"))
    if what == "log":
        (workdir / "metrics.jsonl").unlink()
    training.train(training_config(), workdir)
    same_runs(whole, workdir)


# Memory


def no_memory(*args):
    raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"train.batch_size": 16, "train.accumulation_steps": 1},
            "lower train.batch_size=16 to 8 and raise train.accumulation_steps=1 to 2",
        ),
        ({"train.batch_size": 16}, "continue with train.fit_memory=True"),
        # 24 completions in groups of 4: 12 divide them, and half is no more.
        ({"train.batch_size": 24}, "lower train.batch_size=24 to 12"),
        # A single group cannot be divided, asked or not.
        ({"train.batch_size": 4}, "lower generation.max_new_tokens=4 to 2"),
        ({"train.batch_size": 4, "train.fit_memory": True}, "generation.max_new_tokens=4 to 2"),
    ],
)
def test_what_to_lower_is_said_where_an_update_runs_out_of_memory(changes, advice):
    config = parse_config(training_config(**changes))
    with pytest.raises(InputError) as error:
        micro_batch(config, config.train.batch_size).run(no_memory)
    assert "out of device memory in a step's update: " in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"train.accumulation_steps": 2}, "lower train.accumulation_steps=2 to 1"),
        ({}, "lower generation.max_new_tokens=4 to 2"),
    ],
)
def test_what_to_lower_is_said_where_rollouts_run_out_of_memory(
    changes, advice, tmp_path, monkeypatch
):
    def complete(*args, **options):
        no_memory()

    monkeypatch.setattr(rollouts, "complete", complete)
    with pytest.raises(InputError, match=f"out of device memory in a step's rollouts: {advice}"):
        training.train(training_config(**changes), tmp_path / "run")


def test_where_memory_runs_out_a_smaller_micro_batch_gives_the_result_up_to_rounding(
    whole, tmp_path, monkeypatch, capsys
):
    update, sizes, workdir = training.stages.update_program, [], tmp_path / "run"

    def short(*args, micro_batch, **options):
        sizes.append(micro_batch)
        if micro_batch > 8:
            no_memory()
        return update(*args, micro_batch=micro_batch, **options)

    monkeypatch.setattr(training.stages, "update_program", short)
    with pytest.raises(InputError, match=r"continue with train.fit_memory=True"):
        training.train(training_config(), workdir)
    asked = {"train.fit_memory": True}
    cut_off(workdir, monkeypatch, after=3, **asked)
    assert sizes == [16, 16, 8, 8, 8]
    assert "is lowered from 16 to 8" in capsys.readouterr().err
    summary = training.train(training_config(**asked), workdir)
    # The checkpoint says which size fits.
    assert sizes[5:] == [8] * 4
    assert summary["micro_batch"] == 8
    adapters = [load_file(x / "adapter" / "adapter_model.safetensors") for x in (whole, workdir)]
    for name, values in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], values, atol=1e-4)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS='cuda'"),
        ({"JAX_PLATFORM_NAME": "gpu"}, "JAX_PLATFORM_NAME='gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_said_in_one_sentence(variables, said, tmp_path):
    inherited = {x: y for x, y in os.environ.items() if not x.startswith("JAX_PLATFORM")}
    result = subprocess.run(
        [*COMMAND, str(tmp_path / "run")],
        cwd=ROOT,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert f"error: {said}: JAX finds no such device" in result.stderr
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        assert "for CPUs only: its CUDA plugin is not installed" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
