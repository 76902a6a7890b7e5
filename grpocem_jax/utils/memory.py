"""Device memory that does not suffice: what to lower, and lowering it where that is asked for."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import say

T = TypeVar("T")

EXHAUSTED = ("RESOURCE_EXHAUSTED", "Out of memory", "YNNPACK operation failed")
"""What JAX says where device memory runs out: as a rule the first, of a single array on the CPU
the second; the CPU's matrix products say no more than the third."""


def ran_out(error: Exception) -> bool:
    """Whether an error of JAX says that device memory ran out."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(x in str(error) for x in EXHAUSTED)


@contextlib.contextmanager
def advise(where: str, advice: str) -> Iterator[None]:
    """Says what to lower where memory runs out inside the block.

    Args:
      where: what is done there.
      advice: which setting to lower, and to what.

    Raises:
      InputError: memory ran out.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not ran_out(error):
            raise
        raise InputError(f"out of device memory in {where}: {advice}.") from error


class Chunk:
    """How many things are computed at a time; halved where memory runs out and that is asked for.

    Args:
      setting: the name of the setting.
      size: how many, at first.
      where: what is done with them.
      lower: whether that is asked for.
      smaller: the next size below one, or None where there is none.
      advice: what to do, given the size and the next below it.

    Attributes:
      size: how many, now.
    """

    def __init__(
        self,
        setting: str,
        size: int,
        where: str,
        *,
        lower: bool,
        smaller: Callable[[int], int | None],
        advice: Callable[[int, int | None], str],
    ):
        self.setting, self.size, self.where = setting, size, where
        self._lower, self._smaller, self._advice = lower, smaller, advice

    def run(self, function: Callable[[int], T]) -> T:
        """What ``function`` returns for a size that fits; it must leave its inputs as they are.

        Raises:
          InputError: memory ran out, and the size cannot or must not be lowered.
        """
        while True:
            try:
                return function(self.size)
            except jax.errors.JaxRuntimeError as error:
                if not ran_out(error):
                    raise
                smaller = self._smaller(self.size)
                if smaller is None or not self._lower:
                    advice = self._advice(self.size, smaller)
                    raise InputError(f"out of device memory in {self.where}: {advice}.") from error
                say(
                    f"out of device memory in {self.where}: {self.setting} is lowered from "
                    f"{self.size} to {smaller}; the results are the same up to rounding",
                    sys.stderr,
                )
                self.size = smaller


def population_chunk(size: int, *, lower: bool) -> Chunk:
    """So many candidates of a search at a time, halved down to 1 where ``lower`` is set."""

    def advice(size: int, smaller: int | None) -> str:
        if smaller is None:
            return "a single candidate does not fit; give shorter texts or fewer"
        fit = "" if lower else ", or fit_memory=True, which lowers it as needed"
        return f"{size} candidates at a time do not fit; set population_chunk={smaller}{fit}"

    return Chunk(
        "population_chunk",
        size,
        "the search",
        lower=lower,
        smaller=lambda size: size // 2 or None,
        advice=advice,
    )
