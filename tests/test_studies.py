"""The studies: a document shows the figures of its study, and a small part of each runs."""

import json
import platform
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.adaptation import Text, TrainedRun, log_likelihoods
from grpocem_jax.config import load_config, make_method, parse_config
from grpocem_jax.rollouts import Item
from grpocem_jax.rollouts.policy import load_policy, make_adapter
from grpocem_jax.tasks import TASKS, Example
from grpocem_jax.training.algorithm import make_algorithm
from studies import (
    adaptation,
    common,
    communication,
    domains,
    methods,
    passages,
    pretrained,
    real,
    soak,
    stages,
    stories,
)
from tests.runs import ROOT, thin_model


@pytest.mark.parametrize(
    ("study", "name"),
    [
        (adaptation, "studies/adaptation.md"),
        (pretrained, "studies/adaptation.md"),
        (domains, "studies/domains.md"),
        (stories, "docs/reproduction.md"),
        (real, "studies/real.md"),
        (methods, "docs/methods.md"),
    ],
)
def test_the_document_shows_the_figures_that_are_kept(study, name, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "plot", lambda *_: None)
    results = json.loads((ROOT / study.RESULTS).read_text())
    assert set(results) <= set(study.PARTS)
    missing = len(study.PARTS) - len(results)
    assert (ROOT / name).read_text().count("Not measured yet.") == missing
    doc = Path(shutil.copy(ROOT / name, tmp_path))
    common.write(doc, study.tables(results))
    assert doc.read_text() == (ROOT / name).read_text()


def test_a_real_model_is_adapted_to_passages_and_judged_by_others(shared):
    model = shared / "models" / "tinystories-656k"
    study = pretrained.load(model, shared / "data", 1)
    support, judges = study.passages("mathematics", 4, 0)
    assert study.passages("mathematics", 2, 0) == (support[:2], judges)
    assert len({x.prompt for x in support + judges}) == 4 + pretrained.JUDGES
    (prompt, judge), *_ = study.prompts("stories", 2)
    assert judge.prompt == prompt.prompt
    encode = study.runs["one"].policy.encode
    # Prompt and what follows are tokens of one text: no space is put between them.
    whole = encode(judge.prompt + judge.completion)
    assert whole[: len(encode(prompt.prompt))] == encode(prompt.prompt)
    found = study.adapt("one", support, 0, **passages.GRADIENT)
    assert study.gain("one", found, judges) > 0.1


def test_slot_adds_one_vector_to_the_last_states(shared):
    study = domains.load(thin_model(), "attn.c_proj", shared / "data", 1)
    run = study.runs[domains.RUN]
    slot = domains.Slot(run.policy.params, run.policy.model)
    given, _ = study.passages("restaurants", 4, 0)
    hidden, tokens = domains.states(run, given[:1])
    assert len(hidden) == len(tokens) == len(run.policy.encode(given[0].prompt)) - 1
    # Nothing added is the model itself.
    logps = slot.logps(jnp.zeros(hidden.shape[1]), hidden, tokens)
    assert float(logps.mean()) == pytest.approx(study.before(domains.RUN, (given[0],)), abs=1e-5)
    assert domains._slot(study, 5)(given, given, 0) > 0
    search = domains._search(study, {**domains.METHODS["random search"], "generations": 1})
    assert search(given, given, 0) >= 0


def test_the_methods_of_a_study_are_what_they_are_called():
    config = parse_config(load_config("smollm2:builtin"))
    found = {
        name: common.searching(config, **changes)
        for name, changes in domains.METHODS.items()
        if name != "sep_cma_es"  # which needs evosax
    }
    assert [config.search.method for config in found.values()] == ["gradient"] + ["cem"] * 3
    assert make_method(found["cem, sigma 0.3"]).noise_std == 0.3
    assert make_method(found["gradient"]) == config.gradient
    random = make_method(found["random search"])
    assert (random.momentum, random.std_momentum) == (1.0, 1.0)


def test_what_was_kept_of_a_study_is_not_searched_again():
    class Known(passages.Study):
        """Searches nothing."""

        def adapt(self, name, texts, seed, **changes):
            return types.SimpleNamespace(returned="mean")

        def gain(self, name, found, judges):
            return 1.0

        def passages(self, kind, count, seed):
            return [], [Text(kind)]

        def _before(self, name, judges):
            return -3.0

    study = Known({}, {"news": [], "log": []}, 2, 1)
    done = {"text": "news", "before": -1.0, "free": [0, 0], "gated": [0, 0], "gated_adapted": 0}
    fresh = {"text": "log", "before": -3.0, "free": [1, 1], "gated": [1, 1], "gated_adapted": 2}
    assert list(domains.support(study, [done])) == [{"rows": [done, fresh]}]
    assert list(domains.support(study, [done, fresh])) == []
    # With another number of draws all is searched again.
    assert len(list(domains.support(study, [{**done, "free": [0]}]))) == 2


