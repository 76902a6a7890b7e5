"""The search: one compiled program, its gate, its history, and the same loop on the host."""

import dataclasses
import math
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.search import CEM, GradientAscent, fitness, gate, loop, spaces
from grpocem_jax.utils.errors import InputError
from tests.runs import OUT_OF_MEMORY

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
        assert batch in ("shown", "held back")
        x = np.asarray(adapters[SITE])
        return -np.sum((x - target) ** 2, -1)[:, None] + np.asarray(spread)

    return evaluate


def run_on_host(evaluate=None, scores=None, key=KEY, method=METHOD, space=SPACE, **options):
    """With ``scores`` there is a gate, and something held back for it."""
    judge = loop.HostFitness(evaluate or host(), scores)
    options = {**SETTINGS, "held_back": None if scores is None else "held back", **options}
    return loop.maximize(method, judge, space, "shown", key, **options)


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


# The search.


@pytest.mark.slow
def test_a_plain_function_without_scores_is_maximised():
    found = run()
    close(found.offsets[SITE], TARGET, 5e-3)
    assert found.returned == "mean"
    assert math.isnan(found.held_back_gain)
    assert (found.generations, found.candidates) == (30, 30 * 40)
    assert not found.converged
    assert found.seconds > 0
    assert found.compile_seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("function", [quadratic, noisy])
def test_a_search_in_chunks_is_the_search_in_one_piece_bit_for_bit(function):
    calls = []
    whole = run(function)
    chunks = run(function, on_chunk=lambda done, history: calls.append((done, history)))
    same(chunks.offsets, whole.offsets)
    same(chunks.history, whole.history)
    # The first of the generations, and at least every tenth.
    assert [done for done, _ in calls] == [1, *range(4, 31, 3), 30]
    for done, history in calls:
        same(history, jax.tree.map(lambda x, n=done: x[:n], whole.history))


@pytest.mark.slow
def test_candidates_scored_in_chunks_give_the_same_search():
    # Two chunks of 16 candidates and one of 8.
    whole, parts = run(noisy), run(noisy, population_chunk=16)
    close(parts.offsets, whole.offsets)
    close(parts.history, whole.history, 1e-4)


def test_the_same_key_gives_the_same_search_and_another_does_not():
    first, again, other = run(noisy), run(noisy), run(noisy, key=jax.random.key(1))
    same((first.offsets, first.history), (again.offsets, again.history))
    assert bool(jnp.all(first.offsets[SITE] != other.offsets[SITE]))


@pytest.mark.slow
def test_weights_of_experts_are_searched():
    experts = [{SITE: jnp.array(x)} for x in ([1.0, 0.0, 0.0], [0.0, 2.0, 0.0])]
    found = run(space=spaces.expert_space(START, experts, per_site=True))
    # The third coordinate is out of reach.
    close(found.offsets[SITE], [TARGET[0], TARGET[1], START[SITE][2]], 5e-3)


def test_the_best_candidate_is_returned_where_asked_for():
    best, mean = run(returned="best"), run()
    same(best.history, mean.history)
    assert best.returned == "best"
    assert math.isnan(best.held_back_gain)
    close(quadratic(best.offsets, TARGET, KEY), best.history.best.max())
    assert bool(jnp.all(best.offsets[SITE] != mean.offsets[SITE]))


def test_the_history_has_one_entry_a_generation():
    found = run(noisy)
    assert {x.shape for x in found.history} == {(30,)}
    assert {x.dtype for x in found.history} == {np.dtype("float32")}
    assert np.all(np.isfinite(found.history[:4]))
    assert np.all(np.isnan(found.history.held_back))
    # By hand: the generations are those of the method, with a key of its own for each.
    state = METHOD.init(SPACE.origin)

    def score(point, key):
        return noisy(spaces.decode(SPACE, point), TARGET, key)

    @jax.jit
    def step(number, state):
        ask_key, fitness_key = jax.random.split(jax.random.fold_in(KEY, number))
        candidates = METHOD.ask(ask_key, state)
        scores = jax.vmap(lambda point: score(point, fitness_key))(candidates)
        state = METHOD.tell(state, candidates, scores)
        deviation = jnp.sqrt(jnp.mean(state.std[SITE] ** 2))
        return state, jnp.stack([scores.max(), scores.mean(), deviation, state.change])

    for number in range(30):
        state, row = step(number, state)
        close(np.array([x[number] for x in found.history[:4]]), row)
    close(found.offsets[SITE], START[SITE] + state.mean[SITE])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [False, True])
