"""What the parts of a step read, so that processes that share one need not tell each other more."""

from collections.abc import Callable
from typing import Any, TypeVar

from grpocem_jax.utils.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])

ARRAYS = ("tokens", "logps", "entropies")
"""What a reward shaping, an advantage function or a weight rule may read of a step's completions,
beside their rewards and masks."""


def reads(*names: str) -> Callable[[Function], Function]:
    """Says which of `ARRAYS` a shaping, an advantage function or a weight rule reads; none, mostly.

    Where several processes share a step, the others' completions are zero in the rest of them. Of a
    function that does not say it, all are assumed to be read.

    >>> @reads()
    ... def centred(rewards, step_rewards, tokens, mask):
    ...     return (rewards - rewards.mean(-1, keepdims=True))[..., None] * mask

    Raises:
      InputError: another name.
    """
    for name in names:
        if name not in ARRAYS:
            raise InputError(f"reads({name!r}): must be of {', '.join(ARRAYS)}.")

    def say(function: Function) -> Function:
        function.reads = names  # type: ignore[attr-defined]
        return function

    return say


def read_by(function: Callable[..., Any]) -> tuple[str, ...]:
    """Which of `ARRAYS` a function reads, as far as it says so."""
    return getattr(function, "reads", ARRAYS)
