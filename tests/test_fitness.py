"""The likelihood of texts, and a population of adapters against one merged model at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adapters
from grpocem_jax.models import gpt2
from grpocem_jax.search import fitness, spaces
from grpocem_jax.search.fitness import Texts
from tests.parity import weights

KEY = jax.random.key(0)
LENGTHS = (12, 7, 9)
POPULATION = 6


def texts(padded=12, filler=0):
    """Three texts of their lengths; of each the last four tokens count, and one in between."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(LENGTHS), padded), filler, np.int32)
    mask, scored = (np.zeros(tokens.shape, bool) for _ in range(2))
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(0, 61, length)
        mask[row, :length] = True
        scored[row, [2, *range(length - 4, length)]] = True
    return Texts(*map(jnp.asarray, (tokens, mask, scored)))


@jax.jit
def measure(likelihood, offsets, batch):
    return likelihood(offsets, batch, KEY), *likelihood.scores(offsets, batch, KEY)


@pytest.fixture(scope="module")
def likelihood(tiny):
    return fitness.Likelihood(tiny.factored, tiny.model)


@pytest.fixture(scope="module")
def reference(tiny):
    """Log-likelihood in float64 of each token but the first of the unpadded texts."""
    forward = jax.jit(tiny.model.forward)
    found = []
    for row, length in zip(texts().tokens, LENGTHS, strict=True):
        hidden = forward(tiny.factored, tiny.adapted(), row[:length], jnp.ones(length, bool))
        logits = np.asarray(tiny.model.logits(tiny.factored, hidden), np.float64)[:-1]
        peak = logits.max(-1, keepdims=True)
        logps = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        found.append(logps[np.arange(length - 1), np.asarray(row[1:length])])
    return found


def of_scored(batch, reference):
    """The reference's log-likelihoods of the tokens that count."""
    scored = [np.asarray(row)[1:length] for row, length in zip(batch.scored, LENGTHS, strict=True)]
    return np.concatenate([x[s] for x, s in zip(reference, scored, strict=True)])


def test_it_is_the_mean_log_softmax_of_the_scored_tokens_of_unpadded_texts(
    tiny, likelihood, reference
):
    batch = texts()
    value, logps, scored = measure(likelihood, tiny.adapted(), batch)
    expected = of_scored(batch, reference)
    assert len(expected) == 3 * 5
    np.testing.assert_allclose(value, expected.mean(), atol=2e-5)
    np.testing.assert_allclose(np.asarray(logps)[np.asarray(scored)], expected, atol=5e-5)
    # Neither the mean of the texts' sums nor that of all tokens.
    assert abs(value - np.concatenate(reference).mean()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("padded", "filler"), [(12, 5), (17, 0)])
def test_padding_does_not_matter(tiny, likelihood, padded, filler):
    expected, _, _ = measure(likelihood, tiny.adapted(), texts())
    batch = texts(padded, filler)
    value, _, scored = measure(likelihood, tiny.adapted(), batch)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    # Nor does a mark on padding.
    marked = batch._replace(scored=batch.scored | ~batch.mask)
    again, _, same = measure(likelihood, tiny.adapted(), marked)
    np.testing.assert_array_equal(again, value)
    np.testing.assert_array_equal(same, scored)


def test_only_scored_tokens_count_and_the_first_of_a_text_never_does(tiny, likelihood, reference):
    batch = texts()
    first = batch._replace(scored=batch.scored.at[:, 0].set(True))
    value, _, _ = measure(likelihood, tiny.adapted(), batch)
    np.testing.assert_array_equal(measure(likelihood, tiny.adapted(), first)[0], value)
    # One token of the second text alone.
    marks = np.zeros(batch.scored.shape, bool)
    marks[1, [0, 3]] = True
    alone = batch._replace(scored=jnp.asarray(marks))
    value, logps, scored = measure(likelihood, tiny.adapted(), alone)
    np.testing.assert_allclose(value, reference[1][2], atol=5e-5)
    assert np.flatnonzero(scored).tolist() == np.flatnonzero(logps).tolist() == [11 + 2]
    # All tokens weigh the same, whatever text they are of.
    every = batch._replace(scored=batch.mask)
    value, _, scored = measure(likelihood, tiny.adapted(), every)
    assert int(scored.sum()) == sum(LENGTHS) - 3
    np.testing.assert_allclose(value, np.concatenate(reference).mean(), atol=2e-5)
    by_text = np.mean([x.mean() for x in reference])
    assert abs(value - by_text) > 1e-3


