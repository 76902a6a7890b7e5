"""The gate: halves of the data, searched by themselves, that judge each other; then all of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.search import HostFitness, Problem, drivers, gate, loop
from grpocem_jax.utils.errors import InputError
from tests.searches import (
    KEY,
    METHOD,
    SETTINGS,
    SITE,
    SPACE,
    START,
    TARGET,
    Quadratic,
    close,
    host,
    noisy,
    quadratic,
    run,
    same,
    targets,
)

AGREEING = targets(1.0, 1.1, 0.9), targets(1.0, 0.95, 1.2)
CONTRADICTING = targets(1.0, 1.0, 1.0), targets(-1.0, -1.2, -0.8)
FIRST, SECOND, JUDGING, LAST = jax.random.split(KEY, 4)


def together(halves):
    """Both halves as one: of batches of targets all of them, of single targets their mean."""
    if isinstance(halves[0], tuple):
        return jax.tree.map(lambda *x: jnp.concatenate(x), *halves)
    return (halves[0] + halves[1]) / 2


def crossed(halves, function=None, method=METHOD, **options):
    function = function or Quadratic(jnp.float32(1.0))
    options = {**SETTINGS, **options, "halves": halves}
    return loop.cross_fit(method, function, SPACE, together(halves), KEY, **options)


def alone(half, key, function=None, **options):
    return run(function or Quadratic(jnp.float32(1.0)), half, key, **options)


def test_where_the_halves_agree_all_of_the_data_are_searched_as_if_alone():
    found = crossed(AGREEING, gate_z=0.0)
    whole = alone(together(AGREEING), LAST)
    assert found.returned == "mean"
    close(found.final[SITE], whole.offsets[SITE])
    close(found.offsets[SITE], whole.offsets[SITE])
    close(found.history.best, whole.history.best)
    assert (found.generations, found.candidates) == (30, 3 * 30 * 40)
    # Each half's gain on the other one.
    parts = [alone(half, key) for half, key in zip(AGREEING, (FIRST, SECOND), strict=True)]
    gains = []
    for part, (goals, _) in zip(parts, AGREEING[::-1], strict=True):
        for goal in np.asarray(goals):
            there, here = (
                -np.sum((np.asarray(x[SITE]) - goal) ** 2) for x in (part.offsets, START)
            )
            gains.append(there - here)
    close(found.held_back_gain, np.mean(gains), 1e-4)


def test_a_budget_that_is_none_is_named_as_given():
    with pytest.raises(InputError, match=r"budget_s=-1\.0: must be above 0"):
        crossed(AGREEING, budget_s=-1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"halves": [*AGREEING, AGREEING[0]]}, r"^halves: is 3 parts; give the data in two parts"),
        ({"halves": None}, "^halves: is NoneType; give"),
        ({"gate_z": "2"}, "^gate_z='2': must be a number, at least 0"),
        ({"gate_z": -1.0}, r"^gate_z=-1\.0: must be at least 0"),
    ],
)
def test_halves_or_a_gate_that_cannot_be_used_are_named(options, said):
    given = {"halves": AGREEING, **options}
    with pytest.raises(InputError, match=said):
        loop.cross_fit(METHOD, quadratic, SPACE, TARGET, KEY, **given)


@pytest.mark.slow
def test_the_start_is_returned_exactly_where_the_halves_contradict_each_other():
    found = crossed(CONTRADICTING)
    assert found.returned == "start"
    assert found.held_back_gain == 0.0
    same(found.offsets, START)
    # The searches themselves did go elsewhere.
    assert found.history.best[-1] > -0.1
    parts = [alone(half, key) for half, key in zip(CONTRADICTING, (FIRST, SECOND), strict=True)]
    close(found.final[SITE], np.mean([part.offsets[SITE] for part in parts], axis=0))
    close(found.history.best, np.mean([part.history.best for part in parts], axis=0))
    assert found.candidates == 2 * 30 * 40
    plain = crossed((TARGET, targets(-1.0)[0][0]), quadratic)
    assert plain.returned == "start"
    same(plain.offsets, START)


def test_the_result_goes_part_of_the_way_where_that_is_best():
    # One goes twice as far as the target, the other half as far; judged by each other, in squares
    # of the way: 1/4 - (2 s - 1/2)^2 and 4 - (2 - s / 2)^2, together largest at s = 1/2.
    found = crossed((targets(2.0, 2.0), targets(0.5, 0.5)), gate_z=0.0)
    assert found.returned == "mean"
    close(found.offsets[SITE], targets(0.5 * (2.0 + 0.5) / 2)[0][0], 0.02)


def test_the_more_standard_errors_the_less_passes():
    halves = targets(1.0, 1.0), targets(2.0, -0.4)
    assert crossed(halves, gate_z=0.0).returned == "mean"
    assert crossed(halves, gate_z=10.0).returned == "start"


def test_only_scores_that_count_are_heeded():
    against = targets(1.0, 1.0, -9.0, present=[True, True, False])
    assert crossed((AGREEING[0], against)).returned == "mean"
    assert crossed((AGREEING[0], targets(1.0, 1.0, -9.0))).returned == "start"


@pytest.mark.slow
def test_what_is_judged_has_one_key_and_the_searches_others():
    seen = []

    @jax.tree_util.register_static
    class Keyed:
        def __call__(self, offsets, batch, key):
            return quadratic(offsets, batch, key)

        def scores(self, offsets, batch, key):
            jax.debug.callback(lambda x: seen.append(tuple(x.tolist())), jax.random.key_data(key))
            return quadratic(offsets, batch, key)[None], jnp.ones(1, bool)

    crossed((TARGET, TARGET), Keyed(), generations=2)
    jax.effects_barrier()
    assert set(seen) == {tuple(np.asarray(jax.random.key_data(JUDGING)).tolist())}


@pytest.mark.parametrize(("chunk", "at_once"), [(4, 4), (2, 2), (1, 1)])
def test_so_many_points_are_scored_at_a_time(chunk, at_once):
    problem = Problem(Quadratic(jnp.float32(1.0)), SPACE, AGREEING[0], KEY)
    points = gate.scaled(SPACE.origin)
    program = str(jax.make_jaxpr(lambda *x: drivers._scores(*x, size=chunk))(problem, points))
    # Distances of points, targets and coordinates: [points, 3, 3].
    sizes = {int(n) for n in re.findall(r"f32\[(\d+),3,3\]", program)}
    assert max(sizes, default=1) == at_once


@pytest.mark.slow
@pytest.mark.parametrize("pytree", [True, False])
def test_scores_of_a_fitness_are_used_whatever_it_is(pytree):
    called = []

    class Plain:
        func = None

        def __call__(self, offsets, batch, key):
            return quadratic(offsets, batch, key)

        def scores(self, offsets, batch, key):
            called.append(key)
            return -((offsets[SITE] - batch) ** 2), jnp.ones(3, bool)

    if pytree:
        jax.tree_util.register_static(Plain)
    crossed((TARGET, TARGET), Plain(), generations=1)
    assert called


@pytest.mark.slow
def test_a_search_that_converges_waits_for_the_other():
    method = dataclasses.replace(METHOD, threshold=0.05)
    halves = AGREEING[0], targets(*([9.0] * 3))
    parts = [
        alone(half, key, method=method) for half, key in zip(halves, (FIRST, SECOND), strict=True)
    ]
    each = [part.generations for part in parts]
    assert each[0] != each[1]
    calls = []
    found = crossed(
        halves, method=method, gate_z=1e6, on_chunk=lambda done, history: calls.append(done)
    )
    assert found.converged == all(part.converged for part in parts)
    assert found.generations == max(each) == calls[-1]
    assert found.candidates == 40 * sum(each)
    close(found.final[SITE], np.mean([part.offsets[SITE] for part in parts], axis=0), 1e-4)


def test_all_processes_follow_the_verdict_of_the_first():
    class Second:
        count = 1

        def first(self, function):
            assert function()[0] > 0  # its own verdict lets them pass
            return [0.0, 0.0, 0.0]

    found = crossed(AGREEING, gate_z=0.0, processes=Second())
    assert (found.returned, found.candidates) == ("start", 2 * 30 * 40)


def test_a_budget_ends_all_searches():
    found = crossed(AGREEING, budget_s=1e-9, gate_z=0.0)
    assert (found.generations, found.candidates) == (1, 3 * 40)


@pytest.mark.parametrize(("field", "value"), [("gate_z", -1.0), ("generations", 0)])
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"^{field}={value!r}: [^\n]*\.$"):
        crossed(AGREEING, **{field: value})


def test_halves_of_one_shape_are_searched_by_one_program():
    crossed(AGREEING, noisy_quadratic, generations=3)
    programs = drivers._advance._cache_size()
    crossed(AGREEING[::-1], noisy_quadratic, generations=3)
    assert drivers._advance._cache_size() == programs


def noisy_quadratic(offsets, batch, key):
    return noisy(offsets, batch[0][0], key)


# The verdict: scores of four tokens by the start and three points; of the third there is none by
# the first point, of the fourth none by the start.
VALUES = jnp.array(
    [
        [1.0, 2.0, 9.0, 50.0],
        [2.0, 5.0, 70.0, 0.0],
        [2.1, 3.3, -70.0, 99.0],
        [-8.0, 2.0, 0.0, 0.0],
    ]
)
PRESENT = jnp.array([[True, True, True, False], *([[True, True, False, True]] * 3)])
# Gains 1, 3 of the first point and 1.1, 1.3 of the second: means 2 and 1.2.
GAINS = np.array([1.0, 3.0]), np.array([1.1, 1.3])


def bound(gains, z):
    return gains.mean() - z * gains.std(ddof=1) / len(gains) ** 0.5


@pytest.mark.parametrize(
    ("z", "scale", "gain", "lower"),
    [
        (0.0, 0.25, 2.0, 2.0),
        # Both pass, by 2 - 1 and 1.2 - 0.1, and the first gains more.
        (1.0, 0.25, 2.0, 1.0),
        # 2 - 2.5 < 0. With ddof 0 the first would pass, 2 - 1.77 > 0.
        (2.5, 0.5, 1.2, 0.95),
        (20.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_verdict_is_the_largest_gain_of_those_above_zero_by_standard_errors(
    z, scale, gain, lower
):
    own = {0.25: bound(GAINS[0], z), 0.5: bound(GAINS[1], z), 0.0: 0.0}
    assert lower == pytest.approx(own[scale])
    close(tuple(gate.judge(VALUES, PRESENT, z)), (scale, lower, gain))


def test_a_point_with_a_bound_that_is_no_number_is_never_chosen():
    values = jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [2.0, 2.0], [1.0, 1.0]])
    present = jnp.ones((4, 2), bool)
    assert tuple(map(float, gate.judge(values, present, 1.0))) == (0.5, 2.0, 2.0)
    nothing = values.at[2:].set(jnp.nan)
    assert tuple(map(float, gate.judge(nothing, present, 1.0))) == (0.0, 0.0, 0.0)


def test_without_any_score_that_counts_the_start_is_returned():
    values = jnp.array([[0.0], [1.0], [2.0], [3.0]])
    assert float(gate.judge(values, jnp.zeros((4, 1), bool), 0.0).scale) == 0.0


def test_a_single_score_has_no_standard_error_and_lets_nothing_pass():
    values = jnp.array([[0.0, 9.0], [1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])
    present = jnp.array([[True, False]] * 4)
    assert float(gate.judge(values, present, 0.0).scale) == 0.0
    assert float(gate.judge(values[:, ::-1], ~present[:, ::-1], 0.0).scale) == 0.0
    assert float(gate.judge(values, jnp.ones((4, 2), bool), 0.0).scale) == 1.0


def test_the_points_judged_are_the_start_and_those_at_parts_of_the_way():
    points = gate.scaled({"a": jnp.array([4.0, 8.0]), "b": jnp.float16(2.0)})
    close(points["a"], np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [4.0, 8.0]]))
    close(points["b"], [0.0, 0.5, 1.0, 2.0])
    assert points["b"].dtype == jnp.float16


# On the host.


def by_batch(spread=(0.0,)):
    """A fitness in Python whose batch is the target."""

    def evaluate(adapters, batch, key):
        return host(batch, spread=spread)(adapters, batch, key)

    return evaluate


@pytest.mark.slow
def test_on_the_host_it_is_as_on_the_device():
    halves = np.asarray(TARGET), np.asarray(targets(0.8)[0][0])
    judged = HostFitness(by_batch(), by_batch(spread=(0.0, 0.1, np.nan)))
    found = crossed(halves, judged, generations=10)
    device = crossed(halves, quadratic, generations=10)
    assert found.returned == device.returned == "mean"
    close(found.offsets, device.offsets, 1e-4)
    # All scores of a point are moved alike, which changes no gain.
    close(found.held_back_gain, device.held_back_gain, 1e-4)
    against = crossed((halves[0], np.asarray(targets(-1.0)[0][0])), judged, generations=10)
    assert against.returned == "start"
    same(against.offsets, START)


def test_on_the_host_what_is_judged_has_one_key_and_each_generation_its_own():
    keys, judging = [], []

    def remember(found):
        def evaluate(adapters, batch, key):
            found.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return host()(adapters, batch, key)

        return evaluate

    crossed((0, 1), HostFitness(remember(keys), remember(judging)), generations=4)
    assert len(set(keys)) == 3 * 4
    assert len(judging) == 2
    assert len(set(judging)) == 1
    assert not set(judging) & set(keys)
