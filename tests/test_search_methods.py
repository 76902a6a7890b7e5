"""What every search method must do, ours, evosax's and a newcomer's; and how others are refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.config import section
from grpocem_jax.search import (
    CEM,
    Eggroll,
    Evosax,
    GradientAscent,
    HostFitness,
    Problem,
    kernel,
    loop,
)
from grpocem_jax.search.base import check_method, needs
from grpocem_jax.search.spaces import full_space
from grpocem_jax.utils.errors import InputError
from tests.methods import Climber, ClimberState

KEY = jax.random.key(0)
START = {"a": jnp.array([0.5, -0.5, 0.25]), "b": jnp.float16(1.0)}
GOAL = {"a": jnp.array([1.0, -1.0, 0.5]), "b": jnp.float32(0.5)}


METHODS = [
    pytest.param(
        lambda: CEM(population_size=30, noise_std=0.5, momentum=0.0, std_momentum=0.7), id="cem"
    ),
    pytest.param(lambda: GradientAscent(learning_rate=0.1), id="gradient"),
    pytest.param(
        lambda: Eggroll(population_size=30, noise_std=0.2, learning_rate=0.2), id="eggroll"
    ),
    pytest.param(Climber, id="newcomer"),
    *(
        pytest.param(
            lambda name=name: Evosax(name=name, population_size=20, noise_std=0.5),
            id=name,
            marks=pytest.mark.evosax,
        )
        for name in ("Sep_CMA_ES", "CR_FM_NES", "DifferentialEvolution")
    ),
]
every_method = pytest.mark.parametrize("make", METHODS)
# The strategies of evosax go through one adapter of theirs, so that one stands for all.
ours_and_one = pytest.mark.parametrize("make", METHODS[:5])


def quadratic(point, goal, key):
    del key
    return -sum(
        jnp.sum((point[name].astype(jnp.float32) - goal[name]) ** 2) for name in sorted(point)
    )


def generation(method, key, state, fitness=None):
    """One generation; ``fitness`` in place of that of the quadratic."""
    candidates = method.ask(key, state)
    values, gradient = jax.vmap(jax.value_and_grad(lambda x: quadratic(x, GOAL, None)))(candidates)
    told = {"gradient": gradient, "key": key}
    values = values if fitness is None else fitness
    return method.tell(state, candidates, values, **{name: told[name] for name in needs(method)})


def described(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)


def same(x, y):
    chex.assert_trees_all_equal(x, y)


def finite(tree):
    return all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(tree))


@every_method
def test_it_is_accepted_and_begins_at_the_start(make):
    method = make()
    check_method(method, START)
    same(method.init(START).mean, START)
    assert method == make()
    assert hash(method) == hash(make())


@every_method
def test_it_climbs_a_quadratic(make):
    found = loop.maximize(make(), quadratic, full_space(START), GOAL, KEY, generations=80)
    before = float(quadratic(START, GOAL, None))
    assert before == pytest.approx(-(0.25 + 0.25 + 0.0625 + 0.25))
    assert float(quadratic(found.offsets, GOAL, None)) > -5e-3
    assert found.history.best.max() > -5e-3
    assert found.candidates == found.generations * make().population_size


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("bad", ["one", "all"])
def test_fitness_that_is_no_number_does_not_spoil_it(make, bad):
    method = make()
    size = method.population_size

    @jax.jit
    def run(state, spoiled):
        def body(number, state):
            key = jax.random.fold_in(KEY, number)
            values = jax.vmap(lambda x: quadratic(x, GOAL, None))(method.ask(key, state))
            # As the loop gives it to methods.
            values = jnp.where(spoiled, -jnp.inf, values)
            return generation(method, key, state, values)

        return jax.lax.fori_loop(0, 3, body, state)

    spoiled = jnp.arange(size) % 3 == 0 if bad == "one" else jnp.ones(size, bool)
    state = run(method.init(START), spoiled)
    assert finite(state.mean)
    # It goes on from there.
    after = run(state, jnp.zeros(size, bool))
    assert finite(after.mean)
    assert described(after) == described(state)

    def sometimes(point, goal, key):
        value = quadratic(point, goal, key)
        return jnp.where(point["a"][1] > 0, jnp.nan, value)

    found = loop.maximize(method, sometimes, full_space(START), GOAL, KEY, generations=20)
    assert finite(found.offsets)
    assert float(quadratic(found.offsets, GOAL, None)) > float(quadratic(START, GOAL, None))


@every_method
def test_equal_fitness_does_not_spoil_it(make):
    method = make()
    state = method.init(START)
    step = jax.jit(lambda key, state: generation(method, key, state, jnp.full(size, 7.0)))
    size = method.population_size
    for key in jax.random.split(KEY, 5):
        state = step(key, state)
    assert finite(state.mean)


@pytest.mark.slow
@ours_and_one
def test_shapes_and_dtypes_are_those_of_the_start_under_jit_scan_and_vmap(make):
    method = make()
    first = method.init(START)
    candidates = method.ask(KEY, first)
    for x, like in zip(jax.tree.leaves(candidates), jax.tree.leaves(START), strict=True):
        assert (x.shape, x.dtype) == ((method.population_size, *like.shape), like.dtype)
    assert described(first.mean) == described(START)
    assert described(generation(method, KEY, first)) == described(first)
    stop = method.converged(first)
    assert (jnp.shape(stop), jnp.asarray(stop).dtype) == ((), jnp.dtype(bool))
    assert not bool(stop)

    def scanned(key, state):
        return jax.lax.scan(
            lambda state, key: (generation(method, key, state), None),
            state,
            jax.random.split(key, 4),
        )[0]

    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(scanned, (0, None)))(keys, first)
    one = jax.jit(scanned)(keys[1], first)
    close = lambda x, y: np.testing.assert_allclose(  # noqa: E731
        np.float32(x), np.float32(y), rtol=2e-3, atol=2e-3
    )
    jax.tree.map(close, jax.tree.map(lambda x: x[1], together.mean), one.mean)


@pytest.mark.slow
@ours_and_one
def test_it_depends_on_the_key_alone(make):
    method = make()
    first = method.init(START)
    one, again, other = (method.ask(key, first) for key in (KEY, KEY, jax.random.key(1)))
    same(one, again)
    if method.population_size > 1:
        assert bool(jnp.any(one["a"] != other["a"]))
    runs = [
        loop.maximize(method, quadratic, full_space(START), GOAL, key, generations=4)
        for key in (KEY, KEY, jax.random.key(1))
    ]
    same(runs[0].offsets, runs[1].offsets)
    if method.population_size > 1:
        assert bool(jnp.any(runs[0].offsets["a"] != runs[2].offsets["a"]))


@pytest.mark.slow
@ours_and_one
def test_searches_of_several_problems_advance_in_one_program(make):
    method = make()
    keys = jax.random.split(KEY, 5)
    goals = jax.tree.map(lambda x: jnp.stack([x * n for n in (1, 2, -1, 0, 1.5)]), GOAL)

    def found(goal, key):
        problem = Problem.of(quadratic, full_space(START), goal, key)
        return kernel.advance(method, problem, kernel.begin(method, problem, generations=6), 6)

    together = jax.jit(jax.vmap(found))(goals, keys)
    for row in range(5):
        alone = loop.maximize(
            method,
            quadratic,
            full_space(START),
            jax.tree.map(lambda x, row=row: x[row], goals),
            keys[row],
            generations=6,
        )
        assert int(together.generation[row]) == alone.generations
        np.testing.assert_allclose(together.history.best[row], alone.history.best, 2e-3, 2e-3)


@pytest.mark.slow
@ours_and_one
def test_a_fitness_in_python_is_for_methods_that_need_no_gradient(make):
    method = make()

    def judge(adapters, goal, key):
        return np.stack([np.float64(quadratic(x, goal, key)) for x in rows(adapters)])[:, None]

    def rows(adapters):
        return [
            jax.tree.map(lambda x, row=row: x[row], adapters) for row in range(len(adapters["a"]))
        ]

    def run():
        return loop.maximize(
            method, HostFitness(judge), full_space(START), GOAL, KEY, generations=3
        )

    if "gradient" in needs(method):
        with pytest.raises(InputError, match=r"^method=GradientAscent: needs a gradient"):
            run()
        return
    traced = loop.maximize(method, quadratic, full_space(START), GOAL, KEY, generations=3)
    np.testing.assert_allclose(run().history.best, traced.history.best, 2e-3, 2e-3)


# What is refused.


@dataclasses.dataclass(frozen=True)
class Broken(Climber):
    """A `Climber` of which one part is replaced."""

    part: str = "init"
    function: object = None

    def __getattribute__(self, name):
        own = object.__getattribute__(self, "__dict__")
        if name == own.get("part"):
            return own["function"]
        return object.__getattribute__(self, name)


leaked = []
WHOLE = Climber()


def leak(key, state):
    leaked.append(state.size * 2)
    return WHOLE.ask(key, state)


def to_numpy(state, candidates, fitness):
    return WHOLE.tell(state, candidates, np.asarray(fitness))


REFUSED = [
    ("init", None, "has no function init"),
    ("ask", 3, "has no function ask"),
    ("population_size", 0, "population_size=0"),
    ("population_size", "many", "population_size='many'"),
    ("needs", ("hessian",), r"needs=\('hessian',\)"),
    ("init", lambda: None, r"its init raised TypeError .*init\(start\)"),
    ("ask", lambda key: None, r"its ask raised TypeError .*ask\(key, state\)"),
    ("tell", lambda state, candidates: state, r"its tell raised TypeError .*tell\(state, cand"),
    ("init", lambda start: {"x": start}, "its init returned a state without an attribute mean"),
    (
        "init",
        lambda start: ClimberState({"a": start["a"]}, jnp.float32(0)),
        "its init returned mean of another structure",
    ),
    (
        "init",
        lambda start: ClimberState(jax.tree.map(jnp.float32, start), jnp.float32(0)),
        r"its init returned mean with float32\[\] at \['b'\]; it must be float16\[\]",
    ),
    (
        "init",
        lambda start: ClimberState(jax.tree.map(lambda x: x * jnp.nan, start), jnp.float32(0)),
        "its init returned mean of which 4 of 4 numbers are not finite",
    ),
    (
        "ask",
        lambda key, state: jax.tree.map(lambda x: jnp.stack([x] * 3), state.mean),
        r"its ask returned candidates with float32\[3, 3\] .* it must be float32\[12, 3\]",
    ),
    ("ask", leak, "its ask leaks a traced value"),
    ("tell", to_numpy, "its tell raised TracerArrayConversionError"),
    (
        "tell",
        lambda state, candidates, fitness: state._replace(size=fitness),
        r"its tell returned a state with float32\[12\] at .size; it must be float32\[\]",
    ),
    (
        "tell",
        lambda state, candidates, fitness: state._replace(
            mean=jax.tree.map(lambda x: x + (jnp.log(fitness[0] - 1)).astype(x.dtype), state.mean)
        ),
        "its tell returned mean of which 4 of 4 numbers are not finite",
    ),
    ("converged", lambda state: state.size, r"its converged returned a value with float32\[\]"),
    ("converged", lambda state: jnp.zeros(2, bool), r"with bool\[2\]; it must be bool\[\]"),
]


@pytest.mark.parametrize(("part", "function", "reason"), REFUSED)
def test_a_method_that_does_not_keep_to_the_protocol_is_refused_in_one_sentence(
    part, function, reason
):
    class Asks(Broken):
        needs = ()

    method = Asks(part=part, function=function)
    with pytest.raises(InputError, match=rf"^method=Asks: .*{reason}") as error:
        loop.maximize(method, never, full_space(START), GOAL, KEY)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^config\.search\.method='mine:it': "):
        check_method(method, START, name="config.search.method='mine:it'")


def never(point, goal, key):
    raise AssertionError("the fitness was traced")


def test_a_method_that_is_not_hashable_is_refused():
    @dataclasses.dataclass
    class Mutable(Climber.__bases__[0]):
        population_size: int = 4
        init = ask = tell = converged = print

    with pytest.raises(InputError, match=r"^method=Mutable: is not hashable"):
        check_method(Mutable(), START)


# evosax by name.


@pytest.mark.evosax
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "Sep_CMA"}, r"^name='Sep_CMA': evosax has no such strategy; .*Sep_CMA_ES"),
        ({"name": "zzz"}, r"^name='zzz': evosax has no such strategy; .*CMA_ES"),
        ({"name": "RandomSearch"}, r"needs sampling_fn"),
        ({"name": "Open_ES", "population_size": 7}, r"refuses its settings \(Population size must"),
        ({"name": "PSO", "options": {"inertia": 1.0}}, r"^options\.inertia=1\.0: PSO has no such"),
        ({"name": "PSO", "options": {"a": [1]}}, r"^options=\{'a': \[1\]\}: give numbers"),
        ({"name": "PSO", "noise_std": 0.0}, r"^noise_std=0\.0: must be above 0"),
        ({"name": "PSO", "population_size": 4.0}, r"^population_size=4\.0: must be a whole number"),
    ],
)
def test_a_strategy_or_option_that_evosax_lacks_is_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        Evosax(**options)


@pytest.mark.evosax
def test_options_reach_the_strategy():
    half, whole = (
        Evosax(name="DifferentialEvolution", options={"crossover_rate": rate})
        for rate in (0.0, 1.0)
    )
    assert half != whole
    states = [method.init({"x": jnp.zeros(50)}) for method in (half, whole)]
    moved = [
        int(jnp.sum(method.ask(KEY, state)["x"][5] != state.inner.population[5]))
        for method, state in zip((half, whole), states, strict=True)
    ]
    # One coordinate of fifty is always taken from the mutant.
    assert moved == [1, 50]


@pytest.mark.evosax
def test_the_noise_is_the_deviation_of_the_first_candidates():
    for name in ("Sep_CMA_ES", "Open_ES"):
        method = Evosax(name=name, population_size=400, noise_std=0.05)
        drawn = method.ask(KEY, method.init(jnp.full(5, 3.0)))
        assert np.std(drawn) == pytest.approx(0.05, rel=0.1)
        assert np.mean(drawn) == pytest.approx(3.0, abs=0.01)


def test_low_rank_noise_comes_in_pairs_has_variance_one_and_the_rank_asked_for():
    mean = jnp.full((40, 30), 2.0)
    method = Eggroll(population_size=600, noise_std=0.5, rank=2)
    drawn = np.asarray(method.ask(KEY, method.init(mean)), np.float64)
    noise = (drawn - 2.0) / 0.5
    np.testing.assert_allclose(noise[:300], -noise[300:], atol=1e-5)
    assert np.mean(noise[:300] ** 2) == pytest.approx(1.0, rel=0.02)
    ranks = np.linalg.matrix_rank(noise[:3], tol=1e-3)
    assert ranks.tolist() == [2, 2, 2]
    # Where factors would be as many numbers as the matrix, its noise is normal.
    small = Eggroll(population_size=4, rank=2).ask(
        KEY, jax.tree.map(lambda x: x, method.init(mean[:4, :4]))
    )
    assert np.linalg.matrix_rank(np.asarray(small[0]) - 2.0) == 4


def test_the_mean_of_eggroll_moves_by_the_differences_of_pairs():
    method = Eggroll(population_size=4, noise_std=0.5, learning_rate=0.3)
    state = method.init(jnp.zeros(2))
    candidates = 0.5 * jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -2.0]])
    told = method.tell(state, candidates, jnp.array([3.0, 1.0, -3.0, -1.0]))
    # z = f / sqrt(5), so the pairs differ by 6 and 2 of its parts: (3 E_1 + 1 E_2) / 2.
    np.testing.assert_allclose(told.mean, 0.3 * np.array([1.5, 1.0]) / np.sqrt(5), rtol=1e-5)
    # A pair with a fitness that is no number says nothing: z = 1 and -1 for the other.
    told = method.tell(state, candidates, jnp.array([3.0, -jnp.inf, -3.0, -1.0]))
    np.testing.assert_allclose(told.mean, [0.3, 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"population_size": 7}, "^population_size=7: must be even.*take 8"),
        ({"rank": 1.5}, "^rank=1.5: must be a whole number"),
        ({"rank": 0}, "^rank=0: must be at least 1"),
        ({"learning_rate": 0.0}, r"^learning_rate=0\.0: must be above 0"),
    ],
)
def test_settings_of_eggroll_out_of_range_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        Eggroll(**options)


def test_without_evosax_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "evosax.algorithms", None)
    with pytest.raises(InputError, match=r"pip install 'grpocem_jax\[evosax\]'"):
        Evosax(name="Sep_CMA_ES", population_size=31)


def test_the_section_is_added_to_the_names_of_arguments():
    @dataclasses.dataclass
    class Record:
        rank: int = 0
        options: int = 0

    def refused(text):
        with pytest.raises(InputError) as error, section("search", Record):
            raise InputError(text)
        return str(error.value)

    assert refused("rank=0: set rank=1.") == "config.search.rank=0: set config.search.rank=1."
    assert refused("options.x=1: no.") == "config.search.options.x=1: no."
    assert refused("my_rank=0, 'rank=2', /rank=1.") == "my_rank=0, 'rank=2', /rank=1."