def test_convergence_stops_the_search_early_and_is_reported(chunks):
    method = dataclasses.replace(METHOD, threshold=0.02)
    found = run(method=method, on_chunk=(lambda done, history: None) if chunks else None)
    assert found.converged
    assert 3 < found.generations < 30
    assert found.candidates == 40 * found.generations
    assert {x.shape for x in found.history} == {(found.generations,)}
    assert found.history.change[-1] < 0.02
    assert np.all(found.history.change[:-1] >= 0.02)
    same(found.history, jax.tree.map(lambda x: x[: found.generations], run().history))


@pytest.mark.parametrize(("budget", "generations"), [(1e-6, 1), (2.5, 3), (1000.0, 30)])
def test_a_budget_of_time_stops_the_search_after_the_first_generation_at_the_soonest(
    monkeypatch, budget, generations
):
    # The clock stands but between chunks of generations, where a second goes by.
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def tick(done, history):
        del done, history
        now[0] += 1.0

    found = run(budget_s=budget, on_chunk=tick)
    assert found.generations == generations
    assert {x.shape for x in found.history} == {(generations,)}
    assert found.seconds <= budget + 1
    assert not found.converged
    same(found.history, jax.tree.map(lambda x: x[:generations], run().history))


def test_chunks_grow_and_shrink_with_the_time_that_is_left(monkeypatch):
    # A second a generation. After the first, 8.5 - 1 s are left for 7, and then none.
    done = [0]
    advance = loop._advance

    def slow(method, problem, search, limit, **options):
        search = advance(method, problem, search, limit, **options)
        limits.append(int(limit))
        done[0] = int(search.generation)
        return search

    limits = []
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(done[0])))
    monkeypatch.setattr(loop, "_advance", slow)
    found = run(budget_s=8.5)
    # The call with limit 0 compiles; a half second left is one generation more.
    assert limits == [0, 1, 8, 9]
    assert found.generations == 9


def short_of_memory(monkeypatch, limit):
    """Lets no more than ``limit`` candidates be scored at a time."""
    advance = loop._advance

    def attempt(*args, population_chunk, **options):
        if population_chunk > limit:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return advance(*args, population_chunk=population_chunk, **options)

    monkeypatch.setattr(loop, "_advance", attempt)


@pytest.mark.slow
def test_where_memory_runs_out_smaller_chunks_give_the_result_of_such_chunks(monkeypatch, capsys):
    expected = run(noisy, population_chunk=10)
    short_of_memory(monkeypatch, 15)
    found = run(noisy, fit_memory=True)
    same((found.offsets, found.history), (expected.offsets, expected.history))
    assert found.population_chunk == expected.population_chunk == 10
    assert "is lowered from 20 to 10" in capsys.readouterr().err


def test_where_memory_runs_out_unasked_the_search_says_what_to_set(monkeypatch):
    short_of_memory(monkeypatch, 15)
    with pytest.raises(InputError, match=r"out of device memory in the search: .*_chunk=20, or"):
        run(noisy)


@pytest.mark.slow
def test_a_search_that_lives_to_its_budget_is_the_search_without_one_bit_for_bit():
    whole, timed = run(noisy), run(noisy, budget_s=600.0)
    same((timed.offsets, timed.history), (whole.offsets, whole.history))


# One program.


