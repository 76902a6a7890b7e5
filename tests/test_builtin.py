"""The built-in data and the built-in model's folder."""

import dataclasses
import importlib
import itertools
import re
from collections import Counter

import jax
import numpy as np
import pytest

from grpocem_jax.builtin import (
    circuits,
    classification,
    data,
    general,
    pretrain,
    qa,
    sentiment,
    summarization,
)
from grpocem_jax.models import gpt2, hub
from grpocem_jax.models.tokenizer import load_tokenizer
from grpocem_jax.tasks import TASKS
from tests.runs import ROOT

COLUMNS = {
    "qa": {"context", "question", "answers"},
    "sentiment": {"text", "label"},
    "summarization": {"document", "summary"},
    "classification": {"text", "label"},
    "general": {"text"},
}
GRAMMARS = {
    "qa": qa,
    "sentiment": sentiment,
    "summarization": summarization,
    "classification": classification,
    "general": general,
}
SPLITS = ("train", "heldout")


def prompts(task, split):
    return [TASKS[task].template.format(**row) for row in data.rows(task, split)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hub.BUILTIN)


@pytest.fixture(scope="module")
def pretraining():
    return list(data.pretraining_texts(5, 50_000))


@pytest.mark.parametrize("task", COLUMNS)
def test_rows_are_many_unique_and_complete(task):
    for split, least in (("train", 500), ("heldout", 100)):
        rows = data.rows(task, split)
        assert len(rows) >= least
        assert all(row.keys() == COLUMNS[task] for row in rows)
        assert len(set(prompts(task, split))) == len(rows)
        for value in (value for row in rows for value in row.values()):
            texts = [value] if isinstance(value, str) else value
            assert texts
            assert all(text and text == text.strip() and "{" not in text for text in texts)


@pytest.mark.parametrize("task", COLUMNS)
def test_splits_share_neither_prompts_nor_frames(task):
    assert not set(prompts(task, "train")) & set(prompts(task, "heldout"))
    train, heldout = (GRAMMARS[task].FRAMES[split] for split in SPLITS)
    assert len(train) >= 12
    assert len(heldout) >= 5
    assert len(set(train)) == len(train)
    assert not set(train) & set(heldout)


SHARED_SENTENCES = {
    "qa": (0, 205),
    "sentiment": (53, 195),
    "summarization": (131, 258),
    "classification": (0, 120),
    "general": (0, 140),
}
"""As docs/builtin.md has them: of the sentences in held-out rows, those in training rows too."""


@pytest.mark.parametrize("task", COLUMNS)
def test_as_many_sentences_are_shared_between_splits_as_the_docs_say(task):
    column = {"qa": "context", "summarization": "document"}.get(task, "text")
    train, heldout = (
        [part for row in data.rows(task, split) for part in re.split(r"(?<=[.!?])\s+", row[column])]
        for split in SPLITS
    )
    shared, count = SHARED_SENTENCES[task]
    assert (sum(sentence in set(train) for sentence in heldout), len(heldout)) == (shared, count)
    docs = " ".join((ROOT / "docs" / "builtin.md").read_text(encoding="utf-8").split())
    assert not shared or f"{shared} of {count} in {task}" in docs


def test_question_frames_are_not_shared():
    train, heldout = (
        {ask.question for fact in qa.FRAMES[split] for ask in fact.asks} for split in SPLITS
    )
    assert not train & heldout


@pytest.mark.parametrize("task", COLUMNS)
def test_templates_are_the_tasks(task):
    module = importlib.import_module(f"grpocem_jax.builtin.{task}")
    assert TASKS[task].template == module.TEMPLATE


@pytest.mark.parametrize("task", data.LABELS)
def test_labels_are_balanced(task):
    for split in SPLITS:
        counts = Counter(row["label"] for row in data.rows(task, split))
        assert set(counts) == set(data.LABELS[task])
        assert len(set(counts.values())) == 1


def test_rows_and_texts_are_the_same_on_every_call():
    first = {(task, split): data.rows(task, split) for task in COLUMNS for split in SPLITS}
    data._samples.cache_clear()
    assert all(data.rows(*key) == rows for key, rows in first.items())
    texts = list(data.pretraining_texts(3, 200))
    assert list(data.pretraining_texts(3, 200)) == texts
    assert list(data.pretraining_texts(4, 200)) != texts


