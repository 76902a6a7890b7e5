"""The strategies of evosax (Lange 2022, arXiv 2212.04180) as search methods.

    pip install 'grpocem_jax[evosax]'

evosax minimises vectors; here a point is a pytree and fitness is maximised, so points are raveled
and the sign of the fitness is turned.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from grpocem_jax.search.base import Point, check_start
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, check, count, setting

GIVEN = ("population_size", "solution", "fitness_shaping_fn", "metrics_fn")
"""Arguments of a strategy that are not options."""


class EvosaxState(NamedTuple):
    """What `Evosax` knows between generations.

    Attributes:
      mean: the mean of a strategy that has one; of another, the best point ever seen.
      std: standard deviation of the candidates where the strategy has one, else None.
      inner: evosax's own state.
    """

    mean: Point
    std: Any
    inner: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evosax:
    """A strategy of evosax, by name.

    evosax asks and tells with a key, and its `ask` changes the state.  As `ask` is pure, `tell`
    asks again with the generation's key to have that state.

    Attributes:
      name: of the strategy, as in ``evosax.algorithms``: ``Sep_CMA_ES``, ``Open_ES``, ``DE``, ...
      population_size: candidates of a generation.
      noise_std: initial standard deviation, above 0.
      options: the strategy's other settings, arguments of its class or fields of its parameters.

    Raises:
      InputError: evosax is not installed, or another version; no strategy of that name, or options
        that it does not take.
    """

    name: str
    population_size: int = setting(allowed=count(1), default=100)
    noise_std: float = setting(allowed=above(0), default=0.3)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    needs = ("key",)

    def __post_init__(self) -> None:
        check(self)
        try:
            hash(tuple(self.options.items()))
        except TypeError:
            raise InputError(
                f"options={dict(self.options)!r}: give numbers, strings and functions, not "
                "lists or sections."
            ) from None
        self._make(4)

    @property
    def label(self) -> str:
        """What screens call the method."""
        return f"evosax:{self.name}"

    def init(self, start: Point) -> EvosaxState:
        """The state before the first generation.

        A strategy that keeps a population instead of a mean begins with one drawn around the start.

        Raises:
          InputError: a start without arrays, or with arrays that are not of floats.
        """
        start = check_start(start)
        flat, unravel = ravel(start)
        strategy, params = self._make(flat.size)
        # The state that a strategy draws in `init` belongs to the method, not to a problem.
        key = jax.random.key(0)
        with _lenient():
            if _has_mean(strategy):
                inner = strategy.init(key, flat, params)
            else:
                noise = jax.random.normal(key, (self.population_size, flat.size))
                population = (flat[None] + self.noise_std * noise).at[0].set(flat)
                losses = jnp.full(self.population_size, jnp.inf)
                inner = strategy.init(key, population, losses, params)
                inner = inner.replace(best_solution=flat)
        # evosax leaves Python numbers in its states, which are not arrays in every generation.
        inner = jax.tree.map(jnp.asarray, inner)
        inner = _retyped(inner, jax.eval_shape(lambda x: self._told(x, flat.size), inner))
        return EvosaxState(start, _std(inner, unravel, flat.size), inner)

    def ask(self, key: jax.Array, state: EvosaxState) -> Point:
        """Draws the candidates of a generation."""
        flat, unravel = ravel(state.mean)
        strategy, params = self._make(flat.size)
        with _lenient():
            candidates, _ = strategy.ask(jax.random.split(key)[0], state.inner, params)
        return jax.vmap(unravel)(candidates)

    def tell(
        self, state: EvosaxState, candidates: Point, fitness: jax.Array, *, key: jax.Array
    ) -> EvosaxState:
        """The strategy's update.

        A candidate whose fitness is not finite counts as the worst of the others, one at infinity
        as the best. Where no fitness is finite, or the strategy's new mean is not, the state stays
        as it is.
        """
        flat, unravel = ravel(state.mean)
        points = jax.vmap(lambda point: ravel(point)[0])(candidates)
        fitness = jnp.asarray(fitness, jnp.float32)
        finite = jnp.isfinite(fitness)
        worst = jnp.min(jnp.where(finite, fitness, jnp.inf))
        best = jnp.max(jnp.where(finite, fitness, -jnp.inf))
        fitness = jnp.where(finite, fitness, jnp.where(jnp.isposinf(fitness), best, worst))
        inner = self._told(state.inner, flat.size, key, points, fitness)
        told = _retyped(inner, state.inner)
        mean = told.mean if hasattr(told, "mean") else told.best_solution
        sound = jnp.any(finite) & jnp.all(jnp.isfinite(mean))
        new = EvosaxState(unravel(mean), _std(told, unravel, flat.size), told)
        return jax.tree.map(lambda x, old: jnp.where(sound, x, old), new, state)

    def converged(self, state: EvosaxState) -> jax.Array:
        """Never: strategies of evosax have no such test."""
        del state
        return jnp.bool_(False)

    def _told(
        self, inner: Any, size: int, key: Any = None, points: Any = None, fitness: Any = None
    ):
        """evosax's state after a generation."""
        strategy, params = self._make(size)
        ask, tell = jax.random.split(jax.random.key(0) if key is None else key)
        with _lenient():
            drawn, inner = strategy.ask(ask, inner, params)
            points = drawn if points is None else points
            losses = jnp.zeros(self.population_size) if fitness is None else -fitness
            return strategy.tell(tell, points, losses, inner, params)[0]

    def _make(self, size: int) -> tuple[Any, Any]:
        return _make(
            self.name, self.population_size, self.noise_std, tuple(self.options.items()), size
        )


