"""The five tasks and their registry."""

from typing import Any

import pytest

from grpocem_jax import tasks

SAMPLES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "qa": (
        {"context": "Ann has {two} cats.", "question": "How many?", "answers": ["two", "2"]},
        "Ann has {two} cats.\nQuestion: How many?\nAnswer:",
        " Two.",
        " dogs",
    ),
    "sentiment": (
        {"text": "A joy.", "label": "positive", "labels": ("negative", "positive")},
        "Review: A joy.\nSentiment:",
        " Positive",
        " negative",
    ),
    "summarization": (
        {"document": "It rained. It rained all day.", "summary": ["It rained all day."]},
        "It rained. It rained all day.\nTL;DR:",
        " It rained all day",
        " sun",
    ),
    "classification": (
        {"text": "A cup final.", "label": "Sports", "labels": ("World", "Sports")},
        "Text: A cup final.\nTopic:",
        " sports",
        " World",
    ),
    "general": (
        {"text": "Once upon a time"},
        "Once upon a time",
        " there lived a small grey mouse in an old house by the sea.",
        "",
    ),
}


def test_the_five_tasks_are_registered_under_their_own_names():
    assert list(tasks.TASKS) == ["qa", "sentiment", "summarization", "classification", "general"]
    assert all(tasks.TASKS[name].name == name for name in tasks.TASKS)


@pytest.mark.parametrize("name", SAMPLES)
def test_prompt_and_reward_fit_together(name):
    task = tasks.TASKS[name]
    columns, prompt, good, bad = SAMPLES[name]
    assert task.template.format_map(columns) == prompt
    assert set(task.columns) == set(columns) - {"labels"}
    repeated = {column: [value, value] for column, value in columns.items()}
    if name == "general":
        repeated["base_logps"] = [[-1.0], [-1.0]]
    assert task.rewards[0].function([prompt, prompt], [good, bad], **repeated) == [1.0, -1.0]


def test_a_prompt_does_not_end_in_a_space():
    # GPT-2 writes the space before a word with the word; a prompt that has it already is foreign.
    assert all(not task.template.endswith(" ") for task in tasks.TASKS.values())


def test_general_rewards_the_process_as_well():
    process = tasks.TASKS["general"].process_reward
    assert process is not None
    steps = process(["Once upon"], ["a time. A dog"], base_logps=[[-1.0]])
    assert steps == [[(7, 1.0), (13, 0.0)]]


@pytest.mark.parametrize("name", SAMPLES)
def test_what_may_be_shortened_is_shown_in_the_prompt(name):
    task = tasks.TASKS[name]
    assert task.shorten is None or task.shorten in task.text_columns
    assert (name == "qa") == (task.shorten is None)
    assert task.is_free_text == (name == "general")