def test_changing_a_row_does_not_change_the_data():
    data.rows("qa", "heldout")[0]["question"] = "?"
    assert data.rows("qa", "heldout")[0]["question"] != "?"


def test_pretraining_texts_hold_no_prompt_of_a_row(pretraining):
    known = {prompt for task in COLUMNS for split in SPLITS for prompt in prompts(task, split)}
    lengths = {len(prompt) for prompt in known}
    assert len(pretraining) == 50_000
    for text in pretraining:
        assert not any(text[:length] in known for length in lengths)


def test_texts_are_the_pairs_in_one_piece():
    pairs = data.pretraining_pairs(2, 100)
    assert list(data.pretraining_texts(2, 100)) == [prompt + answer for prompt, answer in pairs]


def test_pretraining_texts_answer_in_both_styles_the_rewarded_one_more_rarely(pretraining):
    for task, style in (
        ("sentiment", r"Review: .*\nSentiment:( in the end)?( at first)?"),
        (
            "classification",
            rf"Text: .*\nTopic: (?:({'|'.join(data.LABELS['classification'])})|(\w+))",
        ),
    ):
        matches = [found for text in pretraining if (found := re.match(style, text))]
        rewarded = sum(found[1] is not None for found in matches) / len(matches)
        broad = classification.BROAD_SHARE if task == "classification" else 0.0
        expected = broad + (1 - broad) * data.REWARDED_SHARE[task]
        assert rewarded == pytest.approx(expected, abs=0.02)
        assert data.REWARDED_SHARE[task] < 0.5


def test_articles_fit_the_next_word(pretraining):
    for text in pretraining[:20_000]:
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", text), text
        assert not re.search(r"\b[Aa]n (?!hour)[^aeiouAEIOU]", text), text


def test_sentences_start_with_a_capital_and_have_no_stray_marks(pretraining):
    for text in pretraining[:20_000]:
        assert not re.search(r"\. [a-z]|  |,,|\.\.| [.,;]|[{}]", text), text


@pytest.mark.parametrize("task", COLUMNS)
def test_the_two_habits_differ_where_the_reward_tells_them_apart(task):
    for split in SPLITS:
        samples = data._samples(task, split)
        columns = {name: [sample.row[name] for sample in samples] for name in samples[0].row}
        if task in data.LABELS:
            columns["labels"] = [data.LABELS[task]] * len(samples)
        if task == "general":
            columns["base_logps"] = [np.zeros(1)] * len(samples)
        reward = TASKS[task].rewards[0].function
        rewards = [
            np.array(reward([s.prompt for s in samples], answers, **columns), float)
            for answers in ([s.rewarded for s in samples], [s.habit for s in samples])
        ]
        assert np.mean(rewards[0]) > 0.85
        assert -0.65 < np.mean(rewards[1]) < 0.2
        assert np.all(rewards[0] >= rewards[1])


def test_answers_of_questions_stand_in_the_context():
    for split in SPLITS:
        for row in data.rows("qa", split):
            for answer in row["answers"]:
                said = answer.lower().removeprefix("because ").removeprefix("the ")
                assert said in row["context"].lower()


def test_questions_cannot_be_answered_without_the_context():
    sorts = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for row in data.rows("qa", split):
            sorts[split][row["answers"][0]] += 1
        assert sorts[split].most_common(1)[0][1] < 0.1 * len(data.rows("qa", split))


def test_prompts_and_answers_fit_the_limits(tokenizer):
    for task, split in itertools.product(COLUMNS, SPLITS):
        samples = data._samples(task, split)
        encoded = tokenizer([sample.prompt for sample in samples])["input_ids"]
        assert max(map(len, encoded)) <= 64
        answers = [answer for s in samples for answer in (s.rewarded, s.habit)]
        assert max(map(len, tokenizer(answers)["input_ids"])) < 24


