"""Many searches side by side, each in a lane of its own.

`loop.maximize` runs one search of one problem in one program.  Here the searches of many users,
each with texts, a key and a length of its own, come and go between generations.  A generation asks
in all lanes at once, scores the texts of all of them page by page (`rows`), and tells in all lanes
at once.  In each lane it is that of `kernel.advance`: its fitness is the sum over its own texts by
the number of their tokens that count, whatever other texts are in the page.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax.search import fitness, gate, kernel, rows
from grpocem_jax.search.base import Point, SearchMethod, needs
from grpocem_jax.search.rows import Page, Row
from grpocem_jax.search.spaces import Space, decode
from grpocem_jax.utils import devices


class Progress(NamedTuple):
    """Where the searches are, on the host, ``[L]`` each.

    Attributes:
      generation: generations run, int32.
      ended: whether the method stopped before the generations were used up, bool.
      best: largest fitness so far, float32; -inf before the first generation.
      mean: mean fitness of the last generation, float32; NaN before the first.
    """

    generation: np.ndarray
    ended: np.ndarray
    best: np.ndarray
    mean: np.ndarray


class _Sums(NamedTuple):
    """Log-likelihood of the candidates of all lanes, ``[L, P]``, and its gradient where needed."""

    values: jax.Array
    gradients: Point | None


class Lanes:
    """Searches by one method in one space, advanced together.

    Args:
      method: the search method.
      score: the likelihood.
      space: where; every search starts at its origin.
      lanes: how many searches at once, ``L``.
      generations: the longest search.
      mesh: devices among which the rows of a page are divided where their number allows it.
      tokens: about so many are scored at a time for one candidate; 0 for as many as run fastest.
    """

    def __init__(
        self,
        method: SearchMethod,
        score: fitness.Likelihood,
        space: Space,
        *,
        lanes: int,
        generations: int,
        mesh: Mesh | None = None,
        tokens: int = 0,
    ):
        self.method, self.score, self.mesh = method, score, mesh
        self.space = devices.replicate(mesh, space)
        self.lanes, self.generations = lanes, generations
        self.tokens = tokens or (512 if jax.default_backend() == "cpu" else 4096)
        problem = kernel.Problem(None, self.space, None, jax.random.key(0))
        self._fresh = kernel.begin(method, problem, generations=generations)
        search = jax.tree.map(lambda x: jnp.stack([x] * lanes), self._fresh)
        keys = jnp.stack([problem.key] * lanes)
        self.search, self._keys = devices.replicate(mesh, (search, keys))
        self._limits = np.zeros(lanes, np.int32)
        self._counts = np.ones(lanes, np.float32)
        self._rows: dict[int, list[Row]] = {}
        self._pages: list[Page] | None = []
        self._asked: tuple[jax.Array, Point] | None = None
        self._left: list[tuple[Page, int]] = []

    @property
    def at_once(self) -> int:
        """How many candidates of a text are scored at a time, at most."""
        size = self.method.population_size
        return 1 if "gradient" in needs(self.method) else fitness.chunk(size, self.tokens)

    def place(self, lane: int, own: Sequence[Row], key: jax.Array, limit: int) -> None:
        """Puts a search into a lane, in place of what was there.

        Args:
          lane: which.
          own: its texts.
          key: PRNG key; consumed.
          limit: generations, from 1 to the longest search.
        """
        self.search, self._keys = _place(self.search, self._keys, self._fresh, key, lane)
        self._limits[lane] = limit
        self._counts[lane] = sum(int(row.scored.sum()) for row in own)
        self._rows[lane] = list(own)
        self._pages = None

    def clear(self, lane: int) -> None:
        """Frees a lane, or lets it rest: its search stays where it is."""
        self._limits[lane] = 0
        if self._rows.pop(lane, None) is not None:
            self._pages = None

    def advance(self, pieces: int | None = None) -> tuple[int, bool]:
        """Runs a generation of every search that has one left, or a piece of it.

        Args:
          pieces: how many pieces at most, each a page with a few candidates; None for all.

        Returns:
          how many there were, and whether the generation is through. Where it is not, the next call
          goes on with it, and no search may be placed before.
        """
        if self._asked is None:
            if self._pages is None:
                own = [(lane, row) for lane, held in sorted(self._rows.items()) for row in held]
                self._pages = [page for page, _ in self._lay_out(own)]
            *asked, self._sums = _ask(self._keys, self.search, method=self.method)
            self._asked = tuple(asked)
            population = self.method.population_size
            self._left = [
                (page, first)
                for page in self._pages
                for first in range(0, population, self._size(page))
            ]
        now = self._left[:pieces]
        for page, first in now:
            self._sums = _score(
                self._sums,
                self.score,
                self.space,
                self._asked[1],
                page,
                first,
                gradient="gradient" in needs(self.method),
                size=self._size(page),
            )
        self._left = self._left[len(now) :]
        if self._left:
            return len(now), False
        self.search = _tell(
            self.search, *self._asked, self._sums, self._limits, self._counts, method=self.method
        )
        self._asked = None
        return len(now), True

    def reset(self) -> None:
        """Empties all lanes, and forgets a generation that is not through."""
        self._asked = None
        for lane in list(self._rows):
            self.clear(lane)

    def progress(self) -> Progress:
        """Where the searches are; waits for them."""
        return Progress(*jax.device_get(_progress(self.search, method=self.method)))

    def history(self, lane: int) -> kernel.History:
        """The generations that a lane has had, on the host."""
        history, done = jax.device_get(take((self.search.history, self.search.generation), lane))
        return jax.tree.map(lambda x: x[:done], history)

    def points(self, returned: str) -> Point:
        """Where the searches are, by one of `kernel.FOLLOWED`: a leading axis ``L``."""
        return kernel.followed(self.search, returned)

    def origins(self) -> Point:
        """The origin in every lane."""
        return jax.tree.map(jnp.zeros_like, self.search.best)

    def scores(self, points: Point, asked: Sequence[tuple[int, Row]]) -> list[np.ndarray]:
        """Log-likelihoods of texts with other points than their searches ask about.

        Args:
          points: a point for each lane, a leading axis ``L``.
          asked: texts, each with the lane whose point is wanted.

        Returns:
          for each text the log-likelihoods of the tokens that count, float32.
        """
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(asked)
        pages = self._lay_out(asked, parts=1)  # rarely: few programs are worth more than speed
        values = [_score_points(self.score, self.space, points, page) for page, _ in pages]
        for (_, places), (logps, scored) in zip(pages, jax.device_get(values), strict=True):
            for place, i in enumerate(places):
                found[i] = logps[place][scored[place]]
        return found

    def judge(
        self,
        pairs: Sequence[tuple[int, int]],
        points: Point,
        own: Mapping[int, Sequence[Row]],
        before: Mapping[int, np.ndarray],
        z: float,
    ) -> list[gate.Verdict]:
        """What the gate says of searches of two halves, each judged on the other's texts.

        Args:
          pairs: the two lanes of each.
          points: as in `scores`.
          own: texts of each lane.
          before: log-likelihoods of their tokens at the start.
          z: standard errors that the gate takes off.
        """
        asked = [
            (judged, row)
            for pair in pairs
            for lane, judged in (pair, pair[::-1])
            for row in own[lane]
        ]
        scaled = _scaled(points)
        values = [
            self.scores(jax.tree.map(lambda x, i=i: x[:, i], scaled), asked)
            for i in range(1, 1 + len(gate.SCALES))
        ]
        verdicts, start = [], 0
        for pair in pairs:
            end = start + sum(len(own[lane]) for lane in pair)
            parts = [np.concatenate([before[lane] for lane in pair])]
            parts += [np.concatenate(part[start:end]) for part in values]
            verdicts.append(_verdict(np.stack(parts), z))
            start = end
        return verdicts

    def spread(self, points: Mapping[int, Point]) -> Point:
        """A point for each lane, the origin where none is given."""
        found = self.origins()
        for lane, point in points.items():
            found = _put(found, point, lane)
        return found

    def _lay_out(
        self, own: Sequence[tuple[int, Row]], *, parts: int = rows.PARTS
    ) -> list[tuple[Page, list[int]]]:
        found = rows.lay_out(own, lanes=self.lanes, tokens=self.tokens, parts=parts)
        if self.mesh is None:
            return [(jax.device_put(page), places) for page, places in found]
        return [(devices.divide(self.mesh, page), places) for page, places in found]

    def _size(self, page: Page) -> int:
        # A backward pass holds the activations of the forward pass.
        size = self.method.population_size
        return 1 if "gradient" in needs(self.method) else fitness.population_chunk(size, page.texts)


def _verdict(values: np.ndarray, z: float) -> gate.Verdict:
    """The gate's verdict by values ``[4, N]``, padded to one of a few lengths."""
    count = values.shape[1]
    size = 1 << max(4, (count - 1).bit_length())
    padding = ((0, 0), (0, size - count))
    present = np.pad(np.ones_like(values, bool), padding)
    return gate.judge(np.pad(values, padding), present, z)


