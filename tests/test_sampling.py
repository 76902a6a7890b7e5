"""Sampling: the decode loop against the full forward, exact top-p, independence and keys."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.models import likelihood, sampling
from grpocem_jax.utils.errors import InputError

PROMPTS, GROUP, LENGTH = 3, 4, 8
NO_END = jnp.array([-1])


@pytest.fixture(scope="module")
def prompts(tiny):
    tokens = jax.random.randint(jax.random.key(3), (PROMPTS, 6), 0, tiny.model.vocab_size)
    mask = jnp.arange(6)[None] >= jnp.array([[0], [2], [5]])
    return tokens, mask


@pytest.fixture(scope="module")
def offsets(tiny):
    return tiny.adapted()


def sample(tiny, offsets, prompts, keys=None, end_ids=NO_END, temperature=0.9, **options):
    tokens, mask = prompts
    keys = jax.random.split(jax.random.key(5), len(tokens)) if keys is None else keys
    options = {"num_samples": GROUP, "max_new_tokens": LENGTH, **options}
    return sampling.sample(
        tiny.factored,
        offsets,
        tokens,
        mask,
        keys,
        end_ids,
        temperature,
        model=tiny.model,
        **options,
    )


def draw(*args, **options):
    """`sample`, on the host, where looking at a single token compiles nothing."""
    return jax.device_get(sample(*args, **options))


def some_end(tiny, offsets, prompts):
    """A token that the samples do produce, so that some end early."""
    return draw(tiny, offsets, prompts).tokens[0, :2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5, "repetition_penalty": 1.3}])
def test_log_probabilities_and_entropies_are_those_of_the_full_forward(
    tiny, prompts, offsets, options
):
    out = draw(tiny, offsets, prompts, end_ids=some_end(tiny, offsets, prompts), **options)
    completion_logps = jax.jit(functools.partial(likelihood.completion_logps, tiny.model))
    for p in range(PROMPTS):
        logps, entropies = completion_logps(
            tiny.factored,
            offsets,
            prompts[0][p],
            prompts[1][p],
            out.tokens[p],
            out.mask[p],
            0.9,
        )
        np.testing.assert_allclose(out.logps[p], logps, atol=1e-5)
        np.testing.assert_allclose(out.entropies[p], entropies, atol=1e-5)
    assert bool(jnp.all(out.logps[out.mask] < 0))


def test_the_same_keys_give_the_same_tokens_and_others_do_not(tiny, prompts, offsets):
    first, again = draw(tiny, offsets, prompts), draw(tiny, offsets, prompts)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = draw(tiny, offsets, prompts, keys=jax.random.split(jax.random.key(6), PROMPTS))
    assert not np.array_equal(first.tokens, other.tokens)
    samples = {tuple(row) for row in np.asarray(first.tokens).reshape(-1, LENGTH).tolist()}
    assert len(samples) > PROMPTS * GROUP / 2


@pytest.mark.slow
def test_a_prompts_result_does_not_depend_on_neighbours_or_padding(tiny, prompts, offsets):
    tokens, mask = prompts
    keys = jax.random.split(jax.random.key(5), PROMPTS)
    together = draw(tiny, offsets, prompts, keys=keys, top_p=0.8, repetition_penalty=1.3)
    for p in (0, 2):  # the one without padding, and the one with most
        alone = (tokens[p][mask[p]][None], jnp.ones((1, int(mask[p].sum())), bool))
        single = draw(tiny, offsets, alone, keys=keys[p : p + 1], top_p=0.8, repetition_penalty=1.3)
        np.testing.assert_array_equal(together.tokens[p], single.tokens[0])
        np.testing.assert_allclose(together.logps[p], single.logps[0], atol=1e-5)


def test_completions_end_with_the_first_end_token(tiny, prompts, offsets):
    free = draw(tiny, offsets, prompts)
    end_ids = some_end(tiny, offsets, prompts)
    out = draw(tiny, offsets, prompts, end_ids=end_ids)
    ended_early = 0
    for p in range(PROMPTS):
        for g in range(GROUP):
            row = np.asarray(free.tokens[p, g])
            stops = np.flatnonzero(np.isin(row, end_ids))
            n = stops[0] + 1 if len(stops) else LENGTH
            ended_early += n < LENGTH
            np.testing.assert_array_equal(out.tokens[p, g, :n], row[:n])
            np.testing.assert_array_equal(out.mask[p, g], np.arange(LENGTH) < n)
            for values in (out.tokens, out.logps, out.entropies):
                np.testing.assert_array_equal(values[p, g, n:], 0)
    assert ended_early >= 2


@pytest.mark.slow
def test_the_loop_stops_when_all_have_ended(tiny, prompts, offsets):
    every_token = jnp.arange(tiny.model.vocab_size)
    out = draw(tiny, offsets, prompts, end_ids=every_token, max_new_tokens=100)
    np.testing.assert_array_equal(out.mask.sum(-1), 1)
    # 100 tokens would be beyond the context of 64, and the positions after the first never ran.
    assert bool(jnp.all(jnp.isfinite(out.logps)))


def test_end_ids_and_temperature_are_arguments_of_one_program(tiny, prompts, offsets):
    draw(tiny, offsets, prompts, end_ids=jnp.array([1]), temperature=0.5)
    programs = sampling._sample._cache_size()
    draw(tiny, offsets, prompts, end_ids=jnp.array([2]), temperature=0.7)
    assert sampling._sample._cache_size() == programs


@pytest.mark.slow
def test_greedy_takes_the_most_probable_token_of_the_full_forward(tiny, prompts, offsets):
    out = draw(tiny, offsets, prompts, greedy=True, num_samples=1)
    forward = jax.jit(tiny.model.forward)
    for p in range(PROMPTS):
        start = prompts[0].shape[1]
        tokens = jnp.concatenate([prompts[0][p], jnp.zeros(LENGTH, jnp.int32)])
        mask = jnp.concatenate([prompts[1][p], jnp.zeros(LENGTH, bool)])
        for t in range(LENGTH):
            hidden = forward(tiny.factored, offsets, tokens, mask)[start + t - 1]
            token = int(jnp.argmax(tiny.model.logits(tiny.factored, hidden)))
            assert int(out.tokens[p, 0, t]) == token
            tokens = tokens.at[start + t].set(token)
            mask = mask.at[start + t].set(True)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "repetition_penalty": 1.5}])
def test_the_last_of_several_samples_is_greedy_and_the_others_are_drawn(
    tiny, prompts, offsets, settings
):
    drawn = draw(tiny, offsets, prompts, num_samples=2, **settings)
    greedy = draw(tiny, offsets, prompts, num_samples=1, greedy=True, **settings)
    both = draw(tiny, offsets, prompts, num_samples=3, greedy=True, **settings)
    np.testing.assert_array_equal(both.tokens[:, :2], drawn.tokens)
    np.testing.assert_array_equal(both.tokens[:, 2:], greedy.tokens)
    np.testing.assert_allclose(both.logps[:, :2], drawn.logps, atol=1e-4)
    np.testing.assert_allclose(both.logps[:, 2:], greedy.logps, atol=1e-4)


@pytest.mark.slow
def test_repetition_penalty_by_hand_and_over_prompt_and_completion(tiny, prompts, offsets):
    logits = jnp.array([2.0, -2.0, 3.0, 0.0])
    seen = jnp.array([True, True, False, True])
    np.testing.assert_allclose(
        sampling.penalize_repetition(logits, seen, 2.0), [1.0, -4.0, 3.0, 0.0]
    )
    out = draw(tiny, offsets, prompts, greedy=True, num_samples=1, repetition_penalty=1e9)
    for p in range(PROMPTS):
        text = [*prompts[0][p][prompts[1][p]].tolist(), *out.tokens[p, 0].tolist()]
        generated = text[-LENGTH:]
        assert len(set(generated)) == LENGTH
        assert not set(generated) & set(text[:-LENGTH])


def sorted_nucleus(probs, top_p):
    """The usual definition, by a sort."""
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    keep = np.zeros(len(probs), bool)
    keep[order[before < top_p]] = True
    return keep


@jax.jit
def nucleus(probs, top_p):
    return jax.vmap(lambda token: sampling.in_nucleus(probs, token, top_p))(jnp.arange(len(probs)))


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_nucleus_equals_the_sort(top_p, scale):
    logits = scale * jax.random.normal(jax.random.key(int(10 * scale)), (50, 1000))
    probs = jax.nn.softmax(logits)
    kept = jax.vmap(lambda p: nucleus(p, top_p))(probs)
    exact = np.asarray(probs, np.float64)
    for row in range(len(probs)):
        reference = sorted_nucleus(exact[row], top_p)
        # Sums in float32 and float64 may disagree about the very last token.
        assert np.sum(np.asarray(kept[row]) != reference) <= 1
        assert exact[row][np.asarray(kept[row])].sum() >= top_p - 1e-5


def test_the_nucleus_has_ties_and_a_full_one_has_everything():
    probs = jnp.array([0.4, 0.2, 0.2, 0.2, 0.0])
    # 0.4 + 0.2 reaches 0.6, and the other two tokens of 0.2 tie with the last one taken.
    np.testing.assert_array_equal(nucleus(probs, 0.5), [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(nucleus(probs, 0.4), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(nucleus(jnp.array([0.5, 0.5]), 1.0), [1, 1])
    np.testing.assert_array_equal(nucleus(7 * probs, 0.4), [1, 0, 0, 0, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_the_inverse_cdf_is_that_of_the_running_sum(size):
    weights = np.random.default_rng(size).integers(0, 4, size).astype(np.float32)
    weights[0] += 1
    total = int(weights.sum())
    # Halfway between the steps of the sum, so that rounding decides nothing.
    uniforms = (np.arange(total) + 0.5) / total
    found = jax.jit(jax.vmap(sampling.inverse_cdf, in_axes=(None, 0)))(
        weights, jnp.float32(uniforms)
    )
    np.testing.assert_array_equal(found, np.repeat(np.arange(size), weights.astype(int)))


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [0.0, 0.3, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_inverse_cdf_never_finds_a_weight_of_zero(uniform):
    rows = np.random.default_rng(0).gamma(0.05, size=(200, 1003)).astype(np.float32)
    rows[:, ::3] = 0.0
    rows[:, -70:] = 0.0  # a last block of nothing, and the end of the one before
    found = jax.jit(jax.vmap(sampling.inverse_cdf, in_axes=(0, None)))(rows, jnp.float32(uniform))
    assert np.all(rows[np.arange(200), np.asarray(found)] > 0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [50, 225, 1003])
def test_no_uniform_finds_a_weight_of_zero_in_a_compiled_program(size):
    rng = np.random.default_rng(size)
    weights = rng.gamma(0.3, size=size).astype(np.float32)
    side = math.isqrt(size) + 1
    starts = np.arange(0, size, side)
    weights[::3] = 0.0
    weights[starts] = 0.0  # what a goal a little before its block would find
    # Uniforms that stand where blocks begin, and their neighbours, beside many others.
    blocks = np.pad(weights, (0, -size % side)).reshape(-1, side).sum(1, dtype=np.float32)
    sums = np.cumsum(blocks, dtype=np.float32)
    edges = (sums[:-1] / sums[-1]).astype(np.float32)
    near = [edges]
    for way in (np.float32(0), np.float32(1)):
        edge = edges
        for _ in range(3):
            edge = np.nextafter(edge, way)
            near.append(edge)
    others = rng.random(100_000, dtype=np.float32)
    uniforms = np.concatenate([*near, others, np.zeros(1, np.float32)])
    find = jax.jit(jax.vmap(sampling.inverse_cdf, in_axes=(None, 0)))
    assert np.all(weights[np.asarray(find(weights, uniforms))] > 0)


def test_a_nucleus_of_each_row_is_drawn_from_as_one_of_all():
    logits = 2.0 * jax.random.normal(jax.random.key(1), (5, 300))
    keys = jax.random.split(jax.random.key(2), 5)
    masses = (1e-6, 0.1, 0.5, 0.9, 1.0)
    traced = jax.jit(jax.vmap(sampling.draw))(keys, logits, jnp.array(masses, jnp.float32))
    rows = zip(keys, logits, masses, strict=True)
    assert traced.tolist() == [int(sampling.draw(*row)) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1e-6, 0.02, 0.3, 0.85, 1.0])
def test_draws_follow_the_nucleus(top_p):
    logits = 1.5 * jax.random.normal(jax.random.key(1), (300,))
    keys = jax.random.split(jax.random.key(2), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: sampling.draw(key, logits, top_p)))(keys)
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    expected = np.where(nucleus(jnp.float32(probs), top_p), probs, 0.0)
    expected /= expected.sum()
    counts = np.bincount(drawn, minlength=300)
    assert counts[expected == 0].sum() == 0
    bound = 5 * np.sqrt(20_000 * expected * (1 - expected)) + 1
    assert np.all(np.abs(counts - 20_000 * expected) <= bound)


def kept(logits, top_k, top_p, min_p):
    """The distribution that is left, in NumPy: by a sort, one filter after the other."""
    probs = np.exp(logits - logits.max())
    order = np.argsort(-probs, kind="stable")
    if top_k:
        probs[order[top_k:]] = 0.0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0.0
    probs[probs < min_p * probs.max()] = 0.0
    return probs / probs.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 1.0, 0.3),
        (0, 1.0, 1.0),
        (7, 0.6, 0.0),
        (12, 0.9, 0.05),
        (0, 0.5, 0.4),
        (20, 0.95, 0.2),
        (40, 0.99, 0.0),
        (99, 1.0, 0.0),
    ],
)
def test_draws_follow_what_top_k_then_top_p_then_min_p_leave(top_k, top_p, min_p):
    """Top-k first: of its 7 tokens 0.6 of their own mass, which is fewer than 0.6 of all."""
    logits = np.random.default_rng(3).normal(0, 1.5, 40).astype(np.float32)
    expected = kept(logits.astype(np.float64), top_k, top_p, min_p)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    options = {"top_k": top_k, "min_p": min_p}
    drawn = jax.jit(jax.vmap(lambda key: sampling.draw(key, logits, top_p, **options)))(keys)
    shares = np.bincount(drawn, minlength=40) / count
    assert not shares[expected == 0].any()
    errors = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(shares - expected) <= 4.5 * errors).all()


@pytest.mark.slow
def test_tokens_that_tie_with_the_last_of_top_k_are_kept():
    logits = jnp.log(jnp.array([4.0, 2.0, 2.0, 1.0]))
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = jax.jit(jax.vmap(lambda key: sampling.draw(key, logits, 1.0, top_k=2)))(keys)
    assert set(np.asarray(drawn).tolist()) == {0, 1, 2}


@pytest.mark.slow
def test_top_k_and_min_p_that_are_off_draw_the_same_tokens_and_record_the_same(
    tiny, prompts, offsets
):
    plain = draw(tiny, offsets, prompts, top_p=0.8)
    off = draw(tiny, offsets, prompts, top_p=0.8, top_k=0, min_p=0.0)
    chex.assert_trees_all_equal(off, plain)
    one = draw(tiny, offsets, prompts, top_k=1)
    np.testing.assert_array_equal(one.tokens, draw(tiny, offsets, prompts, min_p=1.0).tokens)
    greedy = draw(tiny, offsets, prompts, greedy=True, num_samples=1)
    np.testing.assert_array_equal(one.tokens, np.repeat(greedy.tokens, GROUP, axis=1))


@pytest.mark.slow
def test_one_new_token_is_the_first_of_several(tiny, prompts, offsets):
    several, one = (draw(tiny, offsets, prompts, max_new_tokens=n) for n in (LENGTH, 1))
    for longer, single in zip(several, one, strict=True):
        np.testing.assert_array_equal(single, longer[..., :1])


@pytest.mark.slow
def test_a_stop_table_ends_completions_and_changes_nothing_before(tiny, prompts, offsets):
    """A pair of tokens that one sample has: state 1 after the first, the end after both."""
    plain = draw(tiny, offsets, prompts)
    first, second = np.asarray(plain.tokens[1, 2, 3:5])
    table = np.zeros((2, tiny.model.vocab_size), np.int32)
    table[:, first] = 1
    table[1, second] = 2
    out = draw(tiny, offsets, prompts, stop_table=jnp.asarray(table))
    assert not out.mask[1, 2, 5:].any()
    for p in range(PROMPTS):
        for g in range(GROUP):
            row = np.asarray(plain.tokens[p, g])
            pairs = np.flatnonzero((row[:-1] == first) & (row[1:] == second))
            length = pairs[0] + 2 if len(pairs) else LENGTH
            assert out.mask[p, g].tolist() == [i < length for i in range(LENGTH)]
            for found, expected in zip(out, plain, strict=True):
                np.testing.assert_array_equal(found[p, g, :length], expected[p, g, :length])


@pytest.mark.slow
def test_a_draw_from_what_is_not_a_number_comes_to_an_end():
    broken = jnp.full(50, jnp.nan)
    assert 0 <= int(sampling.draw(jax.random.key(0), broken, 0.5)) < 50


@pytest.mark.slow
def test_samples_follow_the_truncated_distribution(tiny, offsets):
    prompt = (jnp.array([[4, 9, 2]]), jnp.ones((1, 3), bool))
    out = draw(
        tiny, offsets, prompt, num_samples=4000, max_new_tokens=1, top_p=0.6, temperature=3.0
    )
    hidden, _ = tiny.model.prefill(tiny.factored, offsets, prompt[0][0], prompt[1][0])
    probs = jax.nn.softmax(tiny.model.logits(tiny.factored, hidden) / 3.0)
    kept = np.asarray(nucleus(probs, 0.6))
    expected = np.where(kept, np.asarray(probs, np.float64), 0.0)
    expected /= expected.sum()
    counts = np.bincount(np.asarray(out.tokens).ravel(), minlength=len(probs))
    assert counts[~kept].sum() == 0
    # Five standard deviations of a binomial count, for each token.
    bound = 5 * np.sqrt(4000 * expected * (1 - expected)) + 1
    assert np.all(np.abs(counts - 4000 * expected) <= bound)
    assert 2 < kept.sum() < len(probs)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 0.6), (0.5, 0.5), (1.0, 0.4), (2.0, 0.4), (-1.0, 0.6)]
)
def test_annealing_is_linear_and_stays_between_its_ends(fraction, expected):
    assert sampling.anneal(0.6, 0.4, fraction) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.0),
        ("top_p", 2.0),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.9),
        ("num_samples", 0),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(tiny, prompts, offsets, name, value):
    with pytest.raises(InputError) as refused:
        draw(tiny, offsets, prompts, **{name: value})
    assert str(refused.value).startswith(f"{name}={value}: must be ")
    if name != "temperature":
        with pytest.raises(InputError, match=f"^{name}={value}: must be "):
            jax.jit(lambda x: sample(tiny, x, prompts, **{name: value}))(offsets)


KEY = jax.random.key(5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": KEY}, r"^keys of shape \(\): must be one key for each of the 3 prompts"),
        ({"keys": jax.random.PRNGKey(5)}, r"^keys of shape \(2,\): .*jax\.random\.split\(key, 3\)"),
        ({"keys": jax.random.split(KEY)}, r"^keys of shape \(2,\): must be one key"),
        ({"prompts": ([1, 2], [True, True])}, r"^prompts of shape \(2,\) .* must both be \[P, S\]"),
        ({"prompts": (np.ones((3, 6)), np.ones((3, 5)))}, r"prompt_mask of shape \(3, 5\): must"),
        ({"prompts": ([[1], [1, 2]], [[True]] * 2)}, "^prompts: must be an array, or lists"),
        ({"top_k": 5.0}, r"^top_k=5\.0: must be a whole number, at least 0"),
        ({"top_p": jnp.float32(0.9)}, r"^top_p=Array\(0\.9.*: must be a number, above 0"),
        ({"temperature": np.ones(3)}, r"^temperature=array\(.*: must be a number, above 0"),
        ({"temperature": "hot"}, "^temperature='hot': must be a number, above 0"),
    ],
)
def test_what_cannot_be_sampled_with_is_named(tiny, prompts, offsets, changes, said):
    with pytest.raises(InputError, match=said):
        draw(tiny, offsets, **{"prompts": prompts, "keys": None, **changes})


@pytest.mark.slow
def test_prompts_and_end_ids_may_be_lists(tiny, prompts, offsets):
    end = int(some_end(tiny, offsets, prompts)[0])
    arrays = draw(tiny, offsets, prompts, end_ids=jnp.array([end], jnp.int32))
    lists = [x.tolist() for x in prompts]
    keys = jax.random.split(KEY, PROMPTS)
    for end_ids in ((end,), [end], np.array([end])):
        found = draw(tiny, offsets, lists, keys=keys, end_ids=end_ids)
        jax.tree.map(np.testing.assert_array_equal, found, arrays)
    assert draw(tiny, offsets, lists, keys=keys, end_ids=()).mask.all()


@pytest.mark.slow
def test_an_array_of_temperature_0_is_refused_and_a_traced_temperature_is_not_looked_at(
    tiny, prompts, offsets
):
    with pytest.raises(InputError, match=r"^temperature=0\.0: must be above 0"):
        draw(tiny, offsets, prompts, temperature=jnp.float32(0.0))
    traced = jax.jit(lambda x: sample(tiny, offsets, prompts, temperature=x).tokens)(0.9)
    np.testing.assert_array_equal(traced, draw(tiny, offsets, prompts).tokens)