@pytest.fixture(scope="module")
def likelihood(tiny):
    return fitness.Likelihood(tiny.factored, tiny.model)


def text(seed):
    tokens = jax.random.randint(jax.random.key(seed), (2, 10), 0, 61)
    return fitness.Texts(tokens, jnp.ones((2, 10), bool), jnp.ones((2, 10), bool))


TEXT_METHOD = CEM(population_size=8, threshold=0.0)


def search_text(tiny, likelihood, seed, **options):
    space = spaces.full_space(tiny.zero)
    options = {"generations": 3, "held_back": text(seed + 1), **options}
    return loop.maximize(
        TEXT_METHOD, likelihood, space, text(seed), jax.random.key(seed), **options
    )


@pytest.mark.slow
def test_another_text_of_the_same_shape_compiles_nothing(tiny, likelihood):
    first = search_text(tiny, likelihood, 1)
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.block_until_ready((text(2), text(3)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = search_text(tiny, likelihood, 2, gate_z=0.5)
        compiled = len(events)
        jax.jit(lambda x: x + 12345)(1.0)
        assert len(events) > compiled  # the listener does hear of compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == 0
    assert not np.array_equal(first.history.best, second.history.best)


@pytest.mark.slow
def test_nothing_moves_between_host_and_device_during_the_generations(tiny, likelihood):
    space = spaces.full_space(tiny.zero)
    problem = loop.Problem(likelihood, space, text(1), KEY, text(2), jnp.float32(1.0))
    first = loop._begin(TEXT_METHOD, problem, generations=3)
    limit = jnp.int32(3)
    expected = jax.block_until_ready(loop._advance(TEXT_METHOD, problem, first, limit))
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match=r"(?i)disallowed host-to-device"):
            loop._advance(TEXT_METHOD, problem, first, np.int32(3))  # the guard is awake
        again = jax.block_until_ready(loop._advance(TEXT_METHOD, problem, first, limit))
    assert int(again.generation) == 3
    same(again.history, expected.history)
    # Nor is there any call to the host inside the program.
    program = str(jax.make_jaxpr(lambda *x: loop.advance(TEXT_METHOD, *x))(problem, first, limit))
    assert "while" in program
    assert "callback" not in program
    assert "infeed" not in program


@pytest.mark.slow
def test_gradient_ascent_makes_a_text_more_likely(tiny, likelihood):
    method = GradientAscent(learning_rate=0.05)
    space = spaces.full_space(tiny.zero)
    found = loop.maximize(method, likelihood, space, text(1), KEY, generations=8)
    assert (found.generations, found.candidates) == (8, 8)
    assert not found.converged
    measure = jax.jit(lambda *x: likelihood(*x))
    before, after = (float(measure(x, text(1), KEY)) for x in (tiny.zero, found.offsets))
    close(found.history.best[0], before)
    assert np.all(np.diff(found.history.best) > 0)
    assert after > before + 0.05
    np.testing.assert_array_equal(found.history.std, 0)
    np.testing.assert_array_equal(found.history.best, found.history.mean)


# The gate.


def gated(held_back, **options):
    return run(Quadratic(jnp.float32(1.0)), targets(1.0, 1.0, 1.0), held_back=held_back, **options)


@pytest.mark.slow
def test_the_gate_returns_the_start_exactly_where_held_back_data_contradict_the_fitness():
    found = gated(targets(-1.0, -1.2, -0.8))
    assert found.returned == "start"
    assert found.held_back_gain == 0.0
    same(found.offsets, START)
    assert np.all(found.history.held_back < 0)
    # The search itself did go elsewhere.
    assert found.history.best[-1] > -1e-3
    plain = run(held_back=targets(-1.0)[0][0])
    assert plain.returned == "start"
    same(plain.offsets, START)


def test_the_gate_returns_the_mean_where_held_back_data_agree():
    held_back = targets(1.0, 1.1, 0.9)
    found = gated(held_back)
    assert found.returned == "mean"
    # The bound is largest a little before the target, as the spread grows with the way.
    close(found.offsets[SITE], TARGET, 0.15)
    there, here = (
        -np.sum((np.asarray(x[SITE]) - np.asarray(held_back[0])) ** 2, -1)
        for x in (found.offsets, START)
    )
    gains = np.float64(there - here)
    close(found.held_back_gain, gains.mean())
    close(found.history.held_back.max(), gains.mean() - gains.std(ddof=1) / 3**0.5)


def test_the_gate_goes_part_of_the_way_where_that_is_best():
    # On held-back data a quarter of the way is the optimum; without parts of the way, the first
    # mean that passes by.
    found = gated(targets(0.25, 0.25, 0.25))
    assert found.returned == "mean"
    close(found.offsets[SITE], targets(0.25)[0][0], 0.05)


def test_the_more_standard_errors_the_less_passes_the_gate():
    # At the target the gains are 3, -2 and -0.6 times a square: mean 0.13 and a large spread.
    held_back = targets(2.0, -0.5, 0.2)
    assert gated(held_back, gate_z=0.0).returned == "mean"
    assert gated(held_back, gate_z=10.0).returned == "start"


def test_the_gate_heeds_only_scores_that_count():
    against = targets(1.0, 1.0, -9.0, present=[True, True, False])
    assert gated(against).returned == "mean"
    assert gated(targets(1.0, 1.0, -9.0)).returned == "start"
    assert gated(targets(1.0, 1.0, 1.0, present=[False] * 3)).returned == "start"


@pytest.mark.slow
def test_the_gate_has_one_key_that_no_generation_has():
    # Held-back scores that are the key's alone: the same of start and points, so none is better.
    seen = []

    @jax.tree_util.register_static
    class Keyed:
        def __call__(self, offsets, batch, key):
            return quadratic(offsets, TARGET, key)

        def scores(self, offsets, batch, key):
            jax.debug.callback(lambda x: seen.append(tuple(x.tolist())), jax.random.key_data(key))
            return quadratic(offsets, batch, key)[None], jnp.ones(1, bool)

    run(Keyed(), held_back=TARGET, generations=2)
    jax.effects_barrier()
    gate = jax.random.key_data(jax.random.fold_in(KEY, 2))
    assert set(seen) == {tuple(np.asarray(gate).tolist())}


@pytest.mark.parametrize(("chunk", "at_once"), [(0, 3), (2, 2), (1, 1), (40, 3)])
def test_the_gate_scores_no_more_points_at_a_time_than_candidates(chunk, at_once):
    data, function = targets(1.0, 1.1, 0.9), Quadratic(jnp.float32(1.0))
    problem = loop.Problem(function, SPACE, data, KEY, data, jnp.float32(1.0))
    first = loop.begin(METHOD, problem, generations=1)
    program = str(
        jax.make_jaxpr(lambda *x: loop.advance(METHOD, *x, population_chunk=chunk))(
            problem, first, jnp.int32(1)
        )
    )
    # Distances of points, targets and coordinates: [points, 3, 3].
    sizes = {int(n) for n in re.findall(r"f32\[(\d+),3,3\]", program)}
    assert max(n for n in sizes if n <= 3) == at_once


@pytest.mark.slow
def test_scores_of_a_fitness_with_a_field_func_are_used_by_the_gate():
    called = []

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Wrapping:
        func: jax.Array

        def __call__(self, offsets, batch, key):
            return quadratic(offsets, batch, key)

        def scores(self, offsets, batch, key):
            called.append(key)
            return -((offsets[SITE] - batch) ** 2), jnp.ones(3, bool)

    run(Wrapping(jnp.float32(1.0)), held_back=TARGET, generations=1)
    assert called


# Two points on the line, scores of four tokens, of which the third has none in either and the
# fourth none at the start.
POINTS = jnp.array([10.0, 20.0])
BEGINNING = (jnp.array([1.0, 2.0, 9.0, 50.0]), jnp.array([True, True, True, False]))
NEW = (
    jnp.array([[2.0, 5.0, 70.0, 0.0], [2.1, 3.3, -70.0, 99.0]]),
    jnp.array([[True, True, False, True]] * 2),
)
# Gains 1, 3 of the first point and 1.1, 1.3 of the second: means 2 and 1.2.
FIRST, SECOND = np.array([1.0, 3.0]), np.array([1.1, 1.3])


best_of = jax.jit(gate.choose)


def choose(before, z):
    chosen = gate.Chosen(jnp.float32(5.0), jnp.float32(before), jnp.float32(0.5))
    return best_of(chosen, POINTS, NEW, BEGINNING, jnp.float32(z))


def bound(gains, z):
    return gains.mean() - z * gains.std(ddof=1) / len(gains) ** 0.5


@pytest.mark.parametrize(
    ("before", "z", "point", "gain", "largest"),
    [
        (0.0, 0.0, 10.0, 2.0, 2.0),
        # 2 - 1 < 1.2 - 0.1. With ddof 0 the first would win, 2 - 0.707 > 1.2 - 0.071; so it would
        # with all four tokens counted, or without the root of n.
        (0.0, 1.0, 20.0, 1.2, 1.1),
        (1.05, 1.0, 20.0, 1.2, 1.1),
        (1.15, 1.0, 5.0, 0.5, 1.1),
        (0.0, 20.0, 5.0, 0.5, -0.8),
    ],
)
def test_the_choice_is_by_the_lower_confidence_bound_of_the_gain(before, z, point, gain, largest):
    assert largest == pytest.approx(max(bound(FIRST, z), bound(SECOND, z)))
    chosen, found = choose(before, z)
    close(found, largest)
    close(chosen.point, point)
    close(chosen.gain, gain)
    close(chosen.bound, max(before, largest))


@pytest.mark.slow
def test_a_point_with_a_bound_that_is_no_number_is_never_chosen():
    chosen = gate.Chosen(jnp.float32(5.0), jnp.float32(0.0), jnp.float32(0.0))
    values = jnp.array([[jnp.nan, 1.0], [2.0, 2.0]])
    scores = (values, jnp.ones((2, 2), bool))
    start = (jnp.zeros(2), jnp.ones(2, bool))
    after, found = best_of(chosen, POINTS, scores, start, jnp.float32(1.0))
    close((after.point, found), (20.0, 2.0))
    nothing = (values[:1], jnp.ones((1, 2), bool))
    after, found = best_of(chosen, POINTS[:1], nothing, start, jnp.float32(1.0))
    close(after.point, 5.0)
    assert float(found) == -np.inf


def test_the_points_followed_are_at_a_quarter_a_half_and_the_whole_of_the_way():
    points = gate.scaled({"a": jnp.array([4.0, 8.0]), "b": jnp.float16(2.0)})
    close(points, {"a": np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0]]), "b": [0.5, 1.0, 2.0]})
    assert points["b"].dtype == jnp.float16


