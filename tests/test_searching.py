"""The search: one compiled program, its history, and the same loop on the host."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.search import CEM, GradientAscent, drivers, fitness, kernel, loop, spaces
from grpocem_jax.utils.errors import InputError
from tests.runs import OUT_OF_MEMORY
from tests.searches import (
    KEY,
    METHOD,
    SITE,
    SPACE,
    START,
    TARGET,
    close,
    host,
    noisy,
    quadratic,
    run,
    run_on_host,
    same,
)

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


def test_the_largest_fitness_of_the_history_may_be_infinite_and_is_never_nan():
    def endless(offsets, target, key):
        first = offsets[SITE][0]
        return jnp.where(first > 0, jnp.inf, jnp.where(first < -0.5, jnp.nan, -1.0))

    history = run(endless).history
    assert history.best[0] == np.inf
    assert history.mean[0] == -1.0


def test_the_history_has_one_entry_a_generation():
    found = run(noisy)
    assert {x.shape for x in found.history} == {(30,)}
    assert {x.dtype for x in found.history} == {np.dtype("float32")}
    assert np.all(np.isfinite(found.history[:4]))
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
    advance = drivers._advance

    def slow(method, problem, search, limit, **options):
        search = advance(method, problem, search, limit, **options)
        limits.append(int(limit))
        done[0] = int(search.generation)
        return search

    limits = []
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(done[0])))
    monkeypatch.setattr(drivers, "_advance", slow)
    found = run(budget_s=8.5)
    # The call with limit 0 compiles; a half second left is one generation more.
    assert limits == [0, 1, 8, 9]
    assert found.generations == 9


def short_of_memory(monkeypatch, limit):
    """Lets no more than ``limit`` candidates be scored at a time."""
    advance = drivers._advance

    def attempt(*args, population_chunk, **options):
        if population_chunk > limit:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return advance(*args, population_chunk=population_chunk, **options)

    monkeypatch.setattr(drivers, "_advance", attempt)


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
    options = {"generations": 3, **options}
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
        second = search_text(tiny, likelihood, 2)
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
    problem = kernel.Problem(likelihood, space, text(1), KEY)
    first = drivers._begin(TEXT_METHOD, problem, generations=3)
    limit = jnp.int32(3)
    expected = jax.block_until_ready(drivers._advance(TEXT_METHOD, problem, first, limit))
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match=r"(?i)disallowed host-to-device"):
            drivers._advance(TEXT_METHOD, problem, first, np.int32(3))  # the guard is awake
        again = jax.block_until_ready(drivers._advance(TEXT_METHOD, problem, first, limit))
    assert int(again.generation) == 3
    same(again.history, expected.history)
    # Nor is there any call to the host inside the program.
    program = str(jax.make_jaxpr(lambda *x: kernel.advance(TEXT_METHOD, *x))(problem, first, limit))
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
@pytest.mark.parametrize("method", [METHOD, GradientAscent(learning_rate=0.1)])
def test_two_hundred_searches_in_one_call_are_two_hundred_single_ones(method):
    count, generations = 200, 12
    rng = np.random.default_rng(0)
    goals = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    starts = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), count)
    # Some searches end early, each at a generation of its own.
    if isinstance(method, CEM):
        method = dataclasses.replace(method, threshold=0.3)

    def found(goal, start, key):
        problem = kernel.Problem.of(noisy, spaces.full_space({SITE: start}), goal, key)
        search = kernel.begin(method, problem, generations=generations)
        # In two calls, as a server does that has others to serve in between.
        search = kernel.advance(method, problem, search, 3)
        return kernel.advance(method, problem, search, generations)

    together = jax.jit(jax.vmap(found))(goals, starts, keys)
    alone = [jax.jit(found)(*each) for each in zip(goals, starts, keys, strict=True)]
    alone = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    np.testing.assert_array_equal(together.generation, alone.generation)
    close((together.state.mean, together.best), (alone.state.mean, alone.best), 1e-5)
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
        )
        assert single.generations == int(together.generation[row])
        close(single.final[SITE], starts[row] + together.state.mean[SITE][row])


# Settings.


@pytest.mark.parametrize("where", [run, run_on_host])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generations", 0),
        ("generations", 3.0),
        ("population_chunk", 7.0),
        ("population_chunk", -1),
        ("returned", "x"),
        ("budget_s", 0.0),
        ("budget_s", -1.0),
        ("budget_s", "long"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(where, field, value):
    with pytest.raises(InputError, match=rf"^{field}={value!r}: [^\n]*\.$"):
        where(**{field: value})


@pytest.mark.parametrize("where", [run, run_on_host])
def test_offsets_for_a_space_are_named(where):
    with pytest.raises(InputError, match=r"^space: is dict, not a Space; full_space\(offsets\)"):
        where(space=START)


@pytest.mark.parametrize("method", [METHOD, GradientAscent()])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda *args: quadratic(*args)[None], r"shape \(1,\)"),
        (lambda *args: [quadratic(*args)], "list"),
        (lambda *args: None, "NoneType"),
    ],
)
def test_a_fitness_of_more_than_one_number_is_named(method, function, said):
    with pytest.raises(InputError, match=f"^fitness: returned {said} for a candidate; it must"):
        run(function, method=method)


@pytest.mark.slow
def test_random_search_uses_all_its_generations():
    found = run(method=dataclasses.replace(METHOD, momentum=1.0, threshold=5e-3), generations=5)
    assert (found.generations, found.converged) == (5, False)


def test_the_smallest_budget_is_one_generation():
    assert [run(budget_s=1e-9).generations for _ in range(20)] == [1] * 20


@pytest.mark.slow
def test_a_converged_search_reports_its_last_chunk_once():
    calls = []
    method = dataclasses.replace(METHOD, threshold=1e9)
    run(method=method, generations=10, on_chunk=lambda done, history: calls.append(done))
    assert calls == [1]