@pytest.mark.parametrize("name", methods.METHODS)
def test_each_method_of_the_comparison_is_a_config_of_names_in_the_docs(name, tmp_path):
    study, changes = methods.Study(tmp_path, 1), methods.METHODS[name]
    config = parse_config(study.settings("tiny", changes, 0))
    make_algorithm(config)
    make_adapter(config.adapter)
    text = (ROOT / "docs" / "methods.md").read_text()
    for field, value in changes.items():
        if isinstance(value, str):
            assert f"| `{value}`" in text or f", `{value}`" in text, field


SHORT = {
    "data.max_samples": 16,
    "data.heldout_samples": 4,
    "grpo.dynamic_sampling": 1,
    "grpo.group_size": 4,
    "train.batch_size": 8,
    "train.eval_samples": 1,
    "train.max_steps": 2,
    "train.warmup_steps": 1,
}


@pytest.fixture
def study(tmp_path):
    """The study of the real model, on a thin one."""
    return real.Study(thin_model(), "attn.c_proj", "builtin", tmp_path / "runs", 1)


def test_a_run_of_the_study_is_trained_once_and_has_its_price(study, monkeypatch, capsys):
    row = study.train("scales", SHORT)
    assert row["steps"] == 2
    assert row["parameters"] == 102  # 0.8 x 128 scales of the only layer
    assert set(row["greedy"]) == {"sentiment", "classification", "overall"}
    assert row["likelihood"]["before"] < 0
    assert row["likelihood"]["change"][0] != 0
    (shown,) = real.tables({"two": {"rows": [row]}}).values()
    assert shown.splitlines()[2].startswith("| 0 | ")
    monkeypatch.setattr(real.Study, "_likelihood", pytest.fail)
    capsys.readouterr()
    assert json.dumps(study.train("scales", SHORT)) == json.dumps(row)
    assert " is complete; " in capsys.readouterr().out


@pytest.mark.parametrize("name", real.RECIPES)
def test_the_recipes_of_the_study_are_settings(study, name):
    changed = study.settings(real.RECIPES[name])
    assert parse_config(changed)
    assert changed.to_dict() != study.settings({}).to_dict()


def test_a_labels_likelihood_is_that_of_its_tokens_after_the_prompt(study):
    config = parse_config(study.settings({}))
    policy = load_policy(config)
    run = TrainedRun(config, policy, policy.zero)
    prompt, labels = "Text: The soup was cold.\nTopic:", ("World", "Sports news")
    for label, found in zip(labels, real._likelihoods(run, prompt, labels), strict=True):
        text = Text(prompt, f" {label}")
        (mean,) = log_likelihoods(run, run.offsets, [text])
        count = len(policy.encode_completion(text.completion))
        assert found == pytest.approx(count * mean, rel=1e-4)


def test_calibration_divides_by_the_likelihoods_without_a_text(monkeypatch):
    labels = ("World", "Sports")
    asked = []

    def likelihoods(run, prompt, names):
        asked.append(prompt)
        assert names == labels
        return np.array([-1.0, -3.0] if "N/A" in prompt else [-1.5, -2.0])

    monkeypatch.setattr(real, "_likelihoods", likelihoods)
    shown = "News: A game\nTopic: Sports\n\n"
    items = [
        Item(
            TASKS["classification"],
            Example(
                f"{shown}News: A game\nTopic:", {"text": "A game", "label": x, "labels": labels}
            ),
            np.zeros(1, np.int32),
        )
        for x in labels
    ]
    # By likelihood it is World, -1.5 and -2; calibrated Sports, -0.5 and 1.
    np.testing.assert_array_equal(real._calibrated(None, items), [False, True])
    assert asked == [f"{shown}News: N/A\nTopic:", items[0].example.prompt, items[1].example.prompt]