# On the host.


@pytest.mark.slow
def test_a_search_on_the_host_finds_the_optimum_and_is_the_search_on_the_device():
    calls = []
    found = run_on_host(on_chunk=lambda done, history: calls.append((done, len(history.best))))
    close(found.offsets[SITE], TARGET, 5e-3)
    assert calls == [(n, n) for n in range(1, 31)]
    assert (found.generations, found.candidates) == (30, 30 * 40)
    assert found.returned == "mean"
    assert math.isnan(found.held_back_gain)
    device = run()
    close(found.offsets, device.offsets, 1e-4)
    close(found.history[:4], device.history[:4], 1e-4)


def test_scores_on_the_host_are_averaged_and_nan_abstains():
    # Scores moved by -1, 0, 1 and an absent one have the mean of one score.
    expected = run()
    several = run_on_host(host(spread=(-1.0, 0.0, 1.0, np.nan)))
    close(several.offsets, expected.offsets, 1e-4)
    close(several.history.best, expected.history.best, 1e-4)


def test_a_candidate_without_any_score_on_the_host_is_no_elite():
    # The optimum has a negative second coordinate, where there is no score.
    def evaluate(adapters, batch, key):
        scores = host()(adapters, batch, key)
        return np.where(adapters[SITE][:, 1:2] < 0, np.nan, scores)

    # With so many generations nothing but the edge is left.
    found = run_on_host(evaluate)
    close(found.offsets[SITE], [TARGET[0], 0.0, TARGET[2]], 0.05)
    assert float(found.offsets[SITE][1]) > -1e-3
    assert np.all(np.isfinite(found.history.mean))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "spread", "returned"),
    [
        (1.0, (0.0, 0.1, np.nan), "mean"),
        (-1.0, (0.0, 0.1), "start"),
    ],
)
def test_the_gate_on_the_host(way, spread, returned):
    held_back = host(targets(way)[0][0], spread=spread)
    found = run_on_host(
        scores=held_back,
        generations=10,
    )
    assert found.returned == returned
    if returned == "start":
        same(found.offsets, START)
        assert found.held_back_gain == 0.0
        assert np.all(found.history.held_back < 0)
    else:
        close(found.offsets[SITE], TARGET, 0.2)
        # All scores of a point are moved alike, so there is no spread and the gain is the bound.
        start, end = (
            held_back({SITE: x[SITE][None]}, "held back", KEY)[0, 0] for x in (START, found.offsets)
        )
        close(found.held_back_gain, end - start)
        close(found.history.held_back.max(), end - start)


