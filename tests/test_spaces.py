"""Search spaces: what a point decodes to, written out, and the principal directions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.search import spaces
from grpocem_jax.utils.errors import InputError

RNG = np.random.default_rng(0)
SITES = ("h.0.attn.c_proj", "h.1.attn.c_proj")
COUNT = 3


def offsets():
    """One array at the first site, two of other shapes at the second."""
    return {
        SITES[0]: jnp.asarray(RNG.normal(size=4), jnp.float32),
        SITES[1]: {
            "down": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32),
            "up": jnp.asarray(RNG.normal(size=5), jnp.float32),
        },
    }


START = offsets()
EXPERTS = [offsets() for _ in range(COUNT)]
STACKED = jax.tree.map(lambda *x: jnp.stack(x), *EXPERTS)
SIZE = 4 + 6 + 5
SPACES = {
    "full": spaces.full_space(START),
    "experts": spaces.expert_space(START, EXPERTS),
    "experts per site": spaces.expert_space(START, EXPERTS, per_site=True),
    "principal": spaces.principal_space(START, STACKED, 2),
}


def close(x, y, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), x, y)


def flat(offsets):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(offsets)])


def point_of(space, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), space.origin)


def by_hand(name, point):
    """The adapter at a point in numpy, one site after the other."""
    start, point = jax.device_get((START, point))
    if name == "full":
        return jax.tree.map(lambda x, z: x + z, start, point)
    found = {}
    for site in SITES:
        weights = point[site] if name == "experts per site" else point
        if name == "principal":
            vectors = [jax.tree.map(lambda x, r=r: x[r], SPACES[name].basis) for r in range(2)]
        else:
            vectors = EXPERTS
        found[site] = start[site]
        for weight, vector in zip(weights, vectors, strict=True):
            vector = jax.device_get(vector[site])
            found[site] = jax.tree.map(lambda x, v, w=weight: x + w * v, found[site], vector)
    return found


each = pytest.mark.parametrize("name", SPACES)


@each
def test_the_origin_is_the_start_exactly(name):
    space = SPACES[name]
    assert all(not np.any(x) for x in jax.tree.leaves(space.origin))
    chex.assert_trees_all_equal(spaces.decode(space, space.origin), START)


@each
def test_an_adapter_has_the_structure_shapes_and_dtypes_of_the_start(name):
    found = spaces.decode(SPACES[name], point_of(SPACES[name], 1))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), y) for y in (found, START)]
    assert shapes[0] == shapes[1]


@each
@pytest.mark.parametrize("seed", [1, 2])
def test_decoding_is_the_sum_written_out(name, seed):
    point = point_of(SPACES[name], seed)
    close(spaces.decode(SPACES[name], point), by_hand(name, point))


@each
def test_decoding_is_linear_in_the_point(name):
    space = SPACES[name]
    x, y = point_of(space, 1), point_of(space, 2)
    mix = jax.tree.map(lambda a, b: 2 * a - 3 * b, x, y)

    def moved(point):
        return flat(spaces.decode(space, point)) - flat(START)

    close(moved(mix), 2 * moved(x) - 3 * moved(y))


@each
def test_decoding_can_be_mapped_over_candidates(name):
    space = SPACES[name]
    points = [point_of(space, seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *points)
    together = jax.jit(jax.vmap(spaces.decode, in_axes=(None, 0)))(space, stacked)
    for i, point in enumerate(points):
        close(jax.tree.map(lambda x, i=i: x[i], together), spaces.decode(space, point))


@pytest.mark.parametrize("expert", range(COUNT))
def test_weight_1_adds_the_whole_expert(expert):
    weights = jnp.eye(COUNT)[expert]
    expected = jax.tree.map(lambda x, y: x + y, START, EXPERTS[expert])
    close(spaces.decode(SPACES["experts"], weights), expected)
    per_site = spaces.decode(SPACES["experts per site"], dict.fromkeys(SITES, weights))
    close(per_site, expected)


def test_weights_of_one_site_leave_the_others_alone():
    weights = {SITES[0]: jnp.zeros(COUNT), SITES[1]: jnp.array([0.0, 1.0, 0.0])}
    found = spaces.decode(SPACES["experts per site"], weights)
    np.testing.assert_array_equal(found[SITES[0]], START[SITES[0]])
    close(found[SITES[1]], jax.tree.map(jnp.add, START[SITES[1]], EXPERTS[1][SITES[1]]))


def test_the_number_of_coordinates():
    sizes = {name: sum(x.size for x in jax.tree.leaves(SPACES[name].origin)) for name in SPACES}
    assert sizes == {
        "full": SIZE,
        "experts": COUNT,
        "experts per site": COUNT * len(SITES),
        "principal": 2,
    }


def rows(basis):
    """A basis as a matrix, a direction a row."""
    count = len(jax.tree.leaves(basis)[0])
    return np.stack([flat(jax.tree.map(lambda x, r=r: x[r], basis)) for r in range(count)])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_principal_directions_are_orthonormal_over_all_sites(rank):
    directions = rows(spaces.principal_space(START, STACKED, rank).basis)
    close(directions @ directions.T, np.eye(rank))


def test_all_principal_directions_span_the_vectors():
    directions = rows(spaces.principal_space(START, STACKED, COUNT).basis)
    for expert in EXPERTS:
        vector = flat(expert)
        close(directions.T @ (directions @ vector), vector)


def test_fewer_principal_directions_are_those_of_the_largest_singular_values():
    matrix = rows(STACKED).astype(np.float64)
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    top = vectors[:, np.argsort(values)[-2:]]
    directions = rows(SPACES["principal"].basis)
    close(directions.T @ directions, top @ top.T, 1e-4)
    # The smallest two of the three span another plane.
    rest = vectors[:, np.argsort(values)[-3:-1]]
    assert np.abs(directions.T @ directions - rest @ rest.T).max() > 0.1


@pytest.mark.parametrize(
    "expert",
    [
        {SITES[0]: START[SITES[0]]},
        {**START, "h.2.attn.c_proj": jnp.zeros(4)},
        {**START, SITES[0]: jnp.zeros(1)},
        {SITES[0]: START[SITES[0]], "h.2.attn.c_proj": START[SITES[1]]},
    ],
    ids=["a site less", "a site more", "another shape", "another site"],
)
def test_what_has_other_sites_or_shapes_than_the_start_is_refused(expert):
    with pytest.raises(InputError, match=r"^experts: number 1 has other sites or shapes"):
        spaces.expert_space(START, [START, expert])
    with pytest.raises(InputError, match=r"^vectors: other sites or shapes"):
        spaces.principal_space(START, jax.tree.map(lambda x: jnp.stack([x, x]), expert), 1)


def test_more_rank_than_the_vectors_span_is_refused():
    with pytest.raises(InputError, match=r"^rank=1: the 0 vectors span 0 directions"):
        spaces.principal_space(START, jax.tree.map(lambda x: x[:0], STACKED), 1)

    def refused(rank, spanned):
        pattern = rf"^rank={rank}: the 3 vectors [^\n]* {spanned} directions[^\n]*\.$"
        return pytest.raises(InputError, match=pattern)

    with refused(4, 3):
        spaces.principal_space(START, STACKED, 4)
    # The third vector is a mix of the others.
    mix = jax.tree.map(lambda x: x.at[2].set(2 * x[0] - x[1]), STACKED)
    with refused(3, 2):
        spaces.principal_space(START, mix, 3)
    assert rows(spaces.principal_space(START, mix, 2).basis).shape == (2, SIZE)
