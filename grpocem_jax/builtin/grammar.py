"""The smallest machinery that composes English: frames with slots, articles, capitals.

A frame is a format string, ``"{who} put the {thing} {place}"``.  Each slot draws from the word
class of its name without digits, so ``{who}`` and ``{who2}`` are two different names.
"""

import random
import re
import string
from collections.abc import Iterable
from typing import Any, NamedTuple

from grpocem_jax.builtin import lexicon

_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


class Sample(NamedTuple):
    """One example with the two answers that the base model is to know.

    Attributes:
      row: the columns of the task's data set.
      prompt: the columns put into the task's template.
      rewarded: the answer in the style that the task's reward prefers, with its leading space.
      habit: the answer in the competing style.
    """

    row: dict[str, Any]
    prompt: str
    rewarded: str
    habit: str


def articles(text: str) -> str:
    """Writes "an" for "a" before a vowel; the lexicon has no word where letter and sound differ."""
    return _ARTICLE.sub(r"\1n ", text)


def sentence(text: str) -> str:
    """Capitalises the first letter and leaves the rest alone."""
    return text[0].upper() + text[1:]


def slots(*frames: str) -> list[str]:
    """Names of the slots of the frames, each once, in order of appearance."""
    names = (name for frame in frames for _, name, _, _ in string.Formatter().parse(frame) if name)
    return list(dict.fromkeys(names))


def draw(rng: random.Random, names: Iterable[str], used: set[str]) -> dict[str, str]:
    """Draws a filling for each slot, none of it in ``used``, to which the fillings are added."""
    filling = {}
    for name in names:
        words = lexicon.CLASSES[name.rstrip("0123456789")]
        word = rng.choice(words)
        while word in used:
            word = rng.choice(words)
        used.add(word)
        filling[name] = word
    return filling