def test_the_gate_on_the_host_uses_one_key_and_the_fitness_another_each_generation():
    keys, held_back_keys = [], []

    def remember(found):
        def evaluate(adapters, batch, key):
            found.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return host()(adapters, batch, key)

        return evaluate

    run_on_host(remember(keys), remember(held_back_keys), generations=4)
    assert len(set(keys)) == 4
    assert len(held_back_keys) == 5  # the start, and every generation
    assert len(set(held_back_keys)) == 1
    assert not set(held_back_keys) & set(keys)


def test_convergence_and_the_budget_stop_a_search_on_the_host():
    method = dataclasses.replace(METHOD, threshold=0.02)
    found = run_on_host(method=method)
    assert found.converged
    assert found.generations == run(method=method).generations < 30
    soon = run_on_host(budget_s=1e-6)
    assert soon.generations == 1
    assert not soon.converged
    assert {x.shape for x in soon.history} == {(1,)}


@pytest.mark.parametrize(("chunk", "sizes"), [(0, {40}), (16, {16}), (7, {7}), (1, {1})])
def test_candidates_are_given_to_python_in_chunks_of_one_size(chunk, sizes):
    seen = []

    def evaluate(adapters, batch, key):
        seen.append(len(adapters[SITE]))
        return host()(adapters, batch, key)

    found = run_on_host(evaluate, generations=2, population_chunk=chunk)
    assert set(seen) == sizes
    assert len(seen) == 2 * -(-40 // max(sizes))
    same(found.offsets, run_on_host(generations=2).offsets)


def test_one_score_of_each_candidate_may_come_without_an_axis_of_its_own():
    flat = run_on_host(lambda *args: host()(*args)[:, 0], generations=3)
    same(flat.offsets, run_on_host(generations=3).offsets)


@pytest.mark.parametrize(
    "returned",
    [0.5, None, "high", np.zeros(39), np.zeros((40, 2, 2)), np.zeros((40, 0)), [[1.0], [2.0, 3.0]]],
)
def test_scores_in_python_of_another_shape_are_refused(returned):
    with pytest.raises(InputError, match=r"^fitness: returned [^\n]*40 adapters[^\n]*\.$"):
        run_on_host(lambda *args: returned)


def test_compilation_does_not_count_where_the_fitness_is_in_python():
    def compiling(adapters, batch, key):
        jax.jit(lambda x: x + 1)(0.0)  # a new function each time
        return host()(adapters, batch, key)

    found = run_on_host(compiling, generations=2)
    assert found.compile_seconds > 0
    assert found.seconds > 0


# Many problems in one program.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "gated"), [(METHOD, True), (GradientAscent(learning_rate=0.1), False)]
)
def test_two_hundred_searches_in_one_call_are_two_hundred_single_ones(method, gated):
    count, generations = 200, 12
    rng = np.random.default_rng(0)
    goals = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    held = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    starts = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), count)
    # Some searches end early, each at a generation of its own.
    if isinstance(method, CEM):
        method = dataclasses.replace(method, threshold=0.3)

    def found(goal, held, start, key):
        problem = loop.Problem.of(
            noisy, spaces.full_space({SITE: start}), goal, key, held_back=held if gated else None
        )
        search = loop.begin(method, problem, generations=generations)
        # In two calls, as a server does that has others to serve in between.
        search = loop.advance(method, problem, search, 3)
        return loop.advance(method, problem, search, generations)

    together = jax.jit(jax.vmap(found))(goals, held, starts, keys)
    alone = [jax.jit(found)(*each) for each in zip(goals, held, starts, keys, strict=True)]
    alone = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    np.testing.assert_array_equal(together.generation, alone.generation)
    close((together.state.mean, together.best), (alone.state.mean, alone.best), 1e-5)
    close(together.chosen, alone.chosen, 1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-4), *[
        x.history for x in (together, alone)
    ])  # fmt: skip
    assert len(np.unique(together.generation)) > (1 if isinstance(method, CEM) else 0)
    assert len(np.unique(together.state.mean[SITE], axis=0)) == count
    # And they are those of the driver.
    for row in (0, 57, 199):
        single = loop.maximize(
            method,
            noisy,
            spaces.full_space({SITE: starts[row]}),
            goals[row],
            keys[row],
            generations=generations,
            held_back=held[row] if gated else None,
        )
        assert single.generations == int(together.generation[row])
        close(single.final[SITE], starts[row] + together.state.mean[SITE][row])
        if gated:
            close(single.offsets[SITE], starts[row] + together.chosen.point[SITE][row])


