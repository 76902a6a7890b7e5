"""Sweeps: many runs in one program are what each is by itself."""

import dataclasses
import errno
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

import grpocem_jax as gj
from grpocem_jax import tasks
from grpocem_jax.runs import checkpoints, metrics, rundir
from grpocem_jax.tasks.base import Reward
from grpocem_jax.tasks.rewards import text_reward
from grpocem_jax.training import loop as training
from grpocem_jax.training import sweep
from grpocem_jax.utils.errors import InputError
from tests.runs import TRAINING, read_lines, thin_model, training_config

pytestmark = pytest.mark.usefixtures("one_policy")
GRID = {"seed": [0, 1], "train.learning_rate": [0.01, 0.03]}
SHORT = {
    "train.max_steps": 3,
    "data.heldout_samples": 3,
    "train.eval_batch_size": 3,  # so that as many are judged at once of many runs as of one
    "grpo.beta": 0.05,
    # Whose change is not proportional to the learning rate.
    "train.optimizer": "extrapolated",
    "train.optimizer_options": {"every": 2, "ahead": 1},
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep.sweep(training_config(**SHORT), GRID, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The last run of the sweep, by itself."""
    folder = tmp_path_factory.mktemp("alone")
    changes = {**SHORT, "seed": 1, "train.learning_rate": 0.03}
    return folder, training.train(training_config(**changes), folder)


def difference(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def same_sweeps(one, other, names):
    """Whether the runs of two sweeps hold the same numbers, times apart."""
    for name in names:
        runs = (one / name, other / name)
        assert difference(*(gj.load_run(run).offsets for run in runs)) == 0
        records = [read_lines(run / "metrics.jsonl") for run in runs]
        for record in (*records[0], *records[1]):
            del record["step_time"]
        assert records[0] == records[1]
        completions = [(run / "completions.jsonl").read_bytes() for run in runs]
        assert completions[0] == completions[1]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_run_of_a_sweep_is_what_it_is_by_itself(swept, alone):
    (folder, summaries), (single, summary) = swept, alone
    assert list(summaries) == [
        f"seed={seed},learning_rate={rate:g}" for seed in (0, 1) for rate in (0.01, 0.03)
    ]
    name = "seed=1,learning_rate=0.03"
    one, two = gj.load_run(single), gj.load_run(folder / name)
    largest = max(float(np.abs(x).max()) for x in one.offsets.values())
    assert largest > 0.02
    assert difference(one.offsets, two.offsets) < 1e-5
    for kind in ("heldout", "heldout_greedy"):
        for column in ("before", "after"):
            expected = summary[kind]["overall"][column]
            assert summaries[name][kind]["overall"][column] == pytest.approx(expected, abs=1e-4)
    for own, other in zip(
        read_lines(single / "metrics.jsonl"), read_lines(folder / name / "metrics.jsonl"),
        strict=True,
    ):  # fmt: skip
        assert own.keys() == other.keys()
        for key in own.keys() - {"step_time"}:
            assert other[key] == pytest.approx(own[key], rel=1e-3, abs=1e-5), key
    texts = [
        [line["completion"] for line in read_lines(where / "completions.jsonl")]
        for where in (single, folder / name)
    ]
    assert texts[0] == texts[1]


def test_the_table_has_a_line_for_each_run(swept):
    _, summaries = swept
    head, *lines = sweep.table(summaries).splitlines()
    assert head.split() == ["held-out", "reward,", "sampled", "greedy"]
    for line, (name, summary) in zip(lines, summaries.items(), strict=True):
        assert line.startswith(f"{name} ")
        for kind in ("heldout", "heldout_greedy"):
            gain = summary[kind]["overall"]
            assert f"{gain['after']:6.3f}  {gain['gain']:+.3f} [" in line


def test_the_table_says_which_run_has_no_held_out_reward(swept):
    _, summaries = swept
    first = next(iter(summaries))
    abstained = {**summaries[first], "heldout": {}, "skipped_updates": 2}
    line, *others = sweep.table({**summaries, first: abstained}).splitlines()[1:]
    after = summaries[first]["heldout_greedy"]["overall"]["after"]
    assert line.split("  ", 1)[1].startswith("no held-out reward")
    assert f"{after:6.3f}" in line
    assert line.endswith("2 updates skipped as not finite")
    assert others == sweep.table(summaries).splitlines()[2:]


def test_the_command_ends_with_the_table_and_a_page(run_command, tmp_path):
    changes = {**TRAINING, **SHORT, "model.source": thin_model(), "train.max_steps": 1}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    given = " ".join(f"{name}={','.join(map(str, values))}" for name, values in GRID.items())
    status, out, err = run_command(
        "train", "--config=tiny", f"--workdir={tmp_path}", f"--sweep={given}", *flags
    )
    assert status == 0, err
    *_, head, one, two, three, four, page = out.splitlines()
    assert head.split() == ["held-out", "reward,", "sampled", "greedy"]
    assert [line.split()[0] for line in (one, two, three, four)] == [
        f"seed={seed},learning_rate={rate:g}" for seed in (0, 1) for rate in (0.01, 0.03)
    ]
    assert page == f"page      {tmp_path / 'compare.html'}"
    assert "held-out" in (tmp_path / "compare.html").read_text()


def test_runs_of_a_sweep_differ(swept):
    folder, summaries = swept
    offsets = [gj.load_run(folder / name).offsets for name in summaries]
    for i in range(4):
        for j in range(i):
            assert difference(offsets[i], offsets[j]) > 1e-3


def test_a_complete_sweep_is_not_run_again(swept, monkeypatch, capsys):
    folder, summaries = swept
    monkeypatch.setattr(sweep, "load_policy", None)
    again = sweep.sweep(training_config(**SHORT), GRID, folder)
    assert again == json.loads(json.dumps(summaries))
    assert f"the sweep in {folder} is complete" in capsys.readouterr().out


def test_an_interrupted_sweep_goes_on_to_the_same_bits(swept, tmp_path, monkeypatch):
    folder, summaries = swept
    step = sweep._Course.step

    def interrupted(self, states, number):
        if number == 1:
            self.signals.received = 15
        return step(self, states, number)

    with monkeypatch.context() as patch:
        patch.setattr(sweep._Course, "step", interrupted)
        with pytest.raises(rundir.Interrupted):
            sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    assert checkpoints.last_step(tmp_path) == 2
    compiled = sweep._update._cache_size()
    found = sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    assert sweep._update._cache_size() == compiled
    for name in summaries:
        assert found[name]["resumed_after_step"] == 2
    same_sweeps(folder, tmp_path, summaries)


def test_a_reward_function_that_raises_costs_the_step_under_way_only(
    swept, tmp_path, monkeypatch, capsys
):
    (folder, summaries), calls = swept, []

    @functools.wraps(text_reward)
    def judge(**columns):
        calls.append(1)
        if len(calls) == 6:  # of the second step, for the second run
            raise ConnectionError("the judge is gone")
        return text_reward(**columns)

    general = dataclasses.replace(tasks.TASKS["general"], rewards=(Reward(judge),))
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "TASKS", {**tasks.TASKS, "general": general})
        with pytest.raises(InputError, match=r"text_reward raised .*the judge is gone"):
            sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    said = "saved after step 1 of 3; the same command continues the sweep from there"
    assert said in capsys.readouterr().err
    found = sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    assert [one["resumed_after_step"] for one in found.values()] == [1] * 4
    same_sweeps(folder, tmp_path, summaries)


def test_a_log_on_a_full_disk_costs_the_step_under_way_of_all_runs_only(
    swept, tmp_path, monkeypatch
):
    (folder, summaries), seconds, write = swept, [], metrics.JsonLines.write

    def full(self, record):
        if record["step"] == 2:
            seconds.append(record)
        if len(seconds) == 2:  # that of the first run is written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.JsonLines, "write", full)
        with pytest.raises(InputError, match=r"No space left on device.* continues the sweep"):
            sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    found = sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    assert [one["resumed_after_step"] for one in found.values()] == [1] * 4
    same_sweeps(folder, tmp_path, summaries)


def test_a_complete_sweep_goes_on_to_the_bits_of_one_that_had_all_steps_at_once(swept, tmp_path):
    folder, summaries = swept
    sweep.sweep(training_config(**{**SHORT, "train.max_steps": 2}), GRID, tmp_path)
    for name in summaries:  # the second step is shown because it is the last
        lines = read_lines(tmp_path / name / "completions.jsonl")
        assert {line["step"] for line in lines} == {1, 2}
    found = sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    for name in summaries:
        assert (found[name]["resumed_after_step"], found[name]["steps"]) == (2, 3)
        assert found[name]["continued"] == []
    same_sweeps(folder, tmp_path, summaries)


def test_what_differs_in_a_sweep_that_goes_on_is_said(tmp_path, capsys):
    changes = {**SHORT, "generation.final_temperature": 0.5}
    for length in (1, 2):
        config = training_config(**{**changes, "train.max_steps": length})
        found = sweep.sweep(config, GRID, tmp_path)
    said = "the temperatures of steps 1 to 1 were those of a run of 1 steps, not of 2"
    assert [one["continued"] for one in found.values()] == [[said]] * 4
    assert f"differs   {said}" in capsys.readouterr().out


def test_fewer_steps_than_a_sweep_has_done_are_refused(swept, tmp_path):
    folder = shutil.copytree(swept[0], tmp_path / "sweep")
    fewer = training_config(**{**SHORT, "train.max_steps": 2})
    for _ in ("complete", "interrupted"):
        before = contents(folder)
        with pytest.raises(InputError, match=r"has done 3 steps, but train.max_steps=2 .* give 2"):
            sweep.sweep(fewer, GRID, folder)
        assert contents(folder) == before
        for path in folder.glob("*/summary.json"):
            path.unlink()


def test_a_complete_sweep_without_its_checkpoints_is_not_started_over(swept, tmp_path):
    folder = shutil.copytree(swept[0], tmp_path / "sweep")
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    with pytest.raises(InputError, match=r"ended after 3 steps, but its checkpoint .* not there"):
        sweep.sweep(training_config(**{**SHORT, "train.max_steps": 4}), GRID, folder)
    assert contents(folder) == before


def test_tasks_and_random_starts_differ_too(tmp_path):
    changes = {
        **SHORT,
        "train.max_steps": 1,
        "train.warmup_steps": 0,
        "adapter.type": "lora",
        "adapter.options": {"rank": 1},
    }
    grid = {"seed": [0, 1], "data.tasks": [("general",), ("sentiment", "general")]}
    found = sweep.sweep(training_config(**changes), grid, tmp_path)
    assert [list(one["heldout"]) for one in found.values()] == [
        ["general", "overall"], ["sentiment", "general", "overall"],
    ] * 2  # fmt: skip
    starts = [gj.load_run(tmp_path / name).offsets for name in list(found)[::2]]
    assert difference(starts[0], starts[1]) > 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "makes 1 runs; give 2 to 32"),
        ("seed=0", "makes 1 runs; give 2 to 32"),
        ("seed=" + ",".join(map(str, range(33))), "makes 33 runs"),
        ("seed", "'seed' is not one of seed, train.learning_rate, data.tasks"),
        ("grpo.beta=0,1", "'grpo.beta=0,1' is not one of"),
        ("seed=0,1 seed=2", "'seed=2' is not one of .* each once"),
        ("seed=0,a", "'seed=0,a' has a value that is no number"),
        ("seed=0,0", "'seed=0,0' has a value twice"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_named(text, said):
    with pytest.raises(InputError, match=f"^--sweep={text!r}: .*{said}"):
        sweep.parse(text)


def test_runs_of_long_seeds_and_near_rates_have_names_of_their_own():
    grid = {"seed": [20240101, 20240102], "train.learning_rate": [0.0100000001, 0.01, 1e-5]}
    named = sweep._settings(training_config(), grid)
    assert len(named) == 6
    assert "seed=20240102,learning_rate=1e-05" in named


def test_what_runs_differ_in_is_read():
    text = "seed=0,1  train.learning_rate=1e-2 data.tasks=qa,sentiment+general"
    assert sweep.parse(text) == {
        "seed": [0, 1],
        "train.learning_rate": [0.01],
        "data.tasks": [("qa",), ("sentiment", "general")],
    }


@pytest.mark.parametrize(
    ("changes", "grid", "said"),
    [
        ({"train.evaluate_every_steps": 1}, GRID, "train.evaluate_every_steps=1 is for single"),
        ({"model.weight_shards": 2}, GRID, "model.weight_shards=2 is for single runs; set it to 1"),
        ({"logging.report_to": ("tensorboard",)}, GRID, r"logging.report_to=.* set it to \(\)"),
        ({"grpo.dynamic_sampling": 9}, GRID, "a step takes 36 training prompts, and a run has 32"),
        ({"adapter.type": "tinylora"}, GRID, "adapter.type='tinylora' has other frozen arrays"),
        ({"train.learning_rate": -1.0}, {"seed": [0, 1]}, "train.learning_rate=-1.0"),
        (
            {"train.max_steps": 0},
            {"data.tasks": [("general",), ("general", "sentiment")]},
            "its runs have 8, 16 steps",
        ),
    ],
)
def test_a_sweep_that_cannot_be_run_is_named(changes, grid, said, tmp_path):
    with pytest.raises(InputError, match=said):
        sweep.sweep(training_config(**{**SHORT, **changes}), grid, tmp_path)


def test_a_folder_of_a_sweep_of_fewer_runs_is_refused_and_left_as_it_is(swept, tmp_path):
    folder = shutil.copytree(swept[0], tmp_path / "sweep")
    for path in folder.glob("*/summary.json"):
        path.unlink()  # as one that was interrupted
    before = contents(folder)
    with pytest.raises(InputError, match="holds the checkpoints of another sweep; give another"):
        sweep.sweep(training_config(**SHORT), {**GRID, "seed": [0, 1, 2]}, folder)
    assert contents(folder) == before


def test_two_sweeps_in_one_folder_are_refused_whatever_their_runs(tmp_path):
    with rundir.lock(tmp_path), pytest.raises(InputError, match="another process is running there"):
        sweep.sweep(training_config(**SHORT), GRID, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_folder_of_a_single_run_is_refused_and_left_as_it_is(alone, tmp_path):
    folder = shutil.copytree(alone[0], tmp_path / "run")
    before = contents(folder)
    with pytest.raises(InputError, match="holds a single run; give another folder"):
        sweep.sweep(training_config(**SHORT), GRID, folder)
    assert contents(folder) == before


def test_a_folder_of_another_sweep_is_refused(swept):
    folder, _ = swept
    with pytest.raises(InputError, match="holds a run with other settings"):
        sweep.sweep(training_config(**SHORT, **{"grpo.clip": 0.3}), GRID, folder)
