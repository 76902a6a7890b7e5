"""A search method as a newcomer writes one."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ClimberState(NamedTuple):
    mean: dict
    size: jax.Array


@dataclasses.dataclass(frozen=True)
class Climber:
    """A newcomer's method: the best of some steps, and smaller steps where none was better."""

    population_size: int = 12

    def init(self, start):
        return ClimberState(start, jnp.float32(0.5))

    def ask(self, key, state):
        leaves, structure = jax.tree.flatten(state.mean)
        drawn = [
            (x[None] + state.size * jax.random.normal(k, (self.population_size, *x.shape))).astype(
                x.dtype
            )
            for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        drawn = [x.at[0].set(old) for x, old in zip(drawn, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    def tell(self, state, candidates, fitness):
        best = jnp.argmax(fitness)
        size = jnp.where(best == 0, 0.8 * state.size, state.size)
        return ClimberState(jax.tree.map(lambda x: x[best], candidates), size)

    def converged(self, state):
        return state.size < 1e-4