def strategies() -> dict[str, Any]:
    """evosax's strategies by name.

    Raises:
      InputError: evosax is not installed, or a version with other functions.
    """
    try:
        found = importlib.import_module("evosax.algorithms").algorithms
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"evosax cannot be imported ({str(error).splitlines()[0]}); install it with "
            "pip install 'grpocem_jax[evosax]'."
        ) from error
    return dict(found)


@functools.lru_cache(maxsize=64)
def _make(
    name: str, population_size: int, noise_std: float, options: tuple[Any, ...], size: int
) -> tuple[Any, Any]:
    """A strategy for vectors of ``size`` numbers, and its parameters."""
    known = strategies()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise InputError(
            f"name={name!r}: evosax has no such strategy; the nearest are "
            f"{', '.join(near or sorted(known))}."
        )
    arguments = inspect.signature(known[name]).parameters
    given = dict(options)
    if "std_schedule" in arguments:
        given.setdefault("std_schedule", optax.constant_schedule(noise_std))
    missing = [
        x
        for x, argument in arguments.items()
        if argument.default is argument.empty and x not in GIVEN and x not in given
    ]
    if missing:
        raise InputError(
            f"name={name!r}: the strategy needs {', '.join(missing)}; give it in options."
        )
    own = {x: given[x] for x in given if x in arguments and x not in GIVEN}
    # A strategy is made once for all traces, so it must not hold values of one.
    with jax.ensure_compile_time_eval(), _lenient():
        try:
            strategy = known[name](population_size=population_size, solution=jnp.zeros(size), **own)
            params = strategy.default_params
        except (AssertionError, TypeError, ValueError) as error:
            raise InputError(
                f"name={name!r}: the strategy refuses its settings "
                f"({(str(error).splitlines() or ['no message'])[0]}); correct population_size or "
                "options."
            ) from error
        fields = {field.name for field in dataclasses.fields(params)}
        if "std_init" in fields:
            params = params.replace(std_init=jnp.full_like(params.std_init, noise_std))
        for option in given.keys() - own.keys():
            if option not in fields:
                choices = sorted(fields | (arguments.keys() - set(GIVEN)))
                raise InputError(
                    f"options.{option}={given[option]!r}: {name} has no such setting; it has "
                    f"{', '.join(choices) or 'none'}."
                )
        changed = {x: given[x] for x in given.keys() - own.keys()}
        params = params.replace(**changed)
    return strategy, params


def _lenient() -> Any:
    """evosax broadcasts arrays of different rank, which a caller may have forbidden."""
    return jax.numpy_rank_promotion("allow")


def ravel(point: Point) -> tuple[jax.Array, Any]:
    """A point as a float32 vector, and the function back to its structure, shapes and dtypes."""
    single = jax.tree.map(lambda x: x.astype(jnp.float32), point)
    flat, unravel = ravel_pytree(single)

    def back(flat: jax.Array) -> Point:
        return jax.tree.map(lambda x, like: x.astype(like.dtype), unravel(flat), point)

    return flat, back


def _has_mean(strategy: Any) -> bool:
    return "mean" in inspect.signature(type(strategy).init).parameters


def _std(inner: Any, unravel: Any, size: int) -> Any:
    std = getattr(inner, "std", None)
    if std is None or np.shape(std) not in ((), (size,)):
        return None
    return unravel(jnp.broadcast_to(std, (size,)))


def _retyped(tree: Any, like: Any) -> Any:
    """Arrays in others' dtypes: evosax's weak types and counters settle after a generation."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, like)
