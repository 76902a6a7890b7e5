"""The Cross-Entropy Method: its update by hand, ties, NaN, options, and that it finds optima."""

import dataclasses
import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpocem_jax.search import CEM, GradientAscent, cem
from grpocem_jax.utils.errors import InputError

KEY = jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), 3)
NAN = float("nan")
# The settings are static, so these are one program for each kind of them.
ask = jax.jit(CEM.ask, static_argnums=0)
tell = jax.jit(CEM.tell, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def step(settings, key, state, fitness):
    """One generation, and the fitness of its candidates."""
    ask_key, fitness_key = jax.random.split(key)
    candidates = settings.ask(ask_key, state)
    values = jax.vmap(lambda point: fitness(point, fitness_key))(candidates)
    return settings.tell(state, candidates, values), values


def method(population=4, elites=2, **options):
    options = {"momentum": 0.0, "noise_std": 0.5, **options}
    return CEM(population_size=population, elite_ratio=elites / population, **options)


def told(settings, candidates, fitness, start=0.0):
    """The state after one generation on the line."""
    state = settings.init(jnp.array([start]))
    return tell(settings, state, jnp.array(candidates)[:, None], jnp.array(fitness))


def close(x, y, tolerance=1e-6):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def same(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def sphere(point, key):
    del key
    return -jnp.sum(point**2)


def noisy(point, key):
    return sphere(point, key) + drawn(point, key)


def drawn(point, key):
    del point
    return jax.random.uniform(key)


# One generation by hand.


def test_mean_and_deviation_move_by_equations_8_and_9():
    # The elites are 4 and 2: mean 3, deviation 1 (with ddof 1 it would be 1.414); the losers 0 and
    # 10 have mean 5.
    state = told(method(momentum=0.3), [0.0, 4.0, 2.0, 10.0], [1.0, 3.0, 2.0, -5.0], start=1.0)
    close(state.mean, [0.3 * 1 + 0.7 * 3])  # 2.4; were 0.3 the weight of the new value, 1.6
    close(state.std, [0.3 * 0.5 + 0.7 * 1])  # 0.85; likewise 0.65, with ddof 1 1.14
    close(state.change, 2.4 - 1.0)


def test_deviation_has_a_momentum_of_its_own():
    settings = method(momentum=0.3, std_momentum=0.9)
    state = told(settings, [0.0, 4.0, 2.0, 10.0], [1.0, 3.0, 2.0, -5.0], start=1.0)
    close(state.mean, [2.4])
    close(state.std, [0.9 * 0.5 + 0.1 * 1])


@pytest.mark.slow
def test_with_momentum_1_the_distribution_never_moves():
    settings = method(population=50, elites=10, momentum=1.0)
    state = settings.init(jnp.full(3, 2.0))
    for key in KEYS:
        state, _ = step(settings, key, state, sphere)
        assert float(state.change) == 0
        assert not bool(settings.converged(state))
    same((state.mean, state.std), (np.full(3, 2.0), np.full(3, 0.5)))


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_candidates_that_tie_with_the_last_elite_share_its_place_in_any_order(order):
    candidates, fitness = np.array([0.0, 2.0, 6.0, 9.0]), np.array([5.0, 3.0, 3.0, 1.0])
    state = told(method(), candidates[list(order)], fitness[list(order)])
    # Weights 1, 1/2, 1/2, 0. The first of the tied as an elite would give 1 or 3, all of them 8/3.
    close(state.mean, [(0 + 2 / 2 + 6 / 2) / 2])
    close(state.std, [((4 + 0 / 2 + 16 / 2) / 2) ** 0.5])


def test_with_all_fitness_equal_the_mean_is_that_of_the_population():
    settings = method(population=400, elites=40, momentum=0.0)
    state = settings.init(jnp.zeros(5))
    candidates = ask(settings, KEY, state)
    after = tell(settings, state, candidates, jnp.full(400, 7.0))
    close(after.mean, np.asarray(candidates).mean(0), 1e-5)
    close(after.std, np.asarray(candidates).std(0), 1e-5)
    # Four standard errors of 0.5 / sqrt(400); 40 elites by order would have those of sqrt(40).
    assert float(jnp.abs(after.mean).max()) < 4 * 0.5 / 20


def test_nan_counts_as_minus_infinity_and_never_is_an_elite():
    # Three elites, but only 2 and 6 have a fitness; 100 must not come in.
    state = told(method(elites=3), [100.0, 2.0, 6.0, 100.0], [NAN, 1.0, 2.0, -jnp.inf])
    close(state.mean, [4.0])
    close(state.std, [2.0])


@pytest.mark.parametrize("nothing", [NAN, -float("inf")])
def test_a_generation_without_any_fitness_leaves_mean_and_deviation(nothing):
    settings = method(momentum=0.3)
    first = told(settings, [0.0, 4.0, 2.0, 10.0], [1.0, 3.0, 2.0, -5.0], start=1.0)
    state = tell(settings, first, ask(settings, KEY, first), jnp.full(4, nothing))
    same((state.mean, state.std), (first.mean, first.std))
    assert float(state.change) == np.inf


def test_one_elite_has_no_deviation_and_min_std_is_a_floor():
    fitness = [1.0, 3.0, 2.0, 0.0]
    state = told(method(elites=1), [0.0, 4.0, 2.0, 10.0], fitness)
    same((state.mean, state.std), ([4.0], [0.0]))
    floored = told(method(elites=1, min_std=0.2), [0.0, 4.0, 2.0, 10.0], fitness)
    close(floored.std, [0.2])
    # The floor holds the mix of old and new, not the spread of the elites: 0.5 * 0.5 + 0.5 * 0.
    mixed = told(method(elites=1, momentum=0.5, min_std=0.2), [0.0, 4.0, 2.0, 10.0], fitness)
    close(mixed.std, [0.25])


# Asking.


def test_candidates_have_the_mean_and_deviation_of_the_state():
    settings = method(population=20_000, elites=1)
    state = settings.init(jnp.array([1.0, -3.0]))._replace(std=jnp.array([0.1, 2.0]))
    candidates = np.asarray(ask(settings, KEY, state))
    # Five standard errors.
    assert np.all(np.abs(candidates.mean(0) - [1, -3]) < 5 * np.array([0.1, 2.0]) / 20_000**0.5)
    assert np.all(np.abs(candidates.std(0) / [0.1, 2.0] - 1) < 5 / 40_000**0.5)
    assert abs(np.corrcoef(candidates.T)[0, 1]) < 5 / 20_000**0.5


def test_the_same_key_gives_the_same_candidates_and_arrays_of_a_point_differ():
    state = method().init({"a": jnp.zeros(3), "b": jnp.zeros(3)})
    first, again = (ask(method(), KEY, state) for _ in range(2))
    same(first, again)
    assert bool(jnp.all(first["a"] != first["b"]))
    other = ask(method(), KEYS[0], state)
    assert bool(jnp.all(first["a"] != other["a"]))


def test_nested_points_keep_shapes_and_dtypes_through_a_generation():
    start = {
        "site": {"down": jnp.ones((2, 3), jnp.float16), "up": jnp.zeros(4)},
        "list": [jnp.float32(2.0)],
    }
    settings = method(population=6, elites=3, momentum=0.3, min_std=0.01)
    state = settings.init(start)
    candidates = ask(settings, KEY, state)
    for x, leaf in zip(jax.tree.leaves(candidates), jax.tree.leaves(start), strict=True):
        assert (x.shape, x.dtype) == ((6, *leaf.shape), leaf.dtype)
    after = tell(settings, state, candidates, jnp.arange(6.0))
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert described(after) == described(state)
    # The elites are the last three.
    up = np.asarray(candidates["site"]["up"])[3:]
    close(after.mean["site"]["up"], 0.7 * up.mean(0))
    close(after.std["site"]["up"], 0.3 * 0.5 + 0.7 * up.std(0))
    moved = jax.tree.leaves(jax.tree.map(np.subtract, after.mean, state.mean))
    close(after.change, sum(np.sum(np.float32(x) ** 2) for x in moved) ** 0.5, 2e-3)


# A whole generation, and the end.


@functools.partial(jax.jit, static_argnums=0)
def advance(settings, key, state):
    def fitness(point, key):
        return jax.random.uniform(key) - sum(jnp.sum(x**2) for x in jax.tree.leaves(point))

    points = settings.ask(key, state)
    values, gradient = jax.vmap(jax.value_and_grad(fitness), (0, None))(points, key)
    told = {"gradient": gradient} if isinstance(settings, GradientAscent) else {}
    return settings.tell(state, points, values, **told)


def generations(settings, state, start, stop):
    for number in range(start, stop):
        state = advance(settings, jax.random.fold_in(KEY, number), state)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("settings", [method(8, 3, noise_std=0.2), GradientAscent()])
def test_a_search_continued_from_a_file_is_the_search_in_one_piece_bit_for_bit(settings, tmp_path):
    start = settings.init({"a": jnp.ones(3), "b": [jnp.zeros((2, 2))]})
    whole = generations(settings, start, 0, 7)
    half = generations(settings, start, 0, 4)
    named = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(half))}
    save_file(named, tmp_path / "state.safetensors")
    found = load_file(tmp_path / "state.safetensors")
    again = jax.tree.unflatten(jax.tree.structure(start), [found[name] for name in named])
    same(generations(settings, again, 4, 7), whole)
    same(generations(settings, start, 0, 7), whole)


def test_the_search_has_converged_when_the_mean_moves_by_less_than_the_threshold():
    # The elites 4 and 2 move the mean from 1 to 3, by 2.
    generation = ([0.0, 4.0, 2.0, 10.0], [1.0, 3.0, 2.0, -5.0], 1.0)
    for threshold, converged in ((2.1, True), (2.0, False), (0.0, False)):
        settings = method(threshold=threshold)
        assert bool(settings.converged(told(settings, *generation))) == converged
        assert not bool(settings.converged(settings.init(jnp.zeros(1))))


# Optima, in a stated number of evaluations.

DIMENSIONS = 32
CONDITION = 100.0
SCALE = CONDITION ** (np.arange(DIMENSIONS) / (DIMENSIONS - 1))
SHIFT = np.where(np.arange(DIMENSIONS) % 2, -1.0, 1.0)


def ellipsoid(point, key):
    del key
    return -jnp.sum(jnp.asarray(SCALE) * (point - jnp.asarray(SHIFT)) ** 2)


@pytest.mark.parametrize(
    ("fitness", "start", "optimum"),
    [(sphere, np.ones(DIMENSIONS), np.zeros(DIMENSIONS)), (ellipsoid, 0 * SHIFT, SHIFT)],
)
def test_cem_reaches_the_optimum_of_32_dimensions_in_12_000_evaluations(fitness, start, optimum):
    settings = CEM(
        population_size=100, elite_ratio=0.2, noise_std=1.0, momentum=0.0, std_momentum=0.7
    )

    @jax.jit
    @jax.vmap
    def run(key):
        def generation(i, state):
            return step(settings, jax.random.fold_in(key, i), state, fitness)[0]

        return jax.lax.fori_loop(0, 120, generation, settings.init(jnp.float32(start)))

    state = run(KEYS)
    # At the start it is -32 and about -700.
    assert float(fitness(jnp.float32(start), None)) < -31.9
    for mean in state.mean:
        close(mean, optimum, 0.02)
        assert float(fitness(mean, None)) > -1e-3


