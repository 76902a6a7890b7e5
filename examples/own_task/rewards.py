"""Reward functions in TRL's form: lists in, one number (or None to abstain) for each completion."""

import re
from collections.abc import Sequence
from typing import Any


def right(
    prompts: Sequence[str], completions: Sequence[str], *, sentiment: Sequence[str], **columns: Any
) -> list[float]:
    """1 where the answer names the review's sentiment and not the other one, else -1."""
    return [
        1.0 if set(re.findall("positive|negative", completion)) == {word} else -1.0
        for completion, word in zip(completions, sentiment, strict=True)
    ]


def brief(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for a single word, less for each more, -1 from ten words on."""
    return [
        1.0 - 2.0 * min(len(text.split()) - 1, 9) / 9 if text.strip() else -1.0
        for text in completions
    ]
