"""Text metrics as reward functions.

A reward function has TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``.
``prompts`` and ``completions`` are lists of B strings, completions without their end token; every
column is a list of B values, and columns that a function does not read are ignored.  A function
with a parameter ``base_logps`` gets the log-probabilities of each completion's tokens under the
base model, float ``[n]`` at temperature 1.  The values lie in [-1, 1]; ``None`` abstains.  White
space around a completion does not count.
"""

import functools
import itertools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpocem_jax.utils.files import some_home

FULL_LENGTH = 12
"""Number of words from which a free text is no longer marked down as short."""

FLUENT_PERPLEXITY = 32.0
"""Perplexity under the base model, by token, up to which a free text counts as fluent."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
_TEXT_END = re.compile(r"[.!?][\s\"'”’)\]]*$")


class StepReward(NamedTuple):
    """The reward of one step of a completion, for process supervision.

    Attributes:
      end: number of characters of the completion up to the end of the step, in (0, len].
      reward: the step's reward, in [-1, 1].
    """

    end: int
    reward: float


RewardFunction = Callable[..., list[float | None]]
ProcessRewardFunction = Callable[..., list[list[StepReward]]]


def normalise_answer(text: str) -> str:
    """Lower case without punctuation, English articles and extra white space.

    The normalisation of SQuAD's evaluation (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


class _AnswerTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return normalise_answer(text).split()


class _Rouge(NamedTuple):
    answers: Any
    summaries: Any


@functools.cache
def _rouge() -> _Rouge:
    """ROUGE-1 of normalised answers; ROUGE-1 and ROUGE-L of stems.

    Imported at the first use: NLTK, which it loads, takes longer to import than the rest of a
    command, and cannot be without a home directory.
    """
    with some_home():
        from rouge_score import rouge_scorer, tokenizers
    # Tokenizers are passed explicitly: the scorer logs a line whenever it falls back to its own.
    return _Rouge(
        answers=rouge_scorer.RougeScorer(["rouge1"], tokenizer=_AnswerTokenizer()),
        summaries=rouge_scorer.RougeScorer(
            ["rouge1", "rougeL"], tokenizer=tokenizers.DefaultTokenizer(use_stemmer=True)
        ),
    )


def answer_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    answers: Sequence[Sequence[str] | str],
    **columns: Any,
) -> list[float | None]:
    """Exact match plus token F1 minus 1, for the accepted answer that fits best.

    Both metrics are SQuAD's (arXiv 1606.05250); F1 is ROUGE-1's F on normalised tokens.  So 1 is
    an exact match, values in (-1, 0] share words with an answer, and -1 shares none.

    Args:
      prompts: B prompts, not read.
      completions: B completions.
      answers: accepted answers of each sample, one string or several.  No answers: ``None``.
      **columns: not read.
    """
    del prompts, columns
    return [
        max((_answer_score(completion, answer) for answer in _listed(accepted)), default=None)
        for completion, accepted in zip(completions, answers, strict=True)
    ]


def _answer_score(completion: str, answer: str) -> float:
    if completion.strip() and normalise_answer(completion) == normalise_answer(answer):
        return 1.0
    return _rouge().answers.score(answer, completion)["rouge1"].fmeasure - 1.0


def label_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    label: Sequence[str],
    labels: Sequence[Sequence[str]],
    **columns: Any,
) -> list[float | None]:
    """1 when the first label that a completion names is the right one, otherwise -1.

    A label is named when it occurs as whole words, in any case.  Where two labels begin at the
    same place the longer one is meant ("Sci/Tech", not "Sci").

    Args:
      prompts: B prompts, not read.
      completions: B completions.
      label: the right label of each sample.
      labels: all label names, for each sample.
      **columns: not read.
    """
    del prompts, columns
    return [
        1.0 if _first_label(completion, tuple(names)) == right.casefold() else -1.0
        for completion, right, names in zip(completions, label, labels, strict=True)
    ]


def _first_label(completion: str, names: tuple[str, ...]) -> str | None:
    found = _label_pattern(names).search(completion)
    return found.group().casefold() if found else None


@functools.cache
def _label_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)


def summary_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    summary: Sequence[Sequence[str] | str],
    **columns: Any,
) -> list[float | None]:
    """2 m - 1, where m is the mean of ROUGE-1 F and ROUGE-L F with the best reference.

    ROUGE (Lin 2004) with Porter stemming.  A value of 1 has the reference's stems in its order.

    Args:
      prompts: B prompts, not read.
      completions: B completions.
      summary: reference summaries of each sample, one string or several.  None at all: ``None``.
      **columns: not read.
    """
    del prompts, columns
    return [
        max((_summary_score(completion, reference) for reference in _listed(given)), default=None)
        for completion, given in zip(completions, summary, strict=True)
    ]


