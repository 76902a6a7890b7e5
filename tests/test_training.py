"""Whole runs: the built-in default through the command, and real text through a real tokenizer."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpocem_jax import adaptation, grpo, rollouts
from grpocem_jax.config import load_config, parse_config
from grpocem_jax.models import sampling
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.runs import checkpoints, metrics, rundir
from grpocem_jax.training import loop as training
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.data import load_data
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT, thin_model, training_config

TASKS = ["qa", "sentiment", "summarization", "classification", "general"]
SMALL = {
    "train.max_steps": 3,
    "train.warmup_steps": 1,
    "train.checkpoint_every_steps": 2,
    "train.batch_size": 32,
    "train.accumulation_steps": 2,
    "train.eval_batch_size": 10,
    "train.eval_samples": 2,
    "data.heldout_samples": 4,
    "data.max_samples": 40,
    "generation.max_new_tokens": 8,
    "logging.interval": 2,
}


def get_config(name, **changes):
    config = load_config(name)
    config.update_from_flattened_dict({**SMALL, **changes})
    return config


def run(config, workdir):
    return training.train(config, workdir)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """One run of the real command."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    result = subprocess.run(
        [sys.executable, "train.py", "--config", "configs/tiny.py", "--workdir", workdir, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_the_command_leaves_the_run_directory_of_the_contract(command):
    workdir, _ = command
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json", "summary.json", "metrics.jsonl", "completions.jsonl", "heldout.jsonl",
        "spectrum.safetensors", "checkpoints", "adapter", "report", "run.json", ".lock",
    }  # fmt: skip
    assert (workdir / "report" / "index.html").is_file()
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "3"}
    offsets = {path.name for path in (workdir / "adapter").iterdir()}
    assert offsets == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["max_steps"] == 3


def test_metrics_have_trls_names_once_a_step(command):
    lines = read_lines(command[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in (
        "loss",
        "policy_loss",
        "kl",
        "entropy",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "step_time",
    ):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert lines[0]["kl"] == 0.0
    assert lines[-1]["kl"] > 0.0
    for line in lines:
        by_task = [v for k, v in line.items() if k.startswith("rewards/")]
        assert by_task
        assert min(by_task) - 1e-6 <= line["reward"] <= max(by_task) + 1e-6
    assert lines[0]["num_tokens"] < lines[1]["num_tokens"] < lines[2]["num_tokens"]


def test_the_first_update_is_on_policy(command):
    first = read_lines(command[0] / "metrics.jsonl")[0]
    for name in ("low", "high", "region"):
        assert first[f"clip_ratio/{name}_mean"] == 0.0
    # Every ratio is 1, so the loss is minus the mean advantage of the step's completions; against
    # old log-probabilities of 0 the ratios would be probabilities.
    advantages = [
        line["advantage"]
        for line in read_lines(command[0] / "completions.jsonl")
        if line["step"] == 1
    ]
    assert len(advantages) == 64
    assert np.abs(advantages).max() > 0.1
    assert first["policy_loss"] == pytest.approx(-np.mean(advantages), abs=1e-5)


def test_completions_carry_prompt_reward_and_advantage(command):
    lines = read_lines(command[0] / "completions.jsonl")
    assert {line["step"] for line in lines} == {1, 3}
    assert len(lines) == 2 * 64
    for start in range(0, len(lines), 8):
        group = lines[start : start + 8]
        assert len({line["prompt"] for line in group}) == 1
        rewards = np.array([line["reward"] for line in group])
        advantages = np.array([line["advantage"] for line in group])
        expected = np.zeros(8) if np.ptp(rewards) < 1e-6 else rewards - rewards.mean()
        expected = expected / (rewards.std() if np.ptp(rewards) >= 1e-6 else 1.0)
        np.testing.assert_allclose(advantages, expected, atol=1e-4)


def test_the_summary_agrees_with_the_printed_table(command):
    workdir, result = command
    summary = json.loads((workdir / "summary.json").read_text())
    for table in ("heldout", "heldout_greedy"):
        assert list(summary[table]) == [*TASKS, "overall"]
        for gain in summary[table].values():
            assert gain["gain"] == pytest.approx(gain["after"] - gain["before"])
            assert gain["gain_ci95"][0] <= gain["gain"] <= gain["gain_ci95"][1]
    for table in ("heldout", "heldout_greedy"):
        right = summary[f"{table}_accuracy"]
        assert list(right) == ["sentiment", "classification"]
        for name, share in right.items():
            assert share["after"] == pytest.approx((summary[table][name]["after"] + 1) / 2)
    share = summary["heldout_greedy_accuracy"]["sentiment"]
    said = f"sentiment {share['before']:.0%} before, {share['after']:.0%} after"
    assert f"right under greedy decoding: {said}, classification" in result.stdout
    overall = summary["heldout"]["overall"]
    assert overall["n"] == 20
    assert f"{overall['before']:.3f}" in result.stdout
    assert summary["trainable_parameters"] == 4 * 102
    assert summary["builtin_model"] is True
    assert summary["random_weights"] is False
    assert all(summary["builtin_data"].values())
    assert 0 < summary["compile_seconds"] < summary["seconds"]
    assert summary["platform"] == jax.devices()[0].platform


def test_held_out_lines_and_counts_of_prompts_agree_with_the_summary(command):
    workdir, _ = command
    summary = json.loads((workdir / "summary.json").read_text())
    lines = read_lines(workdir / "heldout.jsonl")
    expected = {"source": "builtin", "train": 40, "heldout": 4, "bad_lines": 0}
    for task in TASKS:
        assert summary["data"][task] == expected
        own = [line for line in lines if line["task"] == task]
        assert len(own) == 4
        for when in ("before", "after"):
            for table, key in (("heldout", "reward"), ("heldout_greedy", "greedy_reward")):
                mean = np.mean([line[f"{key}_{when}"] for line in own])
                assert mean == pytest.approx(summary[table][task][when])
            assert all(isinstance(line[f"completion_{when}"], str) for line in own)
            assert all(isinstance(line[f"greedy_{when}"], str) for line in own)


def test_the_first_screen_says_what_runs_and_the_log_shows_completions(command):
    _, result = command
    assert "the built-in tiny model" in result.stdout
    assert "408 scales of singular values (attn.c_proj)" in result.stdout
    assert all(f"data      {name}: builtin" in result.stdout for name in TASKS)
    assert "step 1\n" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_checkpoint_and_the_adapter_folder_hold_the_trained_offsets(command):
    workdir, _ = command
    config = parse_config(get_config("tiny"))
    policy = load_policy(config)
    offsets = checkpoints.load_adapter(workdir / "adapter", policy.zero)
    template = grpo.init_state(policy.zero, make_algorithm(config).optimizer)
    stored = checkpoints.Checkpoints(workdir)
    state, _, position = stored.restore(template, 3)
    stored.close()
    for name, value in offsets.items():
        np.testing.assert_array_equal(state.offsets[name], value)
        assert np.abs(value).max() > 0
    assert int(state.step) == position["step"] == 3
    # Three steps of Adam: no offset can have moved much further than three learning rates.
    largest = max(float(np.abs(v).max()) for v in offsets.values())
    assert largest < 3.1 * config.train.learning_rate


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(command, tmp_path):
    run(get_config("tiny"), tmp_path / "again")
    first, again = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (command[0], tmp_path / "again")
    )
    assert first.keys() == again.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


def test_a_run_of_the_former_names_of_settings_loads_and_does_not_continue(command, tmp_path):
    workdir = shutil.copytree(command[0], tmp_path / "run")
    settings = json.loads((workdir / "config.json").read_text())
    grpo_settings = settings["grpo"]
    grpo_settings["advantage"] = grpo_settings.pop("advantages")
    grpo_settings["aggregation"] = grpo_settings.pop("weights")
    for name in ("advantages_options", "objective", "objective_options", "weights_options"):
        del grpo_settings[name]
    del settings["train"]["optimizer"], settings["train"]["optimizer_options"]
    (workdir / "config.json").write_text(json.dumps(settings))
    found = adaptation.load_run(workdir)
    assert found.config == adaptation.load_run(command[0]).config
    checkpoints_before = sorted((workdir / "checkpoints").iterdir())
    with pytest.raises(InputError, match="holds a run of an earlier version"):
        run(get_config("tiny"), workdir)
    assert sorted((workdir / "checkpoints").iterdir()) == checkpoints_before


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The steps of two epochs of two, as they ask for rollouts and updates; nothing is computed."""
    return recording(tmp_path, monkeypatch)


def recording(tmp_path, monkeypatch, **changes):
    """What was asked of rollouts and updates, and the records of the steps."""
    config = parse_config(
        get_config(
            "tiny",
            **{
                "data.tasks": ("sentiment",),
                "data.max_samples": 8,
                "grpo.group_size": 4,
                "train.batch_size": 16,
                "train.accumulation_steps": 1,
                "train.epochs": 2,
                "train.max_steps": 0,
                "generation.temperature": 1.0,
                "generation.final_temperature": 0.4,
                **changes,
            },
        )
    )
    policy = load_policy(config)
    length = config.generation.max_new_tokens
    asked, updates = [], []

    def generate(policy, offsets, prompts, keys, *args, num_samples, temperature, **options):
        rng = np.random.default_rng(len(asked))
        shape = (len(prompts.tokens), num_samples, length)
        mask = np.arange(length) < rng.integers(1, length + 1, shape[:2])[..., None]
        out = sampling.Rollouts(
            np.where(mask, rng.integers(5, 200, shape), 0),
            mask,
            np.where(mask, rng.uniform(-5, 0, shape), 0).astype(np.float32),
            np.zeros(shape, np.float32),
        )
        asked.append((prompts, np.asarray(jax.random.key_data(keys)), temperature, out))
        return out

    def update(state, params, batch, temperature, **settings):
        updates.append((batch, temperature))
        metrics = dict.fromkeys(grpo.METRICS, 0.0)
        return state._replace(step=state.step + 1), metrics

    monkeypatch.setattr(rollouts.engine, "generate", generate)
    monkeypatch.setattr(training.stages, "update_program", update)
    items = load_data(config, policy).train
    algorithm = make_algorithm(config)
    key, signals = jax.random.key(0), rundir.Signals()
    run = training.Run(config, policy, algorithm, items, key, tmp_path, "hash", signals)
    records, state = [], run.state
    for step in range(run.total_steps):
        state, record = run.step(state, step)
        records.append(record)
    for each in (run.checkpoints, run.completions, run.metrics):
        each.close()
    return asked, updates, records


def test_no_two_prompts_of_a_run_are_sampled_with_the_same_key(recorded):
    keys = np.concatenate([keys for _, keys, *_ in recorded[0]])
    assert len(keys) == 4 * 4
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_an_epoch_takes_every_prompt_once_and_the_next_in_another_order(recorded):
    steps = [
        [row[keep].tobytes() for row, keep in zip(*prompts, strict=True)]
        for prompts, *_ in recorded[0]
    ]
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert len(set(first)) == 8
    assert sorted(first) == sorted(second)
    assert first != second


def test_rollout_and_update_have_the_annealed_temperature_and_the_rollouts_own_arrays(recorded):
    asked, updates, records = recorded
    # From 1 to 0.4 in three equal parts.
    expected = pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert [temperature for *_, temperature, _ in asked] == expected
    assert [temperature for _, temperature in updates] == expected
    assert [record["temperature"] for record in records] == expected
    for (prompts, _, _, out), (batch, _) in zip(asked, updates, strict=True):
        np.testing.assert_array_equal(batch.prompts, prompts.tokens)
        np.testing.assert_array_equal(batch.completions, out.tokens)
        np.testing.assert_array_equal(batch.old_logps, out.logps)


def test_tokens_are_counted_of_prompts_and_completions_of_all_steps(recorded):
    asked, _, records = recorded
    counts = [4 * int(prompts.mask.sum()) + int(out.mask.sum()) for prompts, *_, out in asked]
    assert [record["num_tokens"] for record in records] == np.cumsum(counts).tolist()


def test_of_the_groups_drawn_those_whose_rewards_differ_are_trained_on(tmp_path, monkeypatch):
    rewards = np.full((8, 4), -1.0)
    rewards[[2, 5, 7], 1] = 1.0

    def score(items, texts, base_logps, **options):
        return rollouts.Scores(rewards, {}, None)

    monkeypatch.setattr(rollouts, "score", score)
    # A step takes all eight prompts, so that two epochs are two steps.
    changes = {"grpo.dynamic_sampling": 2}
    asked, updates, records = recording(tmp_path, monkeypatch, **changes)
    assert len(asked) == 2
    taken = [0, 2, 5, 7]  # the three, and the first of the others
    for (prompts, _, _, out), (batch, _) in zip(asked, updates, strict=True):
        assert len(prompts.tokens) == 8
        np.testing.assert_array_equal(batch.prompts, prompts.tokens[taken])
        np.testing.assert_array_equal(batch.completions, out.tokens[taken])
        np.testing.assert_array_equal(batch.old_logps, out.logps[taken])
        moved = np.abs(np.asarray(batch.advantages)).max((1, 2)) > 0
        assert moved.tolist() == [False, True, True, True]
    # Metrics are of all that was drawn.
    assert records[0]["frac_reward_zero_std"] == pytest.approx(5 / 8)
    assert records[0]["reward"] == pytest.approx((3 - 29) / 32)
    counts = [4 * int(prompts.mask.sum()) + int(out.mask.sum()) for prompts, *_, out in asked]
    assert [line["num_tokens"] for line in records] == np.cumsum(counts).tolist()


def test_process_supervision_and_the_reports_advantages_run_end_to_end(tmp_path):
    changes = {
        "data.heldout_samples": 2,
        "data.tasks": ("general",),
        "grpo.advantages": "scaled",
        "grpo.supervision": "process",
        "model.source": thin_model(),
        "train.eval_samples": 1,
        "train.max_steps": 1,
    }
    config = get_config("tiny", **changes)
    run(config, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "completions.jsonl")
    advantages = np.array([line["advantage"] for line in lines])
    assert 0 < np.abs(advantages).max() < 1.0
    assert {line["task"] for line in lines} == {"general"}


def test_real_text_of_five_tasks_through_the_real_tokenizer(shared, tmp_path, capsys):
    """GPT-2's tokenizer, positions and heads, with one thin layer so that it compiles fast."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "gpt2" / name, model)
    fields = json.loads((shared / "gpt2" / "config.json").read_text())
    fields |= {"n_layer": 1, "n_embd": 48}
    (model / "config.json").write_text(json.dumps(fields))
    data = shared / "data"
    config = get_config("gpt2")
    config.update_from_flattened_dict(
        {
            **SMALL,
            "model.source": f"random:{model}",
            "generation.prompt_buckets": (192,),  # one length, and so one program of each kind
            "data.heldout_samples": 2,
            "generation.max_new_tokens": 4,
            "train.eval_samples": 1,
            "train.max_steps": 5,
            "train.batch_size": 16,
            "train.accumulation_steps": 4,
            "logging.interval": 1,
            "data.qa.source": str(data / "squad"),
            "data.qa.subset": "",
            "data.qa.heldout_split": "test",
            "data.qa.columns.answers": "answers",
            "data.sentiment.source": str(data / "sst2_sentences"),
            "data.sentiment.heldout_split": "test",
            "data.summarization.source": str(data / "scitldr_a"),
            "data.summarization.revision": "",
            "data.summarization.heldout_split": "test",
            "data.summarization.columns.document": "source",
            "data.summarization.columns.summary": "target",
            "data.classification.source": str(data / "ag_news"),
            "data.general.source": str(data / "wikitext2"),
            "data.general.subset": "",
            "data.general.train_split": "valid",
            "data.general.heldout_split": "test",
        }
    )
    summary = run(config, tmp_path / "run")
    out, err = capsys.readouterr()
    assert "RANDOM WEIGHTS" in out
    assert summary["random_weights"] is True
    lines = read_lines(tmp_path / "run" / "completions.jsonl")
    assert {line["task"] for line in lines} == set(TASKS)
    for name in TASKS:
        assert f"  {name} " in err
    endings = {"qa": "Answer:", "sentiment": "Sentiment:", "summarization": "TL;DR:"}
    for line in lines:
        assert line["prompt"].endswith(endings.get(line["task"], ""))
        assert -1.0 <= line["reward"] <= 1.0
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5


# Mistakes, each before anything is compiled


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"data.max_prompt_tokens": 200}, ["data.max_prompt_tokens=200", "context is 128"]),
        ({"adapter.sites": ("attn.q_proj",)}, ["adapter.sites", "'attn.q_proj'", "attn.c_proj"]),
        ({"data.max_samples": 1}, ["5 training prompts", "takes 8"]),
        ({"generation.stop": ("two words", "")}, ["generation.stop: ''", "in every text"]),
        ({"model.source": "/no/such/folder"}, ["model.source='/no/such/folder'", "no such folder"]),
        ({"model.source": "random:gpt2"}, ["random:gpt2", "no tokenizer"]),
        ({"data.max_prompt_tokens": 3}, ["data.max_prompt_tokens"]),
    ],
)
def test_mistakes_are_named_before_compilation(changes, fragments, tmp_path, monkeypatch):
    def compiled(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(rollouts, "complete", compiled)
    with pytest.raises(InputError) as error:
        run(get_config("tiny", **changes), tmp_path / "run")
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_task_without_signal_is_told_the_temperature_that_was_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "WINDOW", 2)
    monkeypatch.setattr(metrics, "FLAT", 0.0)
    settings = {"generation.temperature": 0.6, "generation.final_temperature": 0.3}
    training.train(training_config(**settings, **{"train.max_steps": 2}), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "step 2: general: in" in line]
    assert [line.endswith("than generation.temperature=0.6.") for line in said] == [True]
