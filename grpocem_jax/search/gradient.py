"""Gradient ascent in the form of a search method."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpocem_jax.search.base import Point, check_start
from grpocem_jax.utils.settings import above, check, setting


class GradientState(NamedTuple):
    """What `GradientAscent` knows between steps.

    Attributes:
      mean: the current point.
      moments: Adam's.
    """

    mean: Point
    moments: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent:
    """Adam (Kingma and Ba 2014, arXiv 1412.6980) on a differentiable fitness, steps as generations.

    The alternative to `CEM` where there is a gradient, in the same form: a step is one generation
    of one candidate, the current point.

    Attributes:
      learning_rate: of Adam, above 0.

    Raises:
      InputError: a learning rate that is not above 0.
    """

    learning_rate: float = setting(allowed=above(0), default=1e-2)

    def __post_init__(self) -> None:
        check(self)

    population_size = 1
    needs = ("gradient",)

    @property
    def label(self) -> str:
        """What screens call the method."""
        return f"gradient, Adam {self.learning_rate:g}"

    def init(self, start: Point) -> GradientState:
        """The state before the first step.

        Raises:
          InputError: a start without arrays, or with arrays that are not of floats.
        """
        start = check_start(start)
        return GradientState(start, optax.adam(self.learning_rate).init(start))

    def ask(self, key: jax.Array, state: GradientState) -> Point:
        """The current point, with a leading axis of 1."""
        del key
        return jax.tree.map(lambda x: x[None], state.mean)

    def tell(
        self, state: GradientState, candidates: Point, fitness: jax.Array, *, gradient: Point
    ) -> GradientState:
        """One step uphill.

        Where the fitness or its gradient is not finite, the point and Adam's moments stay as they
        are.

        Args:
          state: the state that was asked.
          candidates: the current point, as `ask` returned it.
          fitness: of the current point, float ``[1]``.
          gradient: of the fitness there, in the form of ``candidates``.

        Returns:
          the next state, with the same shapes and dtypes.
        """
        del candidates
        gradient = jax.tree.map(lambda x: x[0], gradient)
        updates, moments = optax.adam(self.learning_rate).update(
            jax.tree.map(jnp.negative, gradient), state.moments
        )
        leaves = jax.tree.leaves((fitness, gradient))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
        moved = GradientState(optax.apply_updates(state.mean, updates), moments)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)

    def converged(self, state: GradientState) -> jax.Array:
        """Never: a gradient run has a length, not an end."""
        del state
        return jnp.bool_(False)
