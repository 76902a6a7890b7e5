"""The examples, run as they stand but shorter."""

import contextlib
import dataclasses
import inspect
import json
import runpy
import shutil
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpocem_jax as gj
from examples import optimal_values as values
from examples import variants
from examples.arithmetic import config as arithmetic
from examples.arithmetic import multiplication
from examples.arithmetic import rewards as numbers
from examples.own_task import rewards
from examples.stories import rewards as stories
from grpocem_jax import adaptation, report
from grpocem_jax.config import load_config, parse_config
from grpocem_jax.tasks import example_of, load_examples
from grpocem_jax.tasks.rows import file_rows
from grpocem_jax.training.data import load_data
from tests.runs import ROOT, get_config, thin_model, tiny_policy, write_run

pytestmark = pytest.mark.usefixtures("one_policy")


def short(settings, tasks=None):
    """The settings of a run of one step."""
    settings.train.max_steps = 1
    settings.train.batch_size = 16
    settings.data.heldout_samples = 2
    settings.train.eval_samples = 1
    settings.generation.max_new_tokens = 4
    if tasks:
        settings.data.tasks = tasks
    return settings


@pytest.fixture
def in_root(monkeypatch):
    """Runs from the root of the repository."""
    monkeypatch.chdir(ROOT)


def test_rewards_of_the_own_task():
    texts = [
        " positive.",
        " not negative, positive",
        " at first negative, because of the soup.",
        "",
    ]
    words = ["positive"] * 4
    assert rewards.right(texts, texts, sentiment=words) == [1, -1, -1, -1]
    # One word; three, so two more of nine; seven, so six more; no answer at all.
    expected = [1, 1 - 2 * 2 / 9, 1 - 2 * 6 / 9, -1]
    assert rewards.brief(texts, texts, sentiment=words) == pytest.approx(expected)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The run directory of the own task, and its summary."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    with contextlib.chdir(ROOT):
        settings = short(gj.load_config("examples/own_task/config.py"))
        settings.model.source = thin_model()
        settings.search.generations, settings.cem.population_size = 2, 10
        return workdir, gj.train(settings, workdir)