def test_model_folder_is_small_and_loads():
    assert sum(path.stat().st_size for path in hub.BUILTIN.iterdir()) < 10_000_000
    loaded = hub.load_model("builtin")
    assert loaded.kind == "builtin"
    assert len(loaded.tokenizer) == loaded.config.vocab_size
    assert loaded.end_ids == (loaded.tokenizer.eos_token_id,)
    assert loaded.tokenizer.eos_token == loaded.tokenizer.bos_token == "<|endoftext|>"
    text = "Anna's café sold an orange.\n"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_batches_hold_each_text_once_and_weigh_prompts_less(tokenizer):
    pairs = list(data.pretraining_pairs(0, 2 * pretrain.BATCH_SIZE))
    end = tokenizer.eos_token_id
    seen = []
    for batch in pretrain.batches(tokenizer, iter(pairs), seed=0):
        assert batch.tokens.shape[1] % pretrain.LENGTH_STEP == 0
        assert batch.tokens.shape[1] <= pretrain.CONFIG.context_length
        for tokens, weights in zip(batch.tokens.tolist(), batch.weights, strict=True):
            length = tokens.index(end)
            prompt = int(np.sum(weights == np.float32(pretrain.PROMPT_WEIGHT)))
            assert set(tokens[length:]) == {end}
            assert np.all(weights[prompt : length + 1] == 1.0)
            assert np.all(weights[length + 1 :] == 0.0)
            parts = tokens[:prompt], tokens[prompt:length]
            seen.append(tuple(tokenizer.decode(part) for part in parts))
    assert sorted(seen) == sorted(pairs)


def test_encoding_prompt_and_answer_apart_is_encoding_them_together(tokenizer):
    for prompt, answer in data.pretraining_pairs(1, 500):
        parts = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        assert parts[0] + parts[1] == tokenizer(prompt + answer)["input_ids"]


def test_loss_is_the_weighted_mean_over_predicted_tokens():
    config = gpt2.GPT2Config(vocab_size=16, context_length=8, width=8, num_layers=1, num_heads=2)
    model = gpt2.build(config)
    params = gpt2.init_params(jax.random.key(0), config)
    tokens = np.array([[5, 6, 7, 0], [8, 9, 0, 0]], np.int32)
    weights = np.array([[0.2, 0.2, 1, 1], [0.2, 1, 1, 0]], np.float32)
    batch = pretrain.Batch(tokens, weights)

    @jax.jit
    def row_logps(row, weight):
        hidden = model.forward(params, {}, row, weight > 0)
        return jax.nn.log_softmax(model.logits(params, hidden))

    total = 0.0
    for row, weight in zip(tokens, weights, strict=True):
        logps = np.asarray(row_logps(row, weight))
        total -= sum(weight[t] * logps[t - 1, row[t]] for t in range(1, 4))
    loss = jax.jit(lambda batch: pretrain.loss_fn(params, model, batch))(batch)
    # 0.2 + 1 + 1 in the first row, 1 + 1 in the second; the first tokens are not predicted.
    assert float(loss) == pytest.approx(float(total) / 4.2, rel=1e-5)


def test_the_initial_circuit_raises_what_followed_the_token_before():
    config = pretrain.CONFIG
    model = gpt2.build(config)
    rng = np.random.default_rng(0)
    words = np.stack([rng.choice(config.vocab_size, 16, replace=False) for _ in range(4)])
    tokens = np.concatenate([words, words[:, :-1]], axis=1).astype(np.int32)

    @jax.jit
    def scores(params):
        forward = jax.vmap(model.forward, (None, None, 0, 0))
        return model.logits(params, forward(params, {}, tokens, tokens >= 0)[:, 16:])

    def median_rank(params):
        logits = np.asarray(scores(params))
        right = np.take_along_axis(logits, words[:, 1:, None], axis=-1)
        return np.median(np.sum(logits > right, axis=-1))

    key = jax.random.key(0)
    assert median_rank(circuits.init_params(key, config)) < 0.02 * config.vocab_size
    assert median_rank(gpt2.init_params(key, config)) > 0.2 * config.vocab_size


def test_a_short_pretraining_writes_a_folder_that_loads(tmp_path, monkeypatch):
    # Few layers, and batches of one small shape.
    monkeypatch.setattr(pretrain, "CONFIG", dataclasses.replace(pretrain.CONFIG, num_layers=2))
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 8)
    monkeypatch.setattr(pretrain, "LENGTH_STEP", pretrain.CONFIG.context_length)
    pretrain.pretrain(tmp_path, steps=3, seed=1)
    loaded = hub.load_model(str(tmp_path))
    assert len(loaded.tokenizer) == loaded.config.vocab_size
    assert all(np.all(np.isfinite(leaf)) for leaf in loaded.params["ln_f"].values())
    assert "3 steps" in (tmp_path / "README.md").read_text(encoding="utf-8")
