"""The built-in data: rows for the five tasks, and the text that the tiny model is pretrained on.

Everything is generated from the grammars beside this file.  Held-out rows come from frames that
no training row uses.  The pretraining text knows all frames, as a pretrained model knows English,
but holds none of the rows' prompts; each of its prompts is answered in one of two coherent styles
at random, and the style that the task's reward prefers is the rarer one.
"""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

from grpocem_jax.builtin import classification, general, qa, sentiment, summarization
from grpocem_jax.builtin.grammar import Sample

LABELS: dict[str, tuple[str, ...]] = {
    "sentiment": sentiment.LABELS,
    "classification": classification.LABELS,
}
SPLITS = {"train": 500, "heldout": 120}
REWARDED_SHARE = {
    "qa": 0.4,
    "sentiment": 0.4,
    "summarization": 0.4,
    "classification": 0.4,
    "general": 0.4,
}
_SAMPLES: dict[str, Callable[[random.Random, str], Sample]] = {
    "qa": qa.sample,
    "sentiment": sentiment.sample,
    "summarization": summarization.sample,
    "classification": classification.sample,
    "general": general.sample,
}
# What the pretraining text is made of. Quizzes and notes ask for the same abilities as qa and
# sentiment, several times a text.
_MIXTURE = {
    "qa": 0.22,
    "sentiment": 0.10,
    "summarization": 0.10,
    "classification": 0.07,
    "general": 0.09,
    "quiz": 0.30,
    "notes": 0.09,
    "story": 0.03,
}


@functools.cache
def _samples(task: str, split: str) -> tuple[Sample, ...]:
    rng = random.Random(f"{task}/{split}")
    labels = LABELS.get(task, ())
    quota = dict.fromkeys(labels, SPLITS[split] // max(len(labels), 1))
    kept: dict[str, Sample] = {}
    while len(kept) < SPLITS[split]:
        sample = _SAMPLES[task](rng, split)
        if sample.prompt in kept:
            continue
        if labels:
            if not quota[sample.row["label"]]:
                continue
            quota[sample.row["label"]] -= 1
        kept[sample.prompt] = sample
    return tuple(kept.values())


def rows(task: str, split: str) -> list[dict[str, Any]]:
    """The rows of a task: 500 for training or 120 held out, unique, the same on every call.

    Args:
      task: "qa", "sentiment", "summarization", "classification" or "general".
      split: "train" or "heldout".

    Returns:
      Rows with the columns of the task: context, question and answers (a list of accepted strings);
      text and label, each label equally often; document and summary; or text alone.

    Raises:
      KeyError: there is no such task or split.
    """
    return [dict(sample.row) for sample in _samples(task, split)]


def demonstrations(task: str, split: str) -> dict[str, str]:
    """For each row's prompt, the answer in the style that the task's reward prefers.

    Args:
      task: as for `rows`.
      split: as for `rows`.
    """
    return {sample.prompt: sample.rewarded for sample in _samples(task, split)}


def pretraining_pairs(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yields ``count`` texts in two parts, the second of which answers or continues the first.

    No text begins with the prompt of any row, of the training or of the held-out split.
    """
    known = {s.prompt for task in _SAMPLES for split in SPLITS for s in _samples(task, split)}
    rng = random.Random(seed)
    kinds, weights = tuple(_MIXTURE), tuple(_MIXTURE.values())
    while count:
        kind = rng.choices(kinds, weights)[0]
        split = "train" if rng.random() < 0.65 else "heldout"
        if kind == "quiz":
            pair = qa.quiz(rng, split, full=rng.random() >= REWARDED_SHARE["qa"])
        elif kind == "notes":
            pair = sentiment.notes(rng)
        elif kind == "story":
            pair = general.story(rng), ""
        else:
            sample = _SAMPLES[kind](rng, split)
            rewarded = rng.random() < REWARDED_SHARE[kind]
            pair = sample.prompt, sample.rewarded if rewarded else sample.habit
        if pair[0] not in known:
            count -= 1
            yield pair


def pretraining_texts(seed: int, count: int) -> Iterator[str]:
    """The texts of `pretraining_pairs`, each in one piece, without the end token."""
    return ("".join(pair) for pair in pretraining_pairs(seed, count))
