"""Fitness: how good an adapter is, as ``(adapter, batch, key) -> float32 []``.

Any traceable function of that form can be searched with (`grpocem_jax.search`); `Likelihood` is
the report's.  Rewards of completions are no functions of arrays, they judge text on the host; see
`grpocem_jax.rollouts.population_rewards`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.models.base import AdapterParams, Context, Model, Params
from grpocem_jax.models.likelihood import token_logps


class Texts(NamedTuple):
    """Texts to be likely, padded on the right.

    Attributes:
      tokens: int32 ``[K, T]``, ``T`` at least 2.
      mask: bool ``[K, T]``, False on padding.
      scored: bool ``[K, T]``, tokens whose log-likelihood counts; the first token of a text has
        none, as nothing comes before it.
      places: int32 ``[K, M]`` from 0 to ``T - 2``, different ones in a text: the tokens before
        those that are scored, and others where they are fewer than ``M``, see `predicting`. None
        for all. A likelihood takes no more states of a text than these.
      prefix: int32 ``[S]``, the first ``S`` tokens of every text, where they are the same and
        neither they nor the next are scored. A likelihood runs the model over them once, and over
        the rest of each text. None for each text by itself.
    """

    tokens: Any
    mask: Any
    scored: Any
    places: Any = None
    prefix: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the model runs over, padding included."""
        texts, length = self.tokens.shape
        start = 0 if self.prefix is None else len(self.prefix)
        return start + texts * (length - 1 - start)

    @property
    def rest(self) -> "Texts":
        """The texts without their prefix."""
        if self.prefix is None:
            return self
        start = len(self.prefix)
        places = None if self.places is None else self.places - start
        tokens, mask, scored = (x[:, start:] for x in (self.tokens, self.mask, self.scored))
        return Texts(tokens, mask, scored, places)


def predicting(scored: np.ndarray, most: int) -> np.ndarray:
    """The ``places`` of `Texts`, on the host.

    Args:
      scored: bool ``[K, T]``; the first token of a text does not count.
      most: ``M``, at least as many as are scored of any text, and at most ``T - 1``.

    Returns:
      int32 ``[K, M]``, in order.
    """
    first = np.argsort(~scored[:, 1:], axis=1, kind="stable")[:, :most]
    return np.sort(first, axis=1).astype(np.int32)


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
    return chunk(population_size, texts.num_tokens)


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
          float32 ``[K * (T - 1 - S)]`` or ``[K * M]``, text by text, zero where not scored, and
          where they are, bool.
        """
        del key

        context = None
        if batch.prefix is not None:
            everywhere = jnp.ones(len(batch.prefix), bool)
            _, context = self.model.prefill(self.params, offsets, batch.prefix, everywhere)
        of_text = functools.partial(self.of_text, offsets, context=context)
        logps, scored = jax.vmap(of_text)(batch.rest)
        return logps.ravel(), scored.ravel()

    def of_text(
        self, offsets: AdapterParams, text: Texts, *, context: Context | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Log-likelihood of each token of one text, or of those of its ``places``.

        Args:
          offsets: offsets.
          text: a text, without the leading axis and without a prefix.
          context: what is before it.

        Returns:
          float32 ``[T - 1]`` or ``[M]``, zero where not scored, and where they are, bool.
        """
        tokens, scored = text.tokens[1:], text.scored[1:] & text.mask[1:]
        hidden = self.model.forward(
            self.params, offsets, text.tokens[:-1], text.mask[:-1], context, places=text.places
        )
        if text.places is not None:
            tokens, scored = tokens[text.places], scored[text.places]
        logps = token_logps(self.model, self.params, hidden, tokens, 1.0)[0]
        return jnp.where(scored, logps, 0.0), scored
