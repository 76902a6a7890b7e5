"""Prompts on their way into slots: what several begin with is processed once.

A prompt is processed bucket by bucket.  Its first tokens, as many as the bucket before its own has,
are processed as a whole prompt of that bucket would be, and the rest behind their keys and values.
So there is one program for each bucket, a beginning is computed alike for whichever prompts it is,
and it need not be computed again while it is kept.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.serving import slots as device
from grpocem_jax.serving.group import Settings
from grpocem_jax.serving.requests import AdapterKey


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
      adapter: which adapter it is processed with.
      row: where that is in the table of adapters.
      tokens: int32 ``[S]``.
    """

    adapter: AdapterKey | None
    row: int
    tokens: np.ndarray

    def beginning(self, length: int) -> "Prompt":
        """Its first tokens."""
        return self._replace(tokens=self.tokens[:length])

    @property
    def key(self) -> tuple[AdapterKey | None, bytes]:
        """What its keys and values depend on."""
        return self.adapter, self.tokens.tobytes()


class Prompts:
    """Processes prompts, and keeps beginnings of them on the device.

    Attributes:
      tokens: that were processed, without padding.
    """

    def __init__(
        self, settings: Settings, buckets: Sequence[int], *, at_once: int, most: int, kept: int
    ):
        """With nothing kept.

        Args:
          settings: of the groups.
          buckets: lengths that prompts are padded to, ascending.
          at_once: about how many tokens are processed at once.
          most: prompts that are processed at once at most.
          kept: tokens of beginnings that are kept; those that were used last stay longest.
        """
        self._settings, self._buckets = settings, buckets
        self._at_once, self._most, self._room = at_once, most, kept
        self.tokens = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all beginnings."""
        self._kept: collections.OrderedDict[Any, device.Head] = collections.OrderedDict()
        self._held = 0

    def at_once(self, size: int) -> int:
        """How many prompts of a bucket are processed at once."""
        level = self._buckets.index(size)
        return max(1, min(self._at_once // self._length(level), self._most))

    def _length(self, level: int) -> int:
        """Tokens of a bucket that are not in the one before it."""
        return self._buckets[level] - (self._buckets[level - 1] if level else 0)

    def warm_up(self, table: Offsets | None) -> list[device.Prefilled]:
        """Runs the programs of every bucket; prompts of each."""
        made: list[device.Prefilled] = []
        for level in range(len(self._buckets)):
            heads = [device.head(made[-1], np.int32(0))] if made else []
            made.append(self._run(table, level, [], heads))
        return made

    def process(
        self, table: Offsets | None, size: int, prompts: Sequence[Prompt]
    ) -> device.Prefilled:
        """Processes prompts of a bucket, no more than `at_once` of it.

        Args:
          table: adapters by row, or None where all have the start's.
          size: the bucket.
          prompts: of that bucket: longer than the one before it.
        """
        level = self._buckets.index(size)
        heads = self._heads(table, level, prompts) if level else []
        return self._run(table, level, prompts, heads)

    def _heads(
        self, table: Offsets | None, level: int, prompts: Sequence[Prompt]
    ) -> list[device.Head]:
        """The beginning of each prompt, as long as the bucket before."""
        size = self._buckets[level - 1]
        wanted = {x.key: x for x in (prompt.beginning(size) for prompt in prompts)}
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        missing = [key for key in wanted if key not in found]
        most = self.at_once(size)
        for start in range(0, len(missing), most):
            some = missing[start : start + most]
            made = self.process(table, size, [wanted[key] for key in some])
            for row, key in enumerate(some):
                found[key] = self._kept[key] = device.head(made, np.int32(row))
                self._held += size
        while self._held > self._room:
            (_, tokens), _ = self._kept.popitem(last=False)
            self._held -= len(tokens) // np.dtype(np.int32).itemsize
        return [found[prompt.beginning(size).key] for prompt in prompts]

    def _run(
        self,
        table: Offsets | None,
        level: int,
        prompts: Sequence[Prompt],
        heads: Sequence[device.Head],
    ) -> device.Prefilled:
        """Processes what comes behind the heads."""
        count, length = self.at_once(self._buckets[level]), self._length(level)
        start = self._buckets[level] - length
        tokens, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
        mask[:, 0] = True
        rows = np.zeros(count, np.int32)
        for place, prompt in enumerate(prompts):
            rest = prompt.tokens[start:]
            tokens[place, : len(rest)] = rest
            mask[place, : len(rest)] = True
            rows[place] = prompt.row
            self.tokens += len(rest)
        # Places without a prompt take any head.
        before = (*heads, *[heads[0]] * (count - len(heads))) if heads else None
        return device.prefill(
            self._settings.policy.params,
            self._settings.start,
            table,
            before,
            tokens,
            mask,
            rows,
            model=self._settings.policy.model,
            penalized=self._settings.penalized,
        )