def test_texts_without_a_scored_token_have_no_fitness(tiny, likelihood):
    batch = texts()
    value, _, scored = measure(
        likelihood, tiny.adapted(), batch._replace(scored=jnp.zeros_like(batch.scored))
    )
    assert np.isnan(value)
    assert not bool(scored.any())


def test_scores_sum_to_the_mean_and_are_zero_elsewhere(tiny, likelihood):
    value, logps, scored = measure(likelihood, tiny.adapted(), texts())
    assert logps.shape == scored.shape == (3 * 11,)
    np.testing.assert_allclose(logps.sum() / scored.sum(), value, rtol=1e-6)
    np.testing.assert_array_equal(logps[~scored], 0)
    assert bool(jnp.all(logps[scored] < 0))


@jax.jit
def with_gradient(likelihood, offsets, batch):
    gradient = jax.grad(lambda x: likelihood(x, batch, KEY))(offsets)
    return gradient, *likelihood.scores(offsets, batch, KEY)


def assert_same_scores(likelihood, offsets, batch, whole, *, shape, count):
    """Scores and their gradient are those of the whole computation."""
    gradient, logps, scored = with_gradient(likelihood, offsets, batch)
    expected, every, marks = with_gradient(likelihood, offsets, whole)
    assert logps.shape == scored.shape == shape
    assert scored.sum() == marks.sum() == count
    np.testing.assert_allclose(logps[scored], every[marks], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(logps[~scored], 0)
    for name, value in gradient.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(x).max() for x in gradient.values()) > 1e-2


@pytest.mark.parametrize("most", [5, 7, 11])
def test_states_that_predict_nothing_are_not_needed(tiny, likelihood, most):
    whole = texts(padded=14)
    places = fitness.predicting(np.asarray(whole.scored), most)
    batch = whole._replace(places=jnp.asarray(places))
    assert_same_scores(likelihood, tiny.adapted(), batch, whole, shape=(3 * most,), count=15)


@pytest.mark.parametrize("places", [False, True])
def test_a_common_prefix_is_run_over_once_to_the_same_scores(tiny, likelihood, places):
    batch = texts()
    common = batch.tokens[0, :4]
    scored = batch.scored.at[:, :5].set(False)
    whole = batch._replace(tokens=batch.tokens.at[:, :4].set(common), scored=scored)
    batch = whole._replace(prefix=common)
    if places:
        found = 4 + fitness.predicting(np.asarray(scored)[:, 4:], 5)
        batch = batch._replace(places=jnp.asarray(found))
    shape = (3 * (5 if places else 12 - 1 - 4),)
    assert_same_scores(likelihood, tiny.adapted(), batch, whole, shape=shape, count=4 + 2 + 4)
    # 4 and then 3 times 7 tokens, not 3 times 11.
    assert (batch.num_tokens, whole.num_tokens) == (4 + 3 * 7, 3 * 11)


def test_predicting_states_are_in_order_and_come_before_what_is_scored():
    scored = np.zeros((3, 6), bool)
    scored[0, [0, 2, 5]] = scored[1, 3] = True
    found = fitness.predicting(scored, 2)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [[1, 4], [0, 2], [0, 1]])
    np.testing.assert_array_equal(fitness.predicting(scored, 5), [range(5)] * 3)


def space_of(tiny, name):
    start = tiny.adapted(seed=1, scale=0.1)
    experts = [tiny.adapted(seed=seed) for seed in (2, 3, 4)]
    if name == "full":
        return spaces.full_space(start)
    if name == "principal":
        return spaces.principal_space(start, jax.tree.map(lambda *x: jnp.stack(x), *experts), 2)
    return spaces.expert_space(start, experts, per_site=name == "experts per site")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "experts", "experts per site", "principal"])