@jax.jit
def _place(
    search: kernel.SearchState,
    keys: jax.Array,
    fresh: kernel.SearchState,
    key: jax.Array,
    lane: int,
) -> tuple[kernel.SearchState, jax.Array]:
    return _put(search, fresh, lane), keys.at[lane].set(key)


@jax.jit
def take(tree: Any, lane: int) -> Any:
    """What arrays with a leading axis ``L`` hold of one lane."""
    return jax.tree.map(lambda x: x[lane], tree)


@jax.jit
def _put(tree: Any, one: Any, lane: int) -> Any:
    return jax.tree.map(lambda x, new: x.at[lane].set(new), tree, one)


@functools.partial(jax.jit, static_argnames="method")
def _ask(
    keys: jax.Array, search: kernel.SearchState, *, method: SearchMethod
) -> tuple[jax.Array, Point, _Sums]:
    """Keys and candidates of a generation in each lane, and the sums before the first page."""

    def one(key: jax.Array, search: kernel.SearchState) -> tuple[jax.Array, Point]:
        ask_key, _ = kernel.generation_keys(key, search.generation)
        return ask_key, method.ask(ask_key, search.state)

    asked, candidates = jax.vmap(one)(keys, search)
    values = jnp.zeros((len(keys), method.population_size), jnp.float32)
    gradient = "gradient" in needs(method)
    return (
        asked,
        candidates,
        _Sums(values, jax.tree.map(jnp.zeros_like, candidates) if gradient else None),
    )


