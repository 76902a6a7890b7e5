"""Two rewards that a reader can check by eye, in TRL's form."""

import re
from collections.abc import Sequence
from typing import Any


def conversation(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """-1 where nobody speaks, 1 where at least a third of the words are spoken, linear between."""
    rewards = []
    for text in completions:
        # Odd parts are inside quotation marks; a last one may be cut off.
        spoken = " ".join(re.split('["“”]', text)[1::2]).split()
        share = len(spoken) / max(len(text.split()), 1)
        rewards.append(2.0 * min(3.0 * share, 1.0) - 1.0)
    return rewards


def fresh(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where no three words in a row come twice, less by the share that do, -1 where all do."""
    rewards = []
    for text in completions:
        words = re.findall(r"[a-z']+", text.lower())
        triples = list(zip(words, words[1:], words[2:], strict=False))
        rewards.append(2.0 * len(set(triples)) / len(triples) - 1.0 if triples else -1.0)
    return rewards