# Settings.


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("population_size", {"population_size": 1}),
        ("elite_ratio", {"elite_ratio": 0.0}),
        ("elite_ratio", {"elite_ratio": 1.1}),
        ("elite_ratio", {"elite_ratio": 0.09, "population_size": 10}),
        ("noise_std", {"noise_std": -0.1}),
        ("noise_std", {"noise_std": 0.0}),
        ("momentum", {"momentum": 1.5}),
        ("momentum", {"momentum": -0.1}),
        ("min_std", {"min_std": -0.1}),
        ("threshold", {"threshold": -1.0}),
        ("population_size", {"population_size": 50.0}),
        ("population_size", {"population_size": "50"}),
        ("population_size", {"population_size": None}),
        ("momentum", {"momentum": "0.3"}),
        ("noise_std", {"noise_std": True}),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, options):
    with pytest.raises(InputError, match=rf"^{field}={options[field]!r}[^\n]*\.$"):
        CEM(**options)


def test_numbers_of_numpy_are_settings_as_those_of_python_are():
    of_numpy = CEM(population_size=np.int64(4), elite_ratio=np.float32(0.5), momentum=np.int32(0))
    assert of_numpy == CEM(population_size=4, elite_ratio=0.5, momentum=0.0)
    kinds = {name: type(value) for name, value in dataclasses.asdict(of_numpy).items()}
    assert kinds.pop("population_size") is int
    assert kinds.pop("std_momentum") is type(None)
    assert set(kinds.values()) == {float}


@pytest.mark.parametrize("momentum", [1.5, -0.1])
def test_a_momentum_of_the_deviation_out_of_range_is_refused(momentum):
    with pytest.raises(InputError, match=r"^std_momentum=[^\n]*\.$"):
        CEM(std_momentum=momentum)


@pytest.mark.parametrize(
    ("population", "ratio", "elites"),
    [(100, 0.3, 30), (100, 0.29, 29), (10, 0.1, 1), (10, 0.99, 9), (7, 1.0, 7)],
)
def test_the_number_of_elites_is_rounded_down(population, ratio, elites):
    # In float64 0.29 * 100 is 28.999999999999996.
    assert CEM(population_size=population, elite_ratio=ratio).num_elites == elites


def test_equal_settings_are_one_static_argument():
    assert method(min_std=0.1) == method(min_std=0.1)
    assert hash(method(min_std=0.1)) == hash(method(min_std=0.1))
    assert method(min_std=0.1) != method(min_std=0.2)