def test_a_document_without_a_place_for_a_table_is_refused(tmp_path):
    doc = tmp_path / "doc.md"
    doc.write_text("<!-- tasks -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="0 places for the table gate"):
        common.write(doc, {"gate": "| |"})


def test_a_task_is_judged_with_and_without_the_gate(monkeypatch):
    monkeypatch.setattr(adaptation, "TASKS", ("classification",))
    study = adaptation.Study(adaptation.load(), 2)
    study.heldout = [item for item in study.heldout if item.task.name == "classification"][:4]

    def adapt(items, seed, settings, space):
        return study.adapt(adaptation.demonstrations(items, "train"), seed, settings, space)

    methods = {"cem": {}, "cem, gate": {"gate": True}, "random search": adaptation.RANDOM}
    small = {"population_size": 4, "generations": 2, "gate": False}
    ((rows,),) = (
        found.values()
        for found in adaptation._task_rows(study, {"experts": methods}, adapt, [], **small)
    )
    assert [row["method"] for row in rows] == list(methods)
    assert {(row["task"], row["space"], row["n"]) for row in rows} == {
        ("classification", "experts", 2)
    }
    for row in rows:
        assert np.all(np.isfinite([row["likelihood"], row["reward"]]))
    assert rows[-1]["reward_over_random"] == rows[-1]["likelihood_over_random"] == (0.0, 0.0)
    assert rows[0]["likelihood"] != rows[-1]["likelihood"]
    # What is there is not searched again.
    again = adaptation._task_rows(study, {"experts": methods}, pytest.fail, rows, **small)
    assert list(again) == []


@pytest.mark.parametrize("grows", ["resident", "heap"])
@pytest.mark.parametrize(
    ("memory", "compiled", "good", "growth"),
    [
        # Half of the samples count: what a run takes at its start does not.
        ([100, 200, 500, 500, 500, 500], [1, 2, 3, 3, 3, 3], True, "{} +0.00 MB"),
        # 4 MB from sample to sample are 12 in three of them: above 2% of 500 MB.
        ([100, 200, 500, 500, 504, 508], [1, 2, 3, 3, 3, 3], False, "{} +12.00 MB"),
        ([100, 200, 500, 500, 503, 506], [1, 2, 3, 3, 3, 3], True, "{} +9.00 MB"),
        ([100, 200, 500, 500, 500, 500], [1, 2, 3, 3, 3, 4], False, "1 programs compiled"),
    ],
)
def test_the_second_half_of_a_soak_decides(memory, compiled, good, growth, grows, capsys):
    meter = soak.Meter("steps", 6)
    flat = [500.0] * 6
    both = (memory, flat) if grows == "resident" else (flat, memory)
    meter.samples = list(zip(*both, compiled, strict=True))
    assert meter.verdict() is good
    assert growth.format(grows) in capsys.readouterr().out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc tells what is in use")
def test_the_heap_is_what_was_not_freed():
    before = soak.heap_mb()
    block = np.ones(10**7 // 8)
    assert soak.heap_mb() - before == pytest.approx(10, abs=0.5)
    del block
    assert soak.heap_mb() - before == pytest.approx(0, abs=0.5)


def test_a_short_soak_compiles_nothing_in_its_second_half(tmp_path, monkeypatch, capsys):
    # So short a run has not yet touched all the memory that it will have.
    monkeypatch.setattr(soak, "BOUND", 1.0)
    overrides = {
        "model.source": thin_model(),
        "search.buckets": (64, 127),
        "cem.population_size": 4,
        "data.heldout_samples": 2,
        "data.tasks": ("general",),
        "data.validation_samples": 2,
        "generation.max_new_tokens": 4,
        "grpo.group_size": 4,
        "train.batch_size": 16,
        "train.checkpoint_every_steps": 1,
        "train.eval_samples": 1,
        "train.evaluate_every_steps": 1,
    }
    assert soak.soak(4, 4, tmp_path / "run", overrides)
    out = capsys.readouterr().out
    for what in ("steps", "adaptations"):
        assert f"second half of 4 {what}: " in out
    assert out.count("0 programs compiled: flat") == 2


def test_the_paper_estimate_is_that_of_the_document_and_grows_with_the_ring():
    """What is gathered in a step, by hand: a kilobyte of each process, and what is longer."""
    rows = communication.table(64, 7368, 0.106, 1 / 52_998)[1:]
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    for devices, processes, received, _, _, efficiency, completions, candidates in rows[1:]:
        line = next(x for x in text.splitlines() if x.startswith(f"| {devices} | {processes} |"))
        assert f"| {received} |" in line
        assert line.endswith(f"| {int(completions):,} | {int(candidates):,} |")
        (shown,) = re.findall(r"\| (0\.\d+) \|", line)
        assert abs(float(shown) - float(efficiency)) < 0.005
    # 512 completions: 6 bytes each of the one kind, 12 of the other, in powers of two.
    found = communication.cost(8, lambda x: communication.step(x, 512, 7368))
    assert found.received == 8 * (4 * 1024 + 4096 + 8192) + 4 * (7368 + 8)
    assert found.seconds > 7 * 7 * communication.HOP_S
    assert communication.cost(1, lambda x: communication.step(x, 512, 7368)).seconds == 0


def test_what_rollouts_apart_cost_is_calculated_from_what_was_measured():
    divided, apart, sampling = stages.on_gpus(64, 2)
    rollouts = 64 * 64 / stages.DECODED[64]
    assert divided == pytest.approx(rollouts + 0.05)
    assert (apart, sampling) == (pytest.approx(0.1), 1)  # the update of one process, of 128
    assert stages.on_gpus(512, 2)[1] > stages.on_gpus(512, 2)[0]  # many rows: nothing is gained


def summary_of(gain, seconds, peak):
    own = {
        "before": 0.0,
        "after": gain,
        "gain": gain,
        "gain_ci95": (gain - 0.2, gain + 0.2),
        "n": 4,
    }
    return {
        "heldout": {"overall": own},
        "heldout_greedy": {"overall": own},
        "trainable_parameters": 7,
        "train_seconds": seconds,
        "peak_bytes": peak,
    }


def test_the_comparison_keeps_its_rows_as_they_come(tmp_path, monkeypatch):
    asked = []

    def trained(study, config, name, seed):
        asked.append((name, seed))
        gain = seed * (2.0 if name == "lora" else 1.0)
        return summary_of(gain, 9.0 - seed, None if seed == 0 else 5e6)

    monkeypatch.setattr(methods.Study, "train", trained)
    study = methods.Study(tmp_path, 2, only=("grpo", "lora"))
    kept = [found["rows"] for found in methods.builtin(study)]
    # All methods have their first seed before any its second.
    assert asked == [("grpo", 0), ("lora", 0), ("grpo", 1), ("lora", 1)]
    assert [[row["n"] for row in rows] for rows in kept] == [[1], [1, 1], [2, 1], [2, 2]]
    first, last = kept[0][0], kept[-1][0]
    assert first["heldout"] == pytest.approx((0.0, 0.2))
    assert "peak_bytes" not in first
    # The standard error of 0 and 1 is a half, and Student's t of one degree of freedom 12.706.
    assert last["heldout"] == pytest.approx((0.5, 12.706 * 0.5), rel=1e-4)
    assert (last["seconds"], last["peak_bytes"]) == (8.0, 5e6)
    # With the same seeds LoRA gains 0 and 1 more.
    assert "over_grpo" not in kept[1][1]
    assert kept[-1][1]["over_grpo"] == pytest.approx((0.5, 12.706 * 0.5), rel=1e-4)
    assert methods.tables({"builtin": {"rows": kept[-1]}})["methods builtin"].endswith("| 5 |")
    results = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["methods", "--parts=builtin", "--only=grpo", "--seeds=1"])
    monkeypatch.setattr(methods, "RESULTS", results)
    monkeypatch.setattr(common.commands, "keep_compiled_programs", lambda: None)
    methods.main()
    assert [row["n"] for row in json.loads(results.read_text())["builtin"]["rows"]] == [1]


def test_noise_on_weights_is_a_share_of_each_matrix():
    params = {"kernel": 3.0 * jax.random.normal(jax.random.key(0), (80, 90)), "bias": jnp.ones(9)}
    moved = methods.noisy(params, 0.1, jax.random.key(1))
    change = np.asarray(moved["kernel"] - params["kernel"])
    assert change.std() == pytest.approx(0.3, rel=0.05)
    np.testing.assert_array_equal(moved["bias"], params["bias"])
    same = methods.noisy(params, 0.0, jax.random.key(1))
    np.testing.assert_array_equal(same["kernel"], params["kernel"])


def test_adapters_are_judged_under_noise(tmp_path, monkeypatch):
    def thin(name):
        settings = load_config(name)
        settings.model.source = thin_model()
        settings.update_from_flattened_dict(SHORT)
        settings.generation.max_new_tokens = 4
        settings.data.tasks = ("general",)
        return settings

    monkeypatch.setattr(methods, "load_config", thin)
    monkeypatch.setattr(methods, "LEVELS", (0.0, 0.1))
    monkeypatch.setattr(methods, "DRAWS", 2)
    (found,) = methods.noise(methods.Study(tmp_path, 1, steps=methods.QUICK))
    assert [(row["level"], row["n"]) for row in found["rows"]] == [(0.0, 1), (0.1, 2)]
    for row in found["rows"]:
        assert np.isfinite([*row["grasp"], *row["stoch_grasp"]]).all()
    assert methods.tables({"noise": found})["methods noise"].count("\n") == 3