def test_a_population_equals_a_loop_over_merged_models(tiny, likelihood, name):
    space = space_of(tiny, name)
    rng = np.random.default_rng(0)
    scale = {"full": 0.3, "principal": 2.0}.get(name, 0.7)
    points = jax.tree.map(
        lambda x: jnp.asarray(scale * rng.normal(size=(POPULATION, *x.shape)), jnp.float32),
        space.origin,
    )
    batch = texts()

    @jax.jit
    def candidates(likelihood, space, points):
        return jax.vmap(lambda point: likelihood(spaces.decode(space, point), batch, KEY))(points)

    together = candidates(likelihood, space, points)
    alone = []
    for i in range(POPULATION):
        offsets = spaces.decode(space, jax.tree.map(lambda x, i=i: x[i], points))
        merged = adapters.merge_params(tiny.adapter, tiny.factored, offsets, tiny.sites)
        alone.append(measure(fitness.Likelihood(merged, tiny.base), {}, batch)[0])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    # The comparison means something: no two candidates are alike, nor any like the start.
    start = measure(likelihood, space.start, batch)[0]
    assert np.diff(np.sort([*alone, start])).min() > 5e-4
    assert np.ptp(alone) > 0.05


@pytest.mark.slow
def test_a_population_of_gpt2_124m_equals_a_loop_over_merged_models_in_every_space():
    """The full shape with random weights: two candidates of each search space, to 1e-4."""
    fields = weights.SHAPES["gpt2"]
    config = gpt2.config_from_hf(fields, "gpt2")
    plain = gpt2.params_from_state(weights.state(fields), config, "gpt2")
    method = adapters.svf(svd=adapters.cached_svd())
    model, base = gpt2.build(config, method.apply), gpt2.build(config)
    sites = adapters.select_sites(model.sites, ["attn.c_proj"])
    factored = adapters.factor_params(method, plain, sites)
    zero = adapters.init_adapter(method, KEY, factored, sites)
    assert adapters.num_params(zero) == 7368

    def noise(seed, like=zero):
        keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(like))))
        return jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), like)

    experts = [noise(seed) for seed in range(4)]
    vectors = jax.tree.map(lambda *x: jnp.stack(x), *experts)
    searched = (
        spaces.full_space(zero),
        spaces.principal_space(zero, vectors, 4),
        spaces.expert_space(noise(9), experts),
        spaces.expert_space(zero, experts, per_site=True),
    )
    candidates = [
        spaces.decode(space, noise(10 + seed, space.origin))
        for space in searched
        for seed in (0, 1)
    ]
    population = jax.tree.map(lambda *x: jnp.stack(x), *candidates)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 12)).astype(np.int32)
    batch = Texts(jnp.asarray(tokens), jnp.ones((1, 12), bool), jnp.ones((1, 12), bool))

    @jax.jit
    def score(likelihood, population):
        return jax.vmap(lambda offsets: likelihood(offsets, batch, KEY))(population)

    found = score(fitness.Likelihood(factored, model), population)
    merge = jax.jit(lambda params, offsets: adapters.merge_params(method, params, offsets, sites))
    one = jax.jit(lambda params: fitness.Likelihood(params, base)({}, batch, KEY))
    expected = [float(one(merge(factored, offsets))) for offsets in candidates]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize(
    ("population", "texts", "length", "expected"),
    [
        (100, 1, 12, 50),  # 93 would fit; half of them leaves no rest
        (100, 1, 9, 100),
        (100, 1, 128, 5),  # 8 would leave a rest
        (101, 1, 128, 8),  # a prime number leaves one anyway
        (100, 8, 257, 1),
        (1, 1, 2, 1),
    ],
)
def test_a_population_is_scored_about_a_thousand_tokens_at_a_time(
    population, texts, length, expected, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    empty = np.zeros((texts, length), bool)
    batch = fitness.Texts(empty, empty, empty)
    assert fitness.population_chunk(population, batch) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fitness.population_chunk(population, batch) >= expected