# Settings.


@pytest.mark.parametrize("where", [run, run_on_host])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generations", 0),
        ("gate_z", -1.0),
        ("returned", "x"),
        ("budget_s", 0.0),
        ("budget_s", -1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(where, field, value):
    with pytest.raises(InputError, match=rf"^{field}={value!r}: [^\n]*\.$"):
        where(**{field: value})


@pytest.mark.slow
def test_random_search_uses_all_its_generations():
    found = run(method=dataclasses.replace(METHOD, momentum=1.0, threshold=5e-3), generations=5)
    assert (found.generations, found.converged) == (5, False)


def test_scores_of_an_object_that_is_no_pytree_are_used_by_the_gate():
    called = []

    class Plain:
        def __call__(self, offsets, batch, key):
            return quadratic(offsets, batch, key)

        def scores(self, offsets, batch, key):
            called.append(key)
            return -((offsets[SITE] - batch) ** 2), jnp.ones(3, bool)

    run(Plain(), held_back=TARGET, generations=1)
    assert called


def test_the_smallest_budget_is_one_generation():
    assert [run(budget_s=1e-9).generations for _ in range(20)] == [1] * 20


@pytest.mark.slow
def test_a_converged_search_reports_its_last_chunk_once():
    calls = []
    method = dataclasses.replace(METHOD, threshold=1e9)
    run(method=method, generations=10, on_chunk=lambda done, history: calls.append(done))
    assert calls == [1]


@pytest.mark.slow
def test_the_end_of_a_gated_search_is_kept_and_is_what_no_gate_returns():
    found = gated(targets(-1.0, -1.2, -0.8))
    free = gated(None)
    assert found.returned == "start"
    same(found.final, free.offsets)
    same(free.final, free.offsets)