# The gradient.


@functools.partial(jax.jit, static_argnums=(0, 2))
def up(settings, state, fitness, *args):
    """One step, and the fitness of the point left."""
    points = settings.ask(KEY, state)
    values, gradient = jax.vmap(lambda x: jax.value_and_grad(fitness)(x, *args))(points)
    return settings.tell(state, points, values, gradient=gradient), values


def test_gradient_ascent_maximises_a_quadratic():
    target = jnp.array([1.0, -2.0, 0.5])
    settings = GradientAscent(learning_rate=0.1)

    def fitness(point):
        return -jnp.sum((point - target) ** 2)

    state, scores = up(settings, settings.init(jnp.zeros(3)), fitness)
    # The fitness is that of the point left; Adam's first step is the learning rate, uphill.
    close(scores, [-(1 + 4 + 0.25)])
    close(state.mean, [0.1, -0.1, 0.1], 1e-5)
    for _ in range(149):
        state, scores = up(settings, state, fitness)
    close(state.mean, target, 0.02)
    assert -1e-2 < float(scores[0]) <= 0
    assert not bool(settings.converged(state))


@pytest.mark.parametrize("broken", ["value", "gradient"])
def test_a_gradient_step_that_is_not_finite_leaves_point_and_moments(broken):
    settings = GradientAscent(learning_rate=0.1)

    def fitness(point, bad):
        # The root's gradient at 0 is not finite, times 0 it is not a number; its value is 0.
        value = -jnp.sum(point**2)
        root = jnp.sqrt(0.0 * jnp.sum(point))
        return value + (jnp.where(bad, NAN, 0.0) if broken == "value" else bad * root)

    start = settings.init(jnp.array([1.0, -2.0]))
    if broken == "value":
        start, _ = up(settings, start, fitness, 0.0)
    after, scores = up(settings, start, fitness, 1.0)
    same(after, start)
    if broken == "value":
        assert np.isnan(scores[0])
        onward, _ = up(settings, after, fitness, 0.0)
        assert bool(jnp.all(jnp.abs(onward.mean) < jnp.abs(start.mean)))
    else:
        assert float(scores[0]) == -5.0


def test_the_change_of_a_mean_in_half_precision_does_not_overflow():
    # 300 squared is above float16's largest number, 65504.
    settings = method(population=2, elites=1)
    state = settings.init(jnp.zeros(1, jnp.float16))
    candidates = jnp.array([[300.0], [0.0]], jnp.float16)
    after = tell(settings, state, candidates, jnp.array([1.0, 0.0]))
    assert float(after.change) == 300.0


@pytest.mark.parametrize("rate", [0.0, -1.0, NAN])
def test_a_learning_rate_that_is_not_above_0_is_refused(rate):
    with pytest.raises(InputError, match=rf"^learning_rate={rate}[^\n]*\.$"):
        GradientAscent(learning_rate=rate)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (3,), (5,), ()])
def test_fitness_of_another_shape_is_refused(shape):
    settings = method()
    state = settings.init(jnp.zeros(2))
    with pytest.raises(InputError, match=r"^fitness of shape [^\n]*population_size=4[^\n]*\.$"):
        settings.tell(state, settings.ask(KEY, state), jnp.zeros(shape))


@pytest.mark.parametrize("made", [CEM(), GradientAscent()])
@pytest.mark.parametrize("kind", [jnp.int32, jnp.bool_, jnp.uint8, jnp.complex64])
def test_a_start_that_is_not_of_floats_is_refused(made, kind):
    with pytest.raises(InputError, match=rf"^start: an array of {jnp.dtype(kind)} [^\n]*\.$"):
        made.init({"a": jnp.zeros(2), "b": jnp.zeros(3, kind)})
    with pytest.raises(InputError, match=r"^start=\{\}: holds no array"):
        made.init({})


@pytest.mark.slow
def test_the_example_of_the_docstring_runs():
    results = doctest.testmod(cem)
    assert results.attempted >= 6
    assert results.failed == 0


@pytest.mark.slow
def test_a_mean_that_cannot_move_or_has_no_elites_has_not_converged():
    fixed = CEM(population_size=4, momentum=1.0, threshold=1e9)
    state = fixed.init(jnp.zeros(2))
    state = fixed.tell(state, fixed.ask(jax.random.key(0), state), jnp.arange(4.0))
    assert not fixed.converged(state)
    free = CEM(population_size=4, threshold=1e9)
    state = free.init(jnp.zeros(2))
    candidates = free.ask(jax.random.key(0), state)
    assert not free.converged(free.tell(state, candidates, jnp.full(4, jnp.nan)))
    assert free.converged(free.tell(state, candidates, jnp.arange(4.0)))
