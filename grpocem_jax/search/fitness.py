"""Fitness: how good an adapter is, as ``(adapter, batch, key) -> float32 []``.

Any traceable function of that form can be searched with (`grpocem_jax.search`); `Likelihood` is
the report's.  Rewards of completions are no functions of arrays, they judge text on the host; see
`grpocem_jax.rollouts.population_rewards`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax.models.base import AdapterParams, Model, Params
from grpocem_jax.models.likelihood import token_logps


class Texts(NamedTuple):
    """Texts to be likely, padded on the right.

    Attributes:
      tokens: int32 ``[K, T]``, ``T`` at least 2.
      mask: bool ``[K, T]``, False on padding.
      scored: bool ``[K, T]``, tokens whose log-likelihood counts; the first token of a text has
        none, as nothing comes before it.
    """

    tokens: jax.Array
    mask: jax.Array
    scored: jax.Array


class Rows(NamedTuple):
    """Texts that are cut before the first token that counts.

    Attributes:
      context: int32 ``[K, C]``, what comes before but its last token, padded on the left; ``C`` may
        be 0.
      before: bool ``[K, C]``, False on padding.
      tokens: int32 ``[K, S + 1]``, its last token and the others, padded on the right.
      mask: bool ``[K, S]``, False on padding, of all but the last.
      scored: bool ``[K, S]``, which of all but the first count.
    """

    context: Any
    before: Any
    tokens: Any
    mask: Any
    scored: Any


def population_chunk(population_size: int, texts: Texts) -> int:
    """How many candidates to score at a time, so that products run at full speed.

    On a CPU about a thousand tokens do: more fall out of its caches between one operation and the
    next, which at 128 tokens a candidate costs a fifth of the speed and twenty times the memory
    (docs/benchmarks.md).  Elsewhere sixteen thousand.

    Args:
      population_size: candidates in all.
      texts: what each is scored on.

    Returns:
      a divisor of the population where there is one of about that size: a last chunk of another
      size is a program of its own.
    """
    return chunk(population_size, texts.tokens.shape[0] * (texts.tokens.shape[1] - 1))


def chunk(population_size: int, tokens: int) -> int:
    """As `population_chunk`, for candidates that are scored on so many tokens each."""
    limit = 1024 if jax.default_backend() == "cpu" else 16384
    largest = max(1, limit // tokens)
    if largest >= population_size:
        return population_size
    divisor = max(n for n in range(1, largest + 1) if population_size % n == 0)
    return divisor if 2 * divisor >= largest else largest


FitnessFunction = Callable[[Model, Params, AdapterParams, Texts, jax.Array], jax.Array]
"""A user's own fitness, ``(model, params, offsets, texts, key) -> float32 []``, traceable."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """A fitness of the user's own on a model; a pytree as `Likelihood` is.

    Attributes:
      params: the model's parameters, with factors at the adapter's sites.
      model: the model record.
      function: the fitness.
    """

    params: Params
    model: Model = dataclasses.field(metadata={"static": True})
    function: FitnessFunction = dataclasses.field(metadata={"static": True})

    def __call__(self, offsets: AdapterParams, batch: Texts, key: jax.Array) -> jax.Array:
        """The function's value; the gate has nothing but it to judge by."""
        return self.function(self.model, self.params, offsets, batch, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """Mean log-likelihood per scored token of texts, in nats: the report's CEM score.

    It never defines the score; this is a quantity with its values, -2.87 to -4.12.  An instance is
    a pytree of the model's parameters, so it is an argument of a compiled search, not a constant
    of it.

    Attributes:
      params: the model's parameters, with factors at the adapter's sites.
      model: the model record.
    """

    params: Params
    model: Model = dataclasses.field(metadata={"static": True})

    def __call__(self, offsets: AdapterParams, batch: Texts, key: jax.Array) -> jax.Array:
        """Mean over the scored tokens of all texts; NaN where there are none."""
        logps, scored = self.scores(offsets, batch, key)
        return jnp.sum(logps) / jnp.sum(scored)

    def scores(
        self, offsets: AdapterParams, batch: Texts, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Log-likelihood of each token, for `grpocem_jax.search`.

        Args:
          offsets: offsets.
          batch: the texts.
          key: not used.

        Returns:
          float32 ``[K * (T - 1)]``, zero where not scored, and where they are, bool.
        """
        del key

        def one(tokens, mask):
            hidden = self.model.forward(self.params, offsets, tokens[:-1], mask[:-1])
            return token_logps(self.model, self.params, hidden, tokens[1:], 1.0)[0]

        scored = batch.scored[:, 1:] & batch.mask[:, 1:]
        logps = jax.vmap(one)(batch.tokens, batch.mask)
        return jnp.where(scored, logps, 0.0).ravel(), scored.ravel()

    def row(self, offsets: AdapterParams, row: Rows) -> jax.Array:
        """Log-likelihood of the tokens of one row, see `Rows`, float32 ``[S]``; 0 if not scored.

        What comes before is processed up to its keys and values, and the head sees no other states
        than those that predict.
        """
        context = None
        if row.context.shape[-1]:
            _, context = self.model.prefill(self.params, offsets, row.context, row.before)
        hidden = self.model.forward(self.params, offsets, row.tokens[:-1], row.mask, context)
        logps = token_logps(self.model, self.params, hidden, row.tokens[1:], 1.0)[0]
        return jnp.where(row.scored, logps, 0.0)