def _summary_score(completion: str, reference: str) -> float:
    scores = _rouge().summaries.score(reference, completion)
    return scores["rouge1"].fmeasure + scores["rougeL"].fmeasure - 1.0


def text_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    base_logps: Sequence[np.ndarray],
    **columns: Any,
) -> list[float | None]:
    """2 (novelty x completeness x length x fluency) - 1, for free text without a reference.

    novelty: the fraction of the completion's word bigrams that occur neither earlier in the
    completion nor in the prompt (a lone word counts as a bigram).  completeness: 1 when the text
    ends with a full stop, an exclamation mark or a question mark, closing quotes or brackets
    allowed after it, otherwise 0.5.  length: words / 12, at most 1.  fluency: 32 / the
    completion's perplexity under the base model, at most 1; words in random order are near 0.

    Args:
      prompts: B prompts.
      completions: B completions; one without a word gets -1.
      base_logps: log-probabilities of their tokens under the base model, float ``[n]`` each.
      **columns: not read.
    """
    del columns
    return [_text_score(*sample) for sample in zip(prompts, completions, base_logps, strict=True)]


def _text_score(prompt: str, completion: str, base_logps: np.ndarray) -> float:
    length = min(1.0, len(_WORD.findall(completion)) / FULL_LENGTH)
    novelty = _novelty(completion, set(_bigrams(prompt)))
    return 2.0 * novelty * _completeness(completion) * length * _fluency(base_logps) - 1.0


def _fluency(base_logps: np.ndarray) -> float:
    surprise = -float(np.mean(base_logps)) if len(base_logps) else 0.0
    return min(1.0, FLUENT_PERPLEXITY * math.exp(-surprise))


def optimal_value(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    optimal_value: Sequence[float | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The column ``optimal_value``, what the best policy near the base model is worth at a prompt.

    With the weight -1 beside a task's reward, rewards become the optimal advantages of A*-PO
    (examples/optimal_values.py estimates the column).  Rows without it abstain, so that held-out
    rewards stay as they are.
    """
    del prompts, columns
    return [None] * len(completions) if optimal_value is None else list(optimal_value)


def text_process_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    base_logps: Sequence[np.ndarray],
    **columns: Any,
) -> list[list[StepReward]]:
    """2 (novelty x fluency) - 1 for each sentence of a free text, for process supervision.

    A sentence's novelty is that of ``text_reward``, judged against the prompt and the sentences
    before it; the last sentence's is multiplied by the text's completeness.  The fluency is that
    of the whole text.

    Args:
      prompts: B prompts.
      completions: B completions.
      base_logps: as for ``text_reward``.
      **columns: not read.

    Returns:
      For each completion its steps in order.  The ends rise strictly to the completion's length.
      A completion of zero characters has none, and is worth its outcome; one without a word has
      one, with reward -1.
    """
    del columns
    return [
        _sentence_steps(*sample) for sample in zip(prompts, completions, base_logps, strict=True)
    ]


def _sentence_steps(prompt: str, completion: str, base_logps: np.ndarray) -> list[StepReward]:
    seen, fluency = set(_bigrams(prompt)), _fluency(base_logps)
    ends = _sentence_ends(completion)
    steps, start = [], 0
    for end in ends:
        weight = fluency * (_completeness(completion) if end == len(completion) else 1.0)
        steps.append(StepReward(end, 2.0 * weight * _novelty(completion[start:end], seen) - 1.0))
        start = end
    return steps


def _sentence_ends(text: str) -> list[int]:
    """Ends of sentences; what holds no word, such as a detached quote, joins the one before."""
    ends: list[int] = []
    for stop in [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]:
        start = ends[-1] if ends else 0
        if _WORD.search(text, start, stop):
            ends.append(stop)
        elif ends:
            ends[-1] = stop
    return ends or ([len(text)] if text else [])


def _bigrams(text: str) -> list[tuple[str, ...]]:
    words = [word.casefold() for word in _WORD.findall(text)]
    return list(itertools.pairwise(words)) or ([tuple(words)] if words else [])


def _novelty(text: str, seen: set[tuple[str, ...]]) -> float:
    """Fraction of bigrams not seen before, 0 without any; adds the text's bigrams to ``seen``."""
    bigrams = _bigrams(text)
    new = 0
    for bigram in bigrams:
        new += bigram not in seen
        seen.add(bigram)
    return new / max(1, len(bigrams))


def _completeness(text: str) -> float:
    return 1.0 if _TEXT_END.search(text) else 0.5


def _listed(texts: Sequence[str] | str) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts
