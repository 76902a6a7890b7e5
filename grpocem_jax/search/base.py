"""What a search method is, and how one is checked before a search with it is compiled.

A method proposes candidates and learns from their fitness; it is a record of settings and pure
functions of a state.  Everything else belongs to the loop (`grpocem_jax.search.loop`): scoring in
chunks and on several devices, random numbers, the best candidate ever seen, the count of
generations, the gate, and when to stop.  So any optimizer with these four functions can be used,
and nothing has to be inherited from.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError

Point: TypeAlias = Any
"""A pytree of float arrays: a point of the space that is searched."""

State: TypeAlias = Any
"""What a method knows between generations, see `SearchMethod`."""

NEEDS = ("gradient", "key")
"""What a method may ask to be told beside the fitness, see `SearchMethod`."""


class SearchMethod(Protocol):
    """A search method, duck-typed: `CEM`, `GradientAscent`, `Evosax`, or one of your own.

    All four functions are traced by JAX, so they must be pure.  Methods are static arguments of
    compiled programs, hence hashable; a frozen dataclass of settings is the usual form.  Two that
    compare equal share their programs.

    A state is a pytree of arrays whose structure, shapes and dtypes never change.  It must have an
    attribute ``mean``, a `Point` like the start: where the search stands.  It may have ``std``, the
    standard deviations of the candidates, of which the history keeps the root mean square.

    A method may also have an attribute ``needs``, a tuple of names in `NEEDS`.  `tell` then gets
    each as a keyword:

      gradient: of the fitness at every candidate, a `Point` with a leading axis
        ``population_size``.  Such a method can only be used where the fitness is differentiable.
      key: the PRNG key that `ask` was given in this generation.

    Attributes:
      population_size: candidates of a generation, at least 1.
    """

    @property
    def population_size(self) -> int:
        """Candidates of a generation, at least 1."""

    def init(self, start: Point) -> State:
        """The state before the first generation, with ``mean`` at ``start``."""

    def ask(self, key: jax.Array, state: State) -> Point:
        """The candidates of a generation.

        Args:
          key: PRNG key; consumed.
          state: the state.

        Returns:
          points with a leading axis ``population_size``, in the start's dtypes.
        """

    @property
    def tell(self) -> Callable[..., State]:
        """``(state, candidates, fitness, **needs) -> state``, the next state.

        Args:
          state: the state that was asked.
          candidates: what `ask` returned.
          fitness: to be maximised; float32 ``[population_size]``.  The loop gives -inf to a
            candidate whose fitness is NaN, which must not spoil the state.
        """

    def converged(self, state: State) -> jax.Array:
        """Whether to stop before the generations are used up; bool ``[]``."""


def needs(method: SearchMethod) -> tuple[str, ...]:
    """What the method asks to be told beside the fitness, some of `NEEDS`."""
    return tuple(getattr(method, "needs", ()))


def check_method(method: SearchMethod, start: Point, *, name: str = "") -> None:
    """Refuses a method that cannot be searched with from ``start``.

    Its functions are traced without being compiled, and then run once, on fitness that tells the
    candidates apart; the fitness of the search itself is not called.

    Args:
      method: the method.
      start: the point at which the search will start.
      name: what to call the method in messages.

    Raises:
      InputError: one of its functions is missing, raises, cannot be traced, leaks a traced value,
        or returns something else than `SearchMethod` says; a mean that is not finite.
    """
    name = name or f"method={type(method).__name__}"
    for part in ("init", "ask", "tell", "converged"):
        if not callable(getattr(method, part, None)):
            _refuse(name, "", f"has no function {part}; it must have init, ask, tell and converged")
    size = getattr(method, "population_size", None)
    if not isinstance(size, int | np.integer) or size < 1:
        _refuse(name, "", f"has population_size={size!r}; it must be an integer of at least 1")
    asked = getattr(method, "needs", ())
    if not isinstance(asked, tuple | list) or not set(asked) <= set(NEEDS):
        _refuse(name, "", f"has needs={asked!r}; it must be a tuple of some of {', '.join(NEEDS)}")
    try:
        hash(method)
    except TypeError:
        _refuse(name, "", "is not hashable; make it a frozen dataclass, or give it a __hash__")
    leaves, structure = jax.tree.flatten(start)
    hashable: Any = method
    _check_once(hashable, structure, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves), name)


@functools.lru_cache(maxsize=256)
def _check_once(method: Any, structure: Any, arrays: tuple[Any, ...], name: str) -> None:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]
    start = jax.tree.unflatten(structure, leaves)
    size = int(method.population_size)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), start)
    key = jax.eval_shape(lambda: jax.random.key(0))
    told: dict[str, Any] = {"gradient": many, "key": key}
    told = {part: told[part] for part in needs(method)}
    fitness = jax.ShapeDtypeStruct((size,), jnp.float32)

    state = _traced(method, "init", name, start)
    if not hasattr(state, "mean"):
        _refuse(name, "init", "returned a state without an attribute mean")
    _compare(name, "init", "mean", state.mean, "the start", start)
    candidates = _traced(method, "ask", name, key, state)
    _compare(name, "ask", "candidates", candidates, f"{size} points", many)
    after = _traced(method, "tell", name, state, candidates, fitness, **told)
    _compare(name, "tell", "a state", after, "the state it was given", state)
    stop = _traced(method, "converged", name, state)
    _compare(name, "converged", "a value", stop, "one bool", jax.ShapeDtypeStruct((), jnp.bool_))

    # Once for real, on a fitness with a rank for every candidate.
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), start)
    drawn = jax.random.key(0)
    began = _run(method, "init", name, zeros)
    _finite(name, "init", "mean", began.mean)
    asked = _run(method, "ask", name, drawn, began)
    _finite(name, "ask", "candidates", asked)
    values = np.linspace(0, 1, size, dtype=np.float32)
    given = {"gradient": jax.tree.map(jnp.ones_like, asked), "key": drawn}
    given = {part: given[part] for part in needs(method)}
    ended = _run(method, "tell", name, began, asked, values, **given)
    _finite(name, "tell", "mean", ended.mean)


def _traced(method: SearchMethod, part: str, name: str, *args: Any, **told: Any) -> Any:
    function = getattr(method, part)
    try:
        with jax.checking_leaks():
            return jax.eval_shape(function, *args, **told)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the method's own code may raise
        kind, message = user_code.failure(error)
        first = message.splitlines()[0]
        if "leaked" in message.lower():
            _refuse(name, part, "leaks a traced value; it must be pure and keep nothing", error)
        _refuse(
            name,
            part,
            f"raised {kind} ({first}); it is called as {CALLS[part]} and must be traceable by JAX",
            error,
        )


def _run(method: SearchMethod, part: str, name: str, *args: Any, **told: Any) -> Any:
    try:
        return jax.jit(getattr(method, part))(*args, **told)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the method's own code may raise
        kind, message = user_code.failure(error)
        _refuse(name, part, f"raised {kind} ({message.splitlines()[0]}); correct it", error)


CALLS: Mapping[str, str] = {
    "init": "init(start)",
    "ask": "ask(key, state)",
    "tell": "tell(state, candidates, fitness), with its needs as keywords,",
    "converged": "converged(state)",
}


def _compare(name: str, part: str, what: str, found: Any, like: str, wanted: Any) -> None:
    """Refuses arrays of another structure, shape or dtype than wanted."""
    own: Any = jax.tree.structure(found)
    if own != jax.tree.structure(wanted):
        _refuse(name, part, f"returned {what} of another structure than {like}; make them equal")
    flat = jax.tree_util.tree_flatten_with_path(found)[0]
    for (path, x), y in zip(flat, jax.tree.leaves(wanted), strict=True):
        got = f"{x.dtype}{list(x.shape)}"
        if got != f"{y.dtype}{list(y.shape)}":
            place = jax.tree_util.keystr(path)
            _refuse(
                name,
                part,
                f"returned {what} with {got}{f' at {place}' if place else ''}; it must be "
                f"{y.dtype}{list(y.shape)}, as {like}",
            )


def _finite(name: str, part: str, what: str, found: Any) -> None:
    bad = sum(int(np.sum(~np.isfinite(np.asarray(x, np.float64)))) for x in jax.tree.leaves(found))
    if bad:
        count = sum(np.size(x) for x in jax.tree.leaves(found))
        _refuse(
            name, part, f"returned {what} of which {bad} of {count} numbers are not finite; "
            "return finite ones"
        )  # fmt: skip


def _refuse(name: str, part: str, what: str, cause: BaseException | None = None) -> NoReturn:
    raise InputError(f"{name}: its {part} {what}." if part else f"{name}: {what}.") from cause


def check_start(start: Point) -> Point:
    """A start as arrays.

    Raises:
      InputError: no array in it, or one that is not of floats.
    """
    arrays = jax.tree.map(jnp.asarray, start)
    leaves = jax.tree.leaves(arrays)
    if not leaves:
        raise InputError(f"start={start!r}: holds no array; give a pytree of float arrays.")
    for x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(
                f"start: an array of {x.dtype} cannot be searched; give float arrays, such as "
                "start.astype(jnp.float32)."
            )
    return arrays


def norm(point: Point) -> jax.Array:
    """Euclidean norm of a point; float32 ``[]``."""
    squares = (jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(point))
    return jnp.sqrt(jnp.asarray(sum(squares), jnp.float32))


def describe(method: SearchMethod, generations: int) -> str:
    """A method and its length for a screen, such as "CEM, 50 generations of 100 candidates"."""
    own = getattr(method, "label", type(method).__name__)
    size = method.population_size
    if size == 1:
        return f"{own}, {generations} steps"
    return f"{own}, {generations} generations of {size} candidates"


def rank_fitness(fitness: Any) -> jax.Array:
    """Fitness as the loop gives it to methods: float32, -inf where it is NaN."""
    fitness = jnp.asarray(fitness)
    return jnp.where(jnp.isnan(fitness), -jnp.inf, fitness).astype(jnp.float32)


__all__ = ["NEEDS", "Point", "SearchMethod", "State", "check_method"]
