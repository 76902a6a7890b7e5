"""Sampling: the decode loop against the full forward, exact top-p, independence and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import likelihood, sampling

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


def draw(tiny, adapter, prompts, keys=None, end_ids=NO_END, temperature=0.9, **options):
    tokens, mask = prompts
    keys = jax.random.split(jax.random.key(5), len(tokens)) if keys is None else keys
    options = {"num_samples": GROUP, "max_new_tokens": LENGTH, **options}
    return sampling.sample(
        tiny.factored,
        adapter,
        tokens,
        mask,
        keys,
        end_ids,
        temperature,
        model=tiny.model,
        **options,
    )


def some_end(tiny, offsets, prompts):
    """A token that the samples do produce, so that some end early."""
    return draw(tiny, offsets, prompts).tokens[0, :2, 2]


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


def test_a_prompts_result_does_not_depend_on_neighbours_or_padding(tiny, prompts, offsets):
    tokens, mask = prompts
    keys = jax.random.split(jax.random.key(5), PROMPTS)
    together = draw(tiny, offsets, prompts, keys=keys, top_p=0.8, repetition_penalty=1.3)
    for p in range(PROMPTS):
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


def test_the_loop_stops_when_all_have_ended(tiny, prompts, offsets):
    every_token = jnp.arange(tiny.model.vocab_size)
    out = draw(tiny, offsets, prompts, end_ids=every_token, max_new_tokens=100)
    np.testing.assert_array_equal(out.mask.sum(-1), 1)
    # 100 tokens would be beyond the context of 64, and the positions after the first never ran.
    assert bool(jnp.all(jnp.isfinite(out.logps)))


def test_end_ids_and_temperature_are_arguments_of_one_program(tiny, prompts, offsets):
    draw(tiny, offsets, prompts, end_ids=jnp.array([1]), temperature=0.5)
    programs = sampling.sample._cache_size()
    draw(tiny, offsets, prompts, end_ids=jnp.array([2]), temperature=0.7)
    assert sampling.sample._cache_size() == programs


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


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_top_p_equals_the_sort(top_p, scale):
    logits = scale * jax.random.normal(jax.random.key(int(10 * scale)), (50, 1000))
    probs = jax.nn.softmax(logits)
    kept = jax.vmap(lambda p: sampling.top_p_mask(p, top_p))(probs)
    exact = np.asarray(probs, np.float64)
    for row in range(len(probs)):
        reference = sorted_nucleus(exact[row], top_p)
        # Sums in float32 and float64 may disagree about the very last token.
        assert np.sum(np.asarray(kept[row]) != reference) <= 1
        assert exact[row][np.asarray(kept[row])].sum() >= top_p - 1e-5


def test_top_p_keeps_ties_and_the_whole_of_a_full_nucleus():
    probs = jnp.array([0.4, 0.2, 0.2, 0.2, 0.0])
    # 0.4 + 0.2 reaches 0.6, and the other two tokens of 0.2 tie with the last one taken.
    np.testing.assert_array_equal(sampling.top_p_mask(probs, 0.5), [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(sampling.top_p_mask(probs, 0.4), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(sampling.top_p_mask(jnp.array([0.5, 0.5]), 1.0), [1, 1])


def test_samples_follow_the_truncated_distribution(tiny, offsets):
    prompt = (jnp.array([[4, 9, 2]]), jnp.ones((1, 3), bool))
    out = draw(
        tiny, offsets, prompt, num_samples=4000, max_new_tokens=1, top_p=0.6, temperature=3.0
    )
    hidden, _ = tiny.model.prefill(tiny.factored, offsets, prompt[0][0], prompt[1][0])
    probs = jax.nn.softmax(tiny.model.logits(tiny.factored, hidden) / 3.0)
    kept = np.asarray(sampling.top_p_mask(probs, 0.6))
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
