"""A search whose optimum is known: a quadratic in three numbers, in JAX and in Python."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.search import CEM, loop, spaces

KEY = jax.random.key(0)
SITE = "h.0.attn.c_proj"
TARGET = jnp.array([1.0, -0.5, 0.5])
START = {SITE: jnp.array([0.125, 0.25, -0.5])}
SPACE = spaces.full_space(START)
METHOD = CEM(
    population_size=40, elite_ratio=0.2, noise_std=0.5, momentum=0.0, std_momentum=0.7, threshold=0
)
SETTINGS = {"generations": 30}


def quadratic(offsets, batch, key):
    """Without ``scores``; the same function for all, so that programs are shared."""
    del key
    return -jnp.sum((offsets[SITE] - batch) ** 2)


def noisy(offsets, batch, key):
    return quadratic(offsets, batch, key) + jax.random.normal(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
    """One score for each of several targets, some of which may be absent."""

    scale: jax.Array

    def __call__(self, offsets, batch, key):
        values, present = self.scores(offsets, batch, key)
        return jnp.sum(jnp.where(present, values, 0)) / jnp.sum(present)

    def scores(self, offsets, batch, key):
        targets, present = batch
        distance = jnp.sum((offsets[SITE][None] - targets) ** 2, -1)
        return -self.scale * distance, present


def run(function=quadratic, batch=TARGET, key=KEY, method=METHOD, space=SPACE, **options):
    return loop.maximize(method, function, space, batch, key, **{**SETTINGS, **options})


def host(values=TARGET, *, spread=(0.0,)):
    """A fitness in numpy: as many scores as ``spread`` has numbers, each moved by one of them."""
    target = np.asarray(values)

    def evaluate(adapters, batch, key):
        del key
        x = np.asarray(adapters[SITE])
        return -np.sum((x - target) ** 2, -1)[:, None] + np.asarray(spread)

    return evaluate


def run_on_host(evaluate=None, key=KEY, method=METHOD, space=SPACE, **options):
    judge = loop.HostFitness(evaluate or host())
    return loop.maximize(method, judge, space, "shown", key, **{**SETTINGS, **options})


def same(x, y):
    chex.assert_trees_all_equal(x, y)


def close(x, y, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), x, y)


def targets(*values, present=None):
    """A batch of `Quadratic`: so many times the way from the start to `TARGET`, and which count."""
    way = np.asarray(TARGET) - np.asarray(START[SITE])
    points = np.asarray(START[SITE]) + np.outer(values, way)
    present = np.ones(len(values), bool) if present is None else np.asarray(present)
    return jnp.asarray(points, jnp.float32), jnp.asarray(present)