@functools.partial(jax.jit, static_argnames=("gradient", "size"))
def _score(
    sums: _Sums,
    score: fitness.Likelihood,
    space: Space,
    candidates: Point,
    page: Page,
    first: int,
    *,
    gradient: bool,
    size: int,
) -> _Sums:
    """Adds what the texts of a page have to say of some candidates of their lanes.

    Those are ``size`` from ``first`` on, or as many as there are.
    """

    def total(point: Point, text: fitness.Texts) -> jax.Array:
        return jnp.sum(score.of_text(decode(space, point), text)[0])

    def of_candidate(number: jax.Array) -> tuple[jax.Array, Point | None]:
        own = jax.tree.map(lambda x: x.at[page.lane, number].get(mode="clip"), candidates)
        if gradient:
            return jax.vmap(jax.value_and_grad(total))(own, page.texts)
        return jax.vmap(total)(own, page.texts), None

    numbers = first + jnp.arange(size)

    def add(sums: jax.Array, more: jax.Array) -> jax.Array:
        return sums.at[page.lane[None], numbers[:, None]].add(more, mode="drop")

    more = jax.vmap(of_candidate)(numbers)
    return jax.tree.map(add, sums, _Sums(*more))


@functools.partial(jax.jit, static_argnames="method")
def _tell(
    search: kernel.SearchState,
    keys: jax.Array,
    candidates: Point,
    sums: _Sums,
    limits: jax.Array,
    counts: jax.Array,
    *,
    method: SearchMethod,
) -> kernel.SearchState:
    """The searches after a generation; as they were where none was left."""

    def one(search, key, candidates, sums, limit, count):
        mean = jax.tree.map(lambda x: x / count, sums)
        after = kernel.told(method, search, key, candidates, mean.values, mean.gradients)
        goes_on = (search.generation < limit) & ~method.converged(search.state)
        return jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after, search)

    return jax.vmap(one)(search, keys, candidates, sums, limits, counts)


@jax.jit
def _score_points(
    score: fitness.Likelihood, space: Space, points: Point, page: Page
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods of a page's texts at the points of its lanes, and which count, ``[R, M]``."""
    own = jax.tree.map(lambda x: x.at[page.lane].get(mode="clip"), points)

    def one(point: Point, text: fitness.Texts) -> tuple[jax.Array, jax.Array]:
        return score.of_text(decode(space, point), text)

    return jax.vmap(one)(own, page.texts)


@functools.partial(jax.jit, static_argnames="method")
def _progress(search: kernel.SearchState, *, method: SearchMethod) -> tuple[jax.Array, ...]:
    def one(search: kernel.SearchState) -> tuple[jax.Array, ...]:
        last = jnp.maximum(search.generation - 1, 0)
        ended = method.converged(search.state)
        return search.generation, ended, search.best_fitness, search.history.mean[last]

    return jax.vmap(one)(search)


_scaled = jax.jit(jax.vmap(gate.scaled))
