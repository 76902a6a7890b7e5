"""Reward shaping: rewards changed before they become advantages."""

from collections.abc import Callable

import jax

Shaping = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""A reward shaping: ``(rewards, logps, mask) -> rewards``.

- rewards: float32 ``[P, G]``, NaN where the reward function abstained.
- logps: float32 ``[P, G, N]``, log-probabilities of the completions' tokens when they were drawn.
- mask: bool ``[P, G, N]``.

It returns float32 ``[P, G]``, NaN where the rewards are. Metrics and reports keep the rewards as
they were. It is called once a step, not inside `jax.jit`.
"""
