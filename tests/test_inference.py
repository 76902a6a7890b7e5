"""``adapt.py``: what it prints and saves, the report's tables, and mistakes with one sentence."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from grpocem_jax import adaptation
from grpocem_jax.adaptation import LIBRARY, Text, tables
from grpocem_jax.adaptation import command as inference
from grpocem_jax.builtin.data import LABELS
from grpocem_jax.config import parse_config
from grpocem_jax.runs import checkpoints
from grpocem_jax.search import loop
from grpocem_jax.tasks import SourceConfig, Task, example_of
from grpocem_jax.tasks.rows import file_rows
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from tests.command_line import TINY
from tests.runs import (
    OTHER,
    PROMPT,
    REWARD,
    ROOT,
    SMALL,
    no_search,
    question_examples,
    random_offsets,
    thin_config,
    thin_model,
    thin_policy,
    write_run,
)

pytestmark = pytest.mark.usefixtures("one_policy")

RESULT_KEYS = {
    "fitness_before", "fitness_after", "generations", "candidates", "converged", "adapted",
    "returned", "seconds", "compile_seconds", "text_before", "text_after",
}  # fmt: skip
EXAMPLES = [
    {"prompt": PROMPT, "completion": " negative"},
    {"prompt": OTHER, "completion": " negative and bad"},
    {"prompt": "Review: The tea was warm.\nSentiment:", "completion": " positive"},
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("run"), settings=thin_config()))


@pytest.fixture
def adapt(workdir, capsys):
    """The command without a process of its own: its result, stdout and stderr."""

    def call(changes=(), **flags):
        result = inference.run(thin_config(**dict(changes)), **{"workdir": workdir, **flags})
        return result, *capsys.readouterr()

    return call


def small_flags(workdir):
    small = {"model.source": thin_model(), **SMALL}
    settings = [f"--config.{name}={value}" for name, value in small.items()]
    return [TINY, "--workdir", workdir, *settings]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Results


def test_the_command_with_json_prints_one_object_and_its_progress_on_stderr(workdir):
    """In a process of its own, with the prompt on standard input."""
    # Of no other test, so that there is something to compile.
    flags = [*small_flags(workdir), "--config.cem.noise_std=0.11", "--json"]
    result = subprocess.run(
        [sys.executable, "adapt.py", *flags],
        cwd=ROOT,
        capture_output=True,
        input=f"{PROMPT}\n".encode(),
        check=False,
    )
    err = result.stderr.decode()
    assert result.returncode == 0, err
    (line,) = result.stdout.decode().splitlines()
    record = json.loads(line)
    assert record.keys() >= RESULT_KEYS
    assert record["prompt"] == PROMPT
    assert record["generations"] == 2
    # 8 for each half and, where they agree, for all.
    assert record["candidates"] == 8 * (3 if record["adapted"] else 2)
    assert record["adapted"] == (record["returned"] != "start")
    assert record["seconds"] > 0
    assert record["compile_seconds"] > 0
    assert isinstance(record["text_before"], str)
    assert "generation 2/2" in err
    assert f"model     folder {thin_model()}, " in err
    assert "Traceback" not in err


def test_the_text_before_and_after_is_printed(adapt):
    result, out, err = adapt(prompt=PROMPT)
    lines = out.splitlines()
    search = f"search    2 generations, {24 if result['adapted'] else 16} candidates"
    for start in ("fitness ", search, "result ", "prompt "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert sum(line.startswith("before   >") for line in lines) == 1
    assert sum(line.startswith(("after    >", "after     the same")) for line in lines) == 1
    assert "prompt    Review: The soup was cold.\\nSentiment:" in lines
    assert "generation 2/2" in err


def test_the_text_is_that_of_the_python_functions(adapt, workdir):
    result, out, _ = adapt(prompt=PROMPT)
    run = adaptation.load_run(workdir)
    found = adaptation.adapt(run, PROMPT)
    assert result["fitness_before"] == found.fitness_before
    assert result["fitness_after"] == found.fitness_after
    assert [result["text_before"]] == adaptation.complete(run, run.offsets, [PROMPT])
    assert [result["text_after"]] == adaptation.complete(run, found.offsets, [PROMPT])
    assert result["returned"] in ("mean", "start")
    assert f"{found.fitness_before:.3f} before, {found.fitness_after:.3f} after" in out


def test_without_a_run_adapting_starts_from_the_base_model(adapt):
    result, _, err = adapt(workdir=None, prompt=PROMPT)
    config = parse_config(thin_config())
    policy, _ = thin_policy()
    found = adaptation.adapt(adaptation.TrainedRun(config, policy, policy.zero), PROMPT)
    assert result["fitness_before"] == found.fitness_before
    assert result["fitness_after"] == found.fitness_after
    assert "run       none; adapting starts from the base model" in err


REVIEWS = [
    {"text": "The soup was cold.", "label": "negative"},
    {"text": "The waiter was kind.", "label": "positive"},
    {"text": "The tea was warm and good.", "label": 0},
    {"text": "A bad and noisy room.", "label": "negative"},
]


def test_rows_of_a_task_are_adapted_to_by_their_references_and_judged_by_right_answers(
    adapt, workdir, tmp_path
):
    examples = write_rows(tmp_path / "examples.jsonl", REVIEWS)
    judges = write_rows(tmp_path / "heldout.jsonl", REVIEWS[1:])
    changes = {"search.task": "sentiment", "search.gate": False}
    result, out, _ = adapt(changes, examples=examples, heldout=judges)
    run = adaptation.load_run(workdir, thin_config(**changes))
    texts = [
        Text(f"Review: {row['text']}\nSentiment:", f" {row['label'] or LABELS['sentiment'][0]}")
        for row in REVIEWS
    ]
    found = adaptation.adapt(run, texts)
    assert result["fitness_before"] == found.fitness_before
    assert result["fitness_after"] == found.fitness_after
    for when, offsets in (("before", run.offsets), ("after", found.offsets)):
        likelihoods = adaptation.log_likelihoods(run, offsets, texts[1:])
        assert result[f"heldout_{when}"] == pytest.approx(likelihoods.mean(), abs=1e-6)
        said = adaptation.complete(run, offsets, [text.prompt for text in texts[1:]])
        named = [re.search("|".join(LABELS["sentiment"]), one) for one in said]
        right = [
            found is not None and found.group() == text.completion.strip()
            for found, text in zip(named, texts[1:], strict=True)
        ]
        assert result[f"heldout_accuracy_{when}"] == pytest.approx(np.mean(right))
    assert f"{result['heldout_accuracy_before']:.1%} right before" in out


def test_rows_of_text_stay_texts_where_a_task_is_named(adapt, tmp_path):
    file = write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in REVIEWS])
    result, *_ = adapt({"search.task": "sentiment"}, examples=file)
    plain, *_ = adapt(examples=file)
    assert result["fitness_before"] == plain["fitness_before"]


@pytest.mark.parametrize("fitness", ["likelihood", "reward"])
def test_every_line_with_a_number_of_the_search_names_its_unit(adapt, tmp_path, fitness):
    rows = [example.columns for example in question_examples()]
    texts = EXAMPLES if fitness == "likelihood" else rows
    file = write_rows(tmp_path / "rows.jsonl", texts)
    changes = REWARD if fitness == "reward" else {"search.gate": False}
    result, out, err = adapt(changes, examples=file, heldout=file)
    unit = {"likelihood": "nats/token", "reward": "reward"}[fitness]
    assert result["fitness_unit"] == unit
    words = {"likelihood": "log-likelihood, nats per token", "reward": "mean reward"}
    lines = [line for line in out.splitlines() if line.startswith(("fitness", "held"))]
    endings = tuple(f"({word})" for word in words.values())
    assert all(line.endswith(endings) for line in lines)
    (own,) = [line for line in lines if line.startswith("fitness")]
    assert own.endswith(f"({words[fitness]})")
    generations = [line for line in err.splitlines() if "generation " in line]
    assert generations
    assert all(f"({unit})" in line for line in generations)
    held = [line for line in lines if line.startswith("held out")]
    assert sum(words["likelihood"] in line for line in held) == 1
    assert sum(words["reward"] in line for line in held) == (fitness == "reward")


def test_held_out_rows_of_a_task_are_judged_by_its_reward_and_texts_by_likelihood(adapt, tmp_path):
    rows = [example.columns for example in question_examples()]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    changes = {**REWARD, "search.gate": False, "train.eval_samples": 2}
    result, _, _ = adapt(changes, examples=file, heldout=file)
    low, high = result["heldout_reward_gain_ci95"]
    gain = result["heldout_reward_after"] - result["heldout_reward_before"]
    assert low <= gain <= high
    assert -1 <= result["heldout_reward_before"] <= 1
    assert result["heldout_before"] < 0
    result, _, _ = adapt(
        changes, examples=file, heldout=write_rows(tmp_path / "texts.jsonl", [{"text": OTHER}])
    )
    assert result["heldout_before"] < 0
    assert "heldout_reward_before" not in result


def test_a_completion_that_stays_the_same_is_called_unchanged(adapt, monkeypatch):
    for same in (True, False):
        texts = iter([" soup", " soup" if same else " tea"])
        monkeypatch.setattr(adaptation, "complete", lambda run, a, p, texts=texts: [next(texts)])
        _, out, _ = adapt(prompt=PROMPT)
        assert ("after     the same completion, unchanged" in out) == same
        assert ("after    > tea" in out) != same


def test_several_prompts_end_with_what_came_of_them_together(adapt, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [{"text": PROMPT}, {"text": OTHER}])
    result, out, _ = adapt({"search.gate": False}, prompts=file)
    results, summary = result["results"], result["summary"]
    assert (summary["prompts"], summary["adapted"]) == (2, 2)
    gains = [one["fitness_after"] - one["fitness_before"] for one in results]
    assert summary["mean_gain"] == pytest.approx(sum(gains) / 2)
    assert summary["seconds"] == pytest.approx(sum(one["seconds"] for one in results))
    assert summary["changed"] == sum(one["text_before"] != one["text_after"] for one in results)
    last = out.splitlines()[-1]
    assert f"2 of 2 prompts adapted, mean gain {sum(gains) / 2:+.3f} (log-likelihood, nats" in last
    # One prompt needs none.
    one = write_rows(tmp_path / "one.jsonl", [{"text": PROMPT}])
    assert "in all" not in adapt(prompts=one)[1]


def test_one_search_for_many_prompts_is_described_once(adapt, tmp_path):
    examples = write_rows(tmp_path / "examples.jsonl", EXAMPLES)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"text": PROMPT}, {"text": OTHER}])
    changes = {"search.method": "gradient", "search.gate": False}
    _, out, _ = adapt(changes, examples=examples, prompts=prompts)
    lines = out.splitlines()
    assert sum(line.startswith("search ") for line in lines) == 1
    assert sum(line.startswith("prompt ") for line in lines) == 2


def test_a_long_generation_shows_how_long_it_is_under_way(capsys, monkeypatch):
    changes = {"search.generations": 20, "search.gate": False}
    settings = parse_config(thin_config(**changes)).search
    monkeypatch.setattr(inference._LiveView, "interval_s", (0.01, 0.01))
    with inference._LiveView("examples", settings):
        time.sleep(0.1)
    assert "examples  under way for 0 s, compilation included" in capsys.readouterr().err
    view = inference._LiveView("examples", settings)
    history = loop.History(*(np.float32([value]) for value in (-2.0, -3.0, 0.1, 0.0)))
    view.show(4, history)
    view.started = view.reported - 40.0
    said = view.under_way(view.reported + 7.0)
    # 4 generations in 40 s.
    start = "examples  7 s since generation 4/20, at about 10 s for each  best -2.000"
    assert said.startswith(start)
    assert said.endswith("mean -3.000 (nats/token)  sigma 0.100")


def test_searches_by_halves_and_by_all_are_told_apart(capsys):
    settings = parse_config(thin_config(**{"search.generations": 4})).search
    view = inference._LiveView("examples", settings)
    history = loop.History(*(np.float32([value]) for value in (-2.0, -3.0, 0.1, 0.0)))
    for done in (2, 4):
        view.show(done, history)
    view.reported -= 40.0
    view.show(2, history)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("examples  by halves  generation 2/4  best -2.000")
    assert second.startswith("examples  by halves  generation 4/4")
    assert third.startswith("examples  by all  generation 2/4")
    # What was spent on the halves is no measure of the rest.
    assert "at about 20 s for each" in view.under_way(view.reported)


def test_a_prompt_that_the_gate_cannot_judge_says_so(adapt, monkeypatch):
    monkeypatch.setattr(adaptation, "complete", lambda run, offsets, prompts: [" soup"])
    result, out, _ = adapt(prompt="Review: The")
    assert result["note"]
    assert f"not adapted: {result['note']}" in out
    assert "before   > soup" in out


def test_each_prompt_of_a_file_has_a_result(adapt, tmp_path):
    prompts = [PROMPT, OTHER]
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": PROMPT}, {"text": OTHER}])
    _, out, err = adapt(prompts=file, as_json=True)
    (line,) = out.splitlines()
    results = json.loads(line)["results"]
    assert [result["prompt"] for result in results] == prompts
    assert all(result.keys() >= RESULT_KEYS for result in results)
    assert results[0]["fitness_before"] != results[1]["fitness_before"]
    assert "prompt 1/2  by halves  generation" in err
    assert "prompt 2/2  by halves  generation" in err


def test_each_line_of_a_text_file_is_a_prompt(adapt, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "complete", lambda run, offsets, prompts: ["."])
    file = tmp_path / "prompts.txt"
    file.write_text("Review: The soup was cold.\n\nReview: The tea was warm.\n")
    result, out, _ = adapt(prompts=str(file))
    prompts = ["Review: The soup was cold.", "Review: The tea was warm."]
    assert [one["prompt"] for one in result["results"]] == prompts
    for prompt in prompts:
        assert f"prompt    {prompt}\n" in out


def test_standard_input_is_the_prompt_where_no_flag_gives_one(adapt, monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    result, _, _ = adapt(as_json=True)
    assert result["prompt"] == PROMPT


@pytest.mark.parametrize("text", [PROMPT, f"{PROMPT}\n", "\n A\r\nb\t\n\n", "\ufeffa \u2028b"])
def test_a_prompt_has_the_same_characters_by_every_way_and_as_a_training_prompt(
    adapt, tmp_path, monkeypatch, text
):
    """All of a flag and of a string in a file; standard input and text files have line ends."""
    monkeypatch.setattr(adaptation, "complete", lambda run, offsets, prompts: ["."])
    monkeypatch.setattr(adaptation, "adapt", lambda run, text, **_: unchanged(run))
    rows = [{"prompt": text}, {"text": text}]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    assert adapt(prompt=text)[0]["prompt"] == text
    assert [one["prompt"] for one in adapt(prompts=file)[0]["results"]] == [text, text]
    source = SourceConfig(source=str(tmp_path))
    task = Task("own", {}, "{prompt}", (), own=True)
    examples = [example_of(task, row, source) for row in file_rows(Path(file))[:1]]
    assert [example.prompt for example in examples] == [text]
    run = adaptation.TrainedRun(*thin_policy()[::-1], None)
    assert [one.prompt for one in inference._texts(run, Path(file))] == [text, text]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\n", "a"),
        (b"a", "a"),
        (b"a\r\n", "a"),
        (b"\xef\xbb\xbfa \n", "a "),
        (b"a\n\n", "a\n"),
        (b"\n a\r\nb\rc\n", "\n a\nb\nc"),
        ("é\u2028\ufeff\n".encode(), "é\u2028\ufeff"),
    ],
)
def test_standard_input_loses_its_byte_order_mark_and_the_end_of_its_last_line(
    adapt, monkeypatch, content, text
):
    monkeypatch.setattr(adaptation, "complete", lambda run, offsets, prompts: ["."])
    given = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(adaptation, "adapt", lambda run, text, **_: unchanged(run))
    result, _, _ = adapt(as_json=True)
    assert result["prompt"] == text


def unchanged(run):
    return adaptation.Adaptation(run.offsets, 0.0, 0.0, None, "left alone")


def test_examples_are_adapted_to_together_and_heldout_texts_judge(adapt, tmp_path, workdir):
    examples = write_rows(tmp_path / "examples.jsonl", EXAMPLES)
    judged = [{"text": OTHER}, {"prompt": PROMPT, "completion": " positive"}]
    heldout = write_rows(tmp_path / "heldout.jsonl", judged)
    saved = tmp_path / "saved" / "adapter"
    changes = {"search.method": "gradient", "search.gate": False}
    result, out, err = adapt(
        changes, examples=examples, heldout=heldout, prompt=PROMPT, save=str(saved)
    )
    assert result.keys() >= RESULT_KEYS | {"heldout_before", "heldout_after"}
    assert "examples  generation 2/2" in err
    assert f"adapter saved in {saved}" in err
    assert f"held out  {result['heldout_before']:.3f} before, " in out
    # What was saved is the adapter that was judged.
    run = adaptation.load_run(workdir)
    adapted = checkpoints.load_adapter(
        saved, run.policy.zero, base_sha256=run.policy.pretrained.sha256
    )
    texts = [Text(OTHER), Text(PROMPT, " positive")]
    for when, offsets in (("before", run.offsets), ("after", adapted)):
        values = adaptation.log_likelihoods(run, offsets, texts)
        assert result[f"heldout_{when}"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert result["heldout_before"] != result["heldout_after"]
    # A saved adapter is one to adapt again.
    checkpoints.copy_adapter(saved, tmp_path / "again" / "adapter")
    again = adaptation.load_run(tmp_path / "again", thin_config())
    for name, value in adapted.items():
        np.testing.assert_array_equal(again.offsets[name], value)


def test_examples_alone_need_no_prompt(adapt, tmp_path):
    examples = write_rows(tmp_path / "examples.jsonl", EXAMPLES)
    changes = {"search.method": "gradient", "search.gate": False}
    result, out, _ = adapt(changes, examples=examples)
    assert result["text_before"] is None
    assert result["text_after"] is None
    assert "before   >" not in out


def test_examples_with_the_columns_of_a_task_are_adapted_to_for_its_reward(adapt, tmp_path):
    rows = [example.columns for example in question_examples()]
    assert rows[0].keys() == {"context", "question", "answers"}
    examples = write_rows(tmp_path / "questions.jsonl", rows)
    result, _, err = adapt(REWARD, examples=examples, as_json=True)
    assert -1 <= result["fitness_before"] <= 1
    assert -1 <= result["fitness_after"] <= 1
    assert result["candidates"] == 2 * 4 * result["generations"]
    assert "on the reward" in err


@pytest.mark.parametrize("support", [0, 2])
def test_evaluate_gives_the_tables_of_the_report(adapt, workdir, support):
    changes = {
        "search.support": support,
        "search.buckets": (64,),
        "data.tasks": ("sentiment", "general"),
        "data.heldout_samples": 2,
        "data.max_samples": 4,
        "train.eval_batch_size": 4,
        "train.eval_samples": 2,
    }
    result, out, err = adapt(changes, evaluate=True, as_json=True)
    (line,) = out.splitlines()
    tabled = {"heldout", "heldout_greedy", "adaptation", "convergence", "cem"}
    assert json.loads(line).keys() == tabled
    assert json.loads((Path(workdir) / "evaluation.json").read_text()) == json.loads(line)
    assert (Path(workdir) / "report" / "cem_convergence.png").is_file()
    assert len(result["convergence"]["best"]) == 2
    assert 0 < result["convergence"]["running"][0] <= (2 if support else 4)
    assert result["convergence"]["best"][0] >= result["convergence"]["mean"][0]
    for table in ("heldout", "heldout_greedy"):
        assert list(result[table]) == ["sentiment", "general", "overall"]
        assert result[table]["overall"]["n"] == 4
        for gain in result[table].values():
            assert gain["gain"] == pytest.approx(gain["after"] - gain["before"])
    assert list(result["adaptation"]) == ["sentiment", "general"]
    for name, row in result["adaptation"].items():
        # One search for each prompt, or one for all prompts of the task.
        assert row["searches"] == (1 if support else 2)
        assert 0 <= row["adapted"] <= 1
        assert row["candidates"] == 2 * 4 * row["generations"]  # each half is searched
        # Open-ended text has no reference completion.
        assert ("heldout_before" in row) == ("heldout_after" in row) == (name == "sentiment")
    assert f"searches {2 if support else 4}/{2 if support else 4}" in err
    shown = tables.show(result, parse_config(thin_config(**changes)))
    assert "sampled at T=1" in shown
    assert "no reference" in shown


# Mistakes


@pytest.fixture
def refused(adapt, monkeypatch):
    """The sentence with which the command ends, before any search."""
    monkeypatch.setattr(loop, "maximize", no_search)

    def call(changes=(), **flags):
        with pytest.raises(InputError) as error:
            adapt(changes, **flags)
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


@pytest.mark.parametrize(
    ("changes", "flags", "fragment"),
    [
        ({"search.buckets": (8,)}, {"prompt": PROMPT}, "longer than the limit of 8"),
        ({"cem.population_size": 1}, {"prompt": PROMPT}, "cem.population_size=1"),
        (
            {"cem.population_size": 2, "cem.elite_ratio": 0.3},
            {"prompt": PROMPT},
            "leaves no elite",
        ),
        ({"cem.noise_std": -0.1}, {"prompt": PROMPT}, "cem.noise_std=-0.1"),
        ({"search.budget_s": 0.0}, {"prompt": PROMPT}, "search.budget_s=0.0"),
        ({"search.gate_z": -1.0}, {"prompt": PROMPT}, "search.gate_z=-1.0"),
        ({"search.space": "experts", "search.experts": ""}, {"prompt": PROMPT}, "search.experts"),
        (
            {"search.space": "experts", "search.experts": "/no"},
            {"prompt": PROMPT},
            "search.experts='/no'",
        ),
        (
            {"model.source": "builtin", "search.space": "subspace", "search.rank": 400},
            {"workdir": None, "prompt": PROMPT},
            "search.rank=400",
        ),
        ({"search.fitness": "reward"}, {"examples": __file__}, "config.search.task=''"),
        ({**REWARD, "search.task": "qu"}, {"prompt": PROMPT}, "did you mean 'qa'"),
        ({**REWARD, "search.method": "gradient"}, {"prompt": PROMPT}, "a reward has no gradient"),
        (REWARD, {"prompt": PROMPT}, "needs --examples"),
        (REWARD, {"evaluate": True}, "config.search.support=0"),
        (
            {"generation.max_new_tokens": 100},
            {"evaluate": True},
            "generation.max_new_tokens=100 make 164 tokens",
        ),
        ({}, {"prompt": PROMPT, "prompts": "a.txt"}, "--prompt and --prompts"),
        ({}, {"prompt": PROMPT, "evaluate": True}, "leave out --prompt"),
        ({}, {"prompts": "a.txt", "evaluate": True}, "leave out --prompts"),
        ({}, {"examples": "a.txt", "evaluate": True}, "leave out --examples"),
        ({}, {"save": "folder", "evaluate": True}, "leave out --save"),
        ({}, {"prompts": "a.txt", "save": "folder"}, "--save needs one adapter"),
    ],
)
def test_mistakes_are_named_before_a_search(refused, changes, flags, fragment):
    assert fragment in refused(changes, **flags)


@pytest.mark.parametrize(
    "row",
    [{"completion": " negative"}, {"text": ""}, {"text": 3}, {"prompt": PROMPT, "completion": 3}],
)
def test_a_row_without_text_is_named(refused, tmp_path, row):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": PROMPT}, row])
    assert "rows.jsonl, line 2 has no text" in refused(examples=file)


def test_a_row_without_the_tasks_columns_is_named(refused, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": PROMPT}])
    assert "'context', a column that" in refused(REWARD, examples=file)


def test_a_prompt_that_cannot_be_adapted_to_is_named_before_the_others_are(refused, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"Review: The soup was cold.\n{'cold ' * 200}\n")
    assert "longer than the limit" in refused(prompts=str(file))


def test_an_adapter_of_another_model_is_refused(refused, tmp_path):
    folder = write_run(tmp_path, settings=thin_config(), base_sha256="0" * 64, base_model="another")
    assert "was trained on 'another'" in refused(workdir=str(folder), prompt=PROMPT)


def test_an_adapter_of_another_shape_is_refused(refused, workdir, tmp_path):
    zero = adaptation.load_run(workdir).policy.zero
    short = {name: value[:-1] for name, value in random_offsets(zero).items()}
    folder = write_run(tmp_path, settings=thin_config(), offsets=short)
    assert "has shape (101,) there and (102,) here" in refused(workdir=str(folder), prompt=PROMPT)


def test_a_library_of_nine_experts_is_refused(refused, tmp_path):
    for number in range(9):
        shutil.copytree(LIBRARY / "qa", tmp_path / f"expert{number}")
    changes = {"search.space": "experts", "search.experts": str(tmp_path)}
    assert "holds 9 experts; at most 8" in refused(changes, prompt=PROMPT)


# Mistakes beside examples and held-out texts


@pytest.mark.parametrize("prompt", ["", "  ", PROMPT * 20])
def test_a_prompt_beside_examples_is_refused_before_the_search(refused, tmp_path, prompt):
    examples = write_rows(tmp_path / "examples.jsonl", EXAMPLES)
    assert refused({"search.gate": False}, examples=examples, prompt=prompt)


def test_a_prompt_that_leaves_no_room_is_adapted_to_and_not_completed(adapt):
    # The context is 128.
    result, out, _ = adapt({"generation.max_new_tokens": 120}, prompt=PROMPT)
    assert (result["text_before"], result["text_after"]) == (None, None)
    assert result["generations"] == 2
    assert "no room for a completion" in out


def test_a_prompt_of_one_token_is_completed_and_left_alone(adapt, tmp_path):
    result, out, _ = adapt(prompt="Review", save=str(tmp_path / "saved"))
    assert (result["fitness_before"], result["returned"]) == (None, "start")
    assert result["text_before"] == result["text_after"] != ""
    assert "not adapted: a single token has no likelihood" in out
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "0 candidates in 0 generations." in card


def test_files_that_are_there_are_not_saved_over(refused, tmp_path):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert "holds README.md already" in refused(prompt=PROMPT, save=str(tmp_path))


def test_an_adapter_made_with_other_settings_is_refused(refused):
    changes = {"adapter.tail": "drop"}
    assert "tail='keep', but config.adapter has 'drop'" in refused(changes, prompt=PROMPT)


def test_a_heldout_text_that_cannot_judge_is_refused_before_the_search(refused, tmp_path):
    heldout = write_rows(tmp_path / "heldout.jsonl", [{"text": "Review"}])
    assert "is one token" in refused(prompt=PROMPT, heldout=heldout)


def test_a_folder_that_cannot_be_saved_in_is_refused_before_the_search(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "--save" in refused(prompt=PROMPT, save=str(tmp_path / "file"))


@pytest.mark.parametrize("flags", [{"prompt": PROMPT, "save": "saved"}, {"evaluate": True}])
def test_a_disk_that_is_full_is_said(flags, adapt, workdir, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*args, **options):
        raise full

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "save_file", refuse)
    monkeypatch.setattr(inference, "_evaluate", lambda run: {})
    monkeypatch.setattr(inference.tables, "show", lambda tables, config: "")
    monkeypatch.setattr(files.Path, "write_bytes", refuse)
    where = f"--workdir={workdir}" if "evaluate" in flags else "--save=saved"
    with pytest.raises(InputError, match=f"{where}: cannot be written .No space left on device"):
        adapt(**flags)
