"""Kinds of text on disk, and what adapting to some of them gains on others of their kind."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpocem_jax import adaptation
from grpocem_jax.adaptation import Adaptation, Text, TrainedRun
from studies.common import searching

KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "stories": ("tinystories", lambda row: row["text"]),
    "mathematics": ("svamp", lambda row: f"{row['Body'].rstrip('. ')}. {row['Question']}"),
    "news": ("ag_news", lambda row: row["text"]),
    "restaurants": ("e2e_nlg", lambda row: row["ref"]),
    "abstracts": ("scitldr_a", lambda row: row["source"]),
    "encyclopedia": ("squad", lambda row: row["context"]),
}
"""Kinds of text: the folder, and the text of a row."""
PROMPT, FOLLOWING, PASSAGE = 40, 64, 32
"""Tokens of a prompt, at most of what follows it, and of a passage."""
SUPPORT = 32
"""The most passages that are adapted to."""
GRADIENT: dict[str, Any] = {"method": "gradient", "generations": 25}
FORWARDS = 3 * GRADIENT["generations"]
"""What it costs: a step is a forward and, at twice its cost, a backward."""


class Study:
    """Runs with a zero adapter, texts of several kinds, and the draws of passages.

    Attributes:
      runs: by name, of one tokenizer.
      texts: by their kind.
      seeds: draws.
      judges: passages that judge.
    """

    def __init__(
        self,
        runs: Mapping[str, TrainedRun],
        texts: Mapping[str, Sequence[str]],
        seeds: int,
        judges: int,
    ):
        self.runs, self.texts, self.seeds, self.judges = runs, texts, seeds, judges
        self.before = functools.cache(self._before)

    def adapt(
        self, name: str, texts: Text | Sequence[Text], seed: int, **changes: Any
    ) -> Adaptation:
        """`adaptation.adapt` of a run, without a gate and with other changes."""
        run = self.runs[name]
        run = run._replace(config=searching(run.config, **{"gate": False, **changes}))
        return adaptation.adapt(run, texts, key=jax.random.key(seed))

    def _before(self, name: str, judges: tuple[Text, ...]) -> float:
        """Mean log-likelihood per token of texts under the model itself, nats."""
        run = self.runs[name]
        return float(adaptation.log_likelihoods(run, run.offsets, judges).mean())

    def gain(self, name: str, found: Adaptation, judges: Sequence[Text]) -> float:
        """Gain of log-likelihood per token on texts, nats."""
        after = adaptation.log_likelihoods(self.runs[name], found.offsets, judges).mean()
        return float(after) - self.before(name, tuple(judges))

    def cut(self, text: str, count: int) -> tuple[str, str]:
        """The most whole words, each with the space after it, in ``count`` tokens, and the rest."""
        words = re.findall(r"[^ ]+ *", text)
        encode = next(iter(self.runs.values())).policy.encode
        end = next(
            (n for n in range(1, len(words)) if len(encode("".join(words[: n + 1]))) > count),
            len(words),
        )
        return "".join(words[:end]), "".join(words[end:])

    def prompts(self, kind: str, count: int) -> list[tuple[Text, Text]]:
        """Openings of texts, each with what follows it as the completion."""
        found = []
        for text in self.shuffled(kind, 0):
            prompt, rest = self.cut(text, PROMPT)
            following = self.cut(rest, FOLLOWING)[0]
            if len(following.split(" ")) >= 12:
                found.append((Text(prompt), Text(prompt, following)))
            if len(found) == count:
                return found
        raise ValueError(
            f"there are only {len(found)} texts of the kind {kind} that are long enough"
        )

    def passages(self, kind: str, count: int, seed: int) -> tuple[list[Text], list[Text]]:
        """Passages to adapt to, and others to judge by, the same for any ``count``."""
        texts = self.shuffled(kind, seed + 1)[: self.judges + SUPPORT]
        cut = [Text(self.cut(text, PASSAGE)[0]) for text in texts]
        return cut[self.judges : self.judges + count], cut[: self.judges]

    def shuffled(self, kind: str, seed: int) -> list[str]:
        """All texts of a kind in random order."""
        order = np.random.default_rng(seed).permutation(len(self.texts[kind]))
        return [self.texts[kind][i] for i in order]


def read(folder: Path) -> dict[str, list[str]]:
    """The different texts of at least 10 words of each of `KINDS`, from ``NAME/train.jsonl``."""
    found = {}
    for kind, (name, text) in KINDS.items():
        lines = (folder / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
        found[kind] = long(text(json.loads(line)) for line in lines)
    return found


def long(texts: Any) -> list[str]:
    """The different texts of at least 10 words."""
    return [text for text in dict.fromkeys(texts) if len(text.split()) >= 10]