def test_the_own_task_trains(own_run):
    workdir, summary = own_run
    assert set(summary["heldout"]) == {"reviews", "overall"}
    assert summary["data"]["reviews"]["heldout"] == 2
    (line,) = (workdir / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    total = record["rewards/right/mean"] + 0.5 * record["rewards/brief/mean"]
    assert record["rewards/reviews/mean"] == pytest.approx(total, rel=1e-5)
    assert record["reward"] == pytest.approx(total, rel=1e-5)


def test_rewards_of_the_stories():
    texts = [
        "",
        "No one spoke.",
        'He said, "Hi." She was glad.',
        '"Yes," said Tom. "I will come',
        "went and went and went and went",
    ]
    # Of six words one is spoken, a sixth; of six words four are, beyond a third.
    expected = [-1, -1, 2 * 3 / 6 - 1, 1, -1]
    assert stories.conversation(texts, texts) == pytest.approx(expected)
    # The last has 5 triples, 2 of them different.
    assert stories.fresh(texts, texts) == pytest.approx([-1, 1, 1, 1, 2 * 2 / 5 - 1])


def test_the_stories_train_on_a_real_model(shared, in_root, tmp_path):
    settings = short(gj.load_config("examples/stories/config.py"))
    settings.model.source = str(shared / "models" / "tinystories-656k")
    summary = gj.train(settings, tmp_path / "run")
    # Two layers: floor(0.8 * 128) of five maps, and of keys and values, with 64 outputs, half.
    assert summary["trainable_parameters"] == 2 * (5 * 102 + 2 * 51)
    assert set(summary["heldout"]) == {"stories", "overall"}


def test_an_adapter_object_reaches_adapt_and_complete():
    settings = gj.load_config("tiny")
    settings.model.source = thin_model()
    settings.generation.max_new_tokens = 4
    config = gj.parse_config(settings)
    method = gj.lora(rank=1)
    policy = gj.load_policy(config, adapter=method)
    assert policy.adapter is method
    assert jax.tree.map(jnp.shape, policy.zero["h.0.attn.c_proj"]) == {"a": (128, 1), "b": (1, 128)}
    run = gj.TrainedRun(config, policy, policy.zero)
    prompt = "Review: The soup was cold.\nSentiment:"
    settings = dataclasses.replace(config.search, method="gradient", generations=5, gate=False)
    found = gj.adapt(run, prompt, settings=settings)
    assert found.fitness_after > found.fitness_before
    assert isinstance(gj.complete(run, found.offsets, [prompt])[0], str)
    # The function that makes one in place of the adapter.
    with pytest.raises(gj.InputError, match=r"^adapter: is function; give a grpocem_jax.Adapter"):
        gj.load_policy(config, adapter=gj.lora)


def test_the_custom_adapter_and_fitness_train_and_adapt(in_root, tmp_path):
    settings = short(gj.load_config("tiny"), tasks=("general",))
    settings.model.source = thin_model()
    settings.adapter.type = "examples.custom_adapter:scale_and_shift"
    settings.search.fitness = "examples.custom_fitness:worst_token"
    settings.search.generations, settings.cem.population_size = 2, 10
    settings.search.gate = False
    summary = gj.train(settings, tmp_path / "run")
    assert summary["trainable_parameters"] == 2 * 128
    run = gj.load_run(tmp_path / "run")
    text = gj.Text("Review: The soup was cold.")
    found = gj.adapt(run, text)
    assert found.returned == "mean"
    # The worst token of a text is below the mean of all.
    assert found.fitness_before < float(gj.log_likelihoods(run, run.offsets, [text])[0])
    assert found.fitness_after != found.fitness_before


def test_arithmetic_is_judged_by_the_first_number():
    said = [" 12 apples", " 1,212.0 or 3", "-7", " twelve", "is 12"]
    assert numbers.exact([""] * 5, said, [12, "1212", -7.0, 12, 13]) == [1, 1, 1, -1, -1]


def test_multiplications_are_those_that_the_script_makes_and_train_by_config(in_root, tmp_path):
    folder = ROOT / "examples" / "arithmetic"
    lines = "".join((folder / f"{name}.jsonl").read_text() for name in ("train", "test"))
    rows = [json.loads(line) for line in lines.splitlines()]
    assert rows == multiplication.rows()[:600]
    assert len({row["prompt"] for row in rows}) == 600
    for row in rows:
        first, second = map(int, row["prompt"].removesuffix(" =").split(" x "))
        assert first * second == row["Answer"]
    settings = short(arithmetic.get_config())
    settings.model.source = thin_model()
    settings.adapter.sites = ("attn.c_proj",)
    settings.train.accumulation_steps = 1
    assert gj.train(settings, tmp_path / "run")["heldout"]["arithmetic"]["before"] == -1.0


def test_optimal_values_of_the_base_model_are_part_of_the_reward(in_root, tmp_path):
    settings = short(arithmetic.get_config())
    settings.model.source = thin_model()
    settings.adapter.sites = ("attn.c_proj",)
    settings.train.accumulation_steps = 1
    config = parse_config(settings)
    policy = gj.load_policy(config)
    data = load_data(config, policy)
    found = values.values(config, policy, list(data.train), samples=2, beta=0.5)
    # Its completions are wrong, and all worth -1.
    assert found == pytest.approx([-1.0] * len(data.train))
    values.write(tmp_path, "train", list(data.train), {"optimal_value": found})
    values.write(tmp_path, "test", list(data.heldout), {})
    own = settings.data.arithmetic
    own.source = str(tmp_path)
    own.rewards = ("examples.arithmetic.rewards:exact", "grpocem_jax.tasks.rewards:optimal_value")
    own.reward_weights = (1.0, -1.0)
    settings.grpo.objective = settings.grpo.advantages = "a_star_po"
    settings.grpo.advantages_options = {"offline": True}
    settings.grpo.beta = 0.0
    summary = gj.train(settings, tmp_path / "run")
    assert summary["heldout"]["arithmetic"]["before"] == -1.0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["reward"] == pytest.approx(0.0)
    # All advantages are zero, and the policy is the reference.
    assert record["a_star_po/squared_error"] == pytest.approx(0.0, abs=1e-6)


def test_word_problems_are_written_from_the_columns_of_svamp(shared):
    config = parse_config(arithmetic.get_config(str(shared / "data" / "svamp")))
    loaded = load_examples(
        config.task("arithmetic"),
        config.data.sources["arithmetic"],
        split="heldout",
        count_tokens=len,
        max_prompt_tokens=10_000,
        max_samples=20,
        seed=0,
    )
    assert len(loaded.examples) == 20
    for example in loaded.examples:
        assert example.prompt.startswith(example.columns["Body"])
        assert example.prompt.endswith("\nThe answer is a number.\nAnswer:")
        answer = example.columns["Answer"]
        assert numbers.exact([""], [f" {answer:g}."], [answer]) == [1.0]


VARIANTS = {
    "dapo": {"grpo.objective": "examples.variants:dapo", "grpo.weights": "token"},
    "gspo": {"grpo.objective": "examples.variants:gspo"},
    "discounted": {"grpo.advantages": "examples.variants:discounted"},
    "high_entropy": {"grpo.weights": "examples.variants:high_entropy"},
    "lion": {"train.optimizer": "optax:lion", "train.learning_rate": 2e-3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_grpo_train_by_config_alone(name, in_root, tmp_path):
    settings = short(gj.load_config("tiny"), tasks=("general",))
    settings.model.source = thin_model()
    settings.update_from_flattened_dict(VARIANTS[name])
    settings.train.warmup_steps = 0
    settings.train.accumulation_steps = 2
    settings.train.weight_decay = 0.0
    if name == "lion":
        settings.train.optimizer_options = {"weight_decay": 0.0}
    summary = gj.train(settings, tmp_path / "run")
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (summary["steps"], record["skipped"]) == (1, 0.0)
    run = gj.load_run(tmp_path / "run")
    largest = max(float(jnp.abs(x).max()) for x in run.offsets.values())
    # A first step of Adam or Lion is the learning rate.
    assert largest == pytest.approx(settings.train.learning_rate, rel=0.02)
    assert record["learning_rate"] == pytest.approx(settings.train.learning_rate)
    assert record["clip_ratio/region_mean"] == 0.0  # one update of each batch is on policy


def test_each_variant_is_a_few_lines():
    for name in ("dapo", "gspo", "discounted", "high_entropy"):
        assert len(inspect.getsource(getattr(variants, name)).splitlines()) <= 40


def test_grpo_alone_raises_the_reward(capsys):
    runpy.run_path(str(ROOT / "examples" / "grpo_alone.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rewards = [float(line.split("reward ")[1].split()[0]) for line in lines]
    assert len(rewards) == 20
    # The mean of 64 rewards of 0 or 1 is off by 0.06.
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2


def test_cem_alone_finds_the_highest_peak(capsys):
    runpy.run_path(str(ROOT / "examples" / "cem_alone.py"), run_name="__main__")
    distance = capsys.readouterr().out.rpartition("peak: ")[2]
    assert float(distance) < 1e-3  # the next peak is 1 away


def test_the_notebook_script_runs(monkeypatch, capsys):
    load = gj.load_config

    def small(name):
        settings = load(name)
        settings.search.generations, settings.cem.population_size = 2, 10
        settings.generation.max_new_tokens = 4
        return settings

    monkeypatch.setattr(gj, "load_config", small)
    space = runpy.run_path(str(ROOT / "examples" / "adapt_notebook.py"))
    assert space["gradient"].search.generations == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["CEM", "gradient", "before", "after"]


NOTEBOOK = json.loads((ROOT / "examples" / "colab.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_of_format_4_and_kept_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names)
    for cell in NOTEBOOK["cells"]:
        assert all(isinstance(line, str) for line in cell["source"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_the_notebook_runs(own_run, tmp_path, monkeypatch, capsys):
    made = []

    def train(settings, workdir):
        made.append(gj.parse_config(settings))
        shutil.copytree(own_run[0], workdir)  # stands for the notebook's own runs
        report.write(workdir)
        return own_run[1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gj, "train", train)
    # Stands for IPython, which tests do not need.
    display = types.SimpleNamespace(HTML=str)
    ipython = types.SimpleNamespace(display=display, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names = {}
    for number, cell in enumerate(CODE):
        lines = [line for line in cell["source"] if not line.startswith(("!", "%"))]
        exec(compile("".join(lines), cell["id"], "exec"), names)
        if number == 0:
            names |= {"STEPS": 1, "GPT2": True, "GPT2_STEPS": 2}
            names |= {"BENCHMARK": "builtin", "POPULATION": 10}
    assert [config.model.source for config in made] == ["builtin", "openai-community/gpt2"]
    assert [config.train.max_steps for config in made] == [1, 2]
    assert names["exported"].folder.name == f"gpt2-{names['started']}-exported"
    assert "Held-out reward" in names["page"]
    assert names["result"].candidates == 10 * 10
    assert names["exported"].difference < 1e-3
    assert "candidates/s" in capsys.readouterr().out


def test_the_recipes_of_the_readme_help_with_other_recipes(tmp_path):
    """On the model as published, with a fifth of the steps of the README."""
    loaded, _ = tiny_policy()
    folder = write_run(tmp_path, offsets=loaded.zero)
    settings = get_config(**{"search.method": "gradient", "search.generations": 10})
    run = adaptation.load_run(folder, settings)
    texts, others = (
        (ROOT / "examples" / "adapt" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        for name in ("recipes", "other_recipes")
    )
    assert (len(texts), len(others)) == (8, 8)
    assert not set(texts) & set(others)
    found = adaptation.adapt(run, texts)
    judged = [adaptation.Text(text) for text in others]
    before, after = (
        adaptation.log_likelihoods(run, offsets, judged) for offsets in (run.offsets, found.offsets)
    )
    assert (after > before).all()
    assert (after - before).mean() > 0.2


@pytest.mark.parametrize(("folder", "name"), [("news", "classification"), ("reviews", "sentiment")])
def test_labelled_lines_are_of_the_task_and_in_one_file_only(folder, name):
    config = parse_config(load_config("smollm2"))
    task, source = config.task(name), config.data.sources[name]
    drawn = {
        part: [
            example_of(task, row, source)
            for row in file_rows(ROOT / "examples" / folder / f"{part}.jsonl")
        ]
        for part in ("examples", "heldout")
    }
    assert {part: len(examples) for part, examples in drawn.items()} == {
        "examples": 32,
        "heldout": 100,
    }
    for examples in drawn.values():
        labels = Counter(example.columns["label"] for example in examples)
        assert labels == dict.fromkeys(source.label_names, len(examples) // len(labels))
    texts = [example.prompt for examples in drawn.values() for example in examples]
    assert len(set(texts)) == 132
