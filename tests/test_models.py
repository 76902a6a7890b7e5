"""A model's functions agree with each other, whatever the padding, batch, cache and precision.

For GPT-2, and for a Qwen2 with groups of heads and a head of its own.  Lengths are the same
throughout, so that few programs are compiled: texts have up to 19 tokens, the first 11 of them a
prompt.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax.models import base, hub, likelihood
from grpocem_jax.utils.errors import InputError
from tests.parity import weights
from tests.tiny import make_tiny

FIELDS = weights.SHAPES["small"]
TEXT = weights.tokens(FIELDS, 19)
LENGTH, PROMPT = 19, 11


@pytest.fixture(scope="module", params=["gpt2", "qwen2"], name="tiny")
def _tiny(request, deep):
    if request.param == "gpt2":
        return deep
    return make_tiny(weights.LLAMAS["qwen2-untied"], "self_attn.o_proj")


def pad(tokens, left, length, filler=0):
    """Tokens and mask of a given length, with padding on the left and, if need be, the right."""
    mask = np.zeros(length, bool)
    mask[left : left + len(tokens)] = True
    padded = np.full(length, filler, np.int32)
    padded[mask] = tokens
    return padded, mask


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def forward(tiny, tokens, mask, offsets=None, params=None):
    params = tiny.factored if params is None else params
    return jax.jit(tiny.model.forward)(params, offsets or tiny.adapted(), tokens, mask)


def whole(tiny, tokens, params=None):
    """Hidden states of a text on its own, padded on the right."""
    return forward(tiny, *pad(tokens, 0, LENGTH), params=params)[: len(tokens)]


def prefill(tiny, tokens, params=None):
    params = tiny.factored if params is None else params
    padded = pad(tokens, PROMPT - len(tokens), PROMPT)
    return jax.jit(tiny.model.prefill)(params, tiny.adapted(), *padded)


def decode(tiny, context, tokens, params=None):
    """Hidden states of tokens decoded one by one after a context, the cache longer than needed."""
    params = tiny.factored if params is None else params
    cache = tiny.model.init_cache(params, LENGTH - PROMPT + 2)
    step = jax.jit(tiny.model.decode_step)
    states = []
    for index, token in enumerate(tokens):
        hidden, cache = step(params, tiny.adapted(), context, cache, token, jnp.int32(index))
        states.append(hidden)
    return jnp.stack(states)


@pytest.mark.parametrize("start", [0, 4])
def test_cached_decoding_equals_the_full_forward(tiny, start):
    """With a prompt that fills its slots, and with four tokens of padding before it."""
    prompt, rest = TEXT[start:PROMPT], TEXT[PROMPT:]
    hidden, context = prefill(tiny, prompt)
    expected = whole(tiny, TEXT[start:])
    close(hidden, expected[len(prompt) - 1])
    close(decode(tiny, context, rest), expected[len(prompt) :])


def test_a_prompt_padded_on_the_right_is_decoded_in_one_cache(tiny):
    """Its padding lies where its next tokens go, one after the other."""
    prompt, rest = TEXT[:6], TEXT[6:]
    expected = whole(tiny, TEXT)
    prefill = jax.jit(tiny.model.prefill)
    hidden, context = prefill(tiny.factored, tiny.adapted(), *pad(prompt, 0, PROMPT, 9))
    close(hidden, expected[5])
    cache = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, LENGTH - PROMPT), (0, 0))), context.key_values
    )
    step = jax.jit(tiny.model.decode_step)
    for index, token in enumerate(rest, start=6):
        hidden, cache = step(
            tiny.factored, tiny.adapted(), None, cache, jnp.int32(token), jnp.int32(index)
        )
        close(hidden, expected[index])


@pytest.mark.parametrize(("start", "left", "count"), [(0, 0, 8), (4, 0, 8), (4, 2, 5)])
def test_forward_after_a_context_equals_the_full_forward(tiny, start, left, count):
    prompt, rest = TEXT[start:PROMPT], TEXT[PROMPT : PROMPT + count]
    _, context = prefill(tiny, prompt)
    tokens, mask = pad(rest, left, LENGTH - PROMPT)
    found = jax.jit(tiny.model.forward)(tiny.factored, tiny.adapted(), tokens, mask, context)
    close(found[mask], whole(tiny, TEXT[start : PROMPT + count])[len(prompt) :])


def test_padding_anywhere_changes_nothing(tiny):
    text = TEXT[:12]
    expected = forward(tiny, text, np.ones(12, bool))
    holes = np.isin(np.arange(LENGTH), (0, 3, 4, 8, 11, 17, 18))
    scattered = np.zeros(LENGTH, np.int32)
    scattered[~holes] = text
    for tokens, mask in (pad(text, 7, LENGTH), pad(text, 0, LENGTH), (scattered, ~holes)):
        close(forward(tiny, tokens, mask)[mask], expected)


def test_the_content_of_padding_and_the_neighbours_change_not_one_bit(tiny):
    run = jax.jit(jax.vmap(tiny.model.prefill, (None, None, 0, 0)))

    def batch(*rows):
        hidden, _ = run(tiny.factored, tiny.adapted(), *map(np.stack, zip(*rows, strict=True)))
        return np.asarray(hidden)

    row, other = pad(TEXT[:6], 5, PROMPT), pad(TEXT[8:], 0, PROMPT)
    short = pad(TEXT[:2], 9, PROMPT)
    expected = batch(row, short, short)[0]
    np.testing.assert_array_equal(batch(row, other, short)[0], expected)
    np.testing.assert_array_equal(batch(other, short, row)[2], expected)
    np.testing.assert_array_equal(batch(pad(TEXT[:6], 5, PROMPT, 9), other, row)[0], expected)


def test_no_token_sees_a_later_one_and_every_token_sees_the_earlier(tiny):
    changed = TEXT.copy()
    changed[6] = (changed[6] + 1) % FIELDS["vocab_size"]
    difference = np.abs(whole(tiny, TEXT) - whole(tiny, changed)).max(-1)
    np.testing.assert_array_equal(difference[:6], 0.0)
    assert (difference[6:] > 1e-3).all()


def test_order_matters(tiny):
    """Positions are used: without them the last token would see a mere set."""
    swapped = TEXT[[1, 0, *range(2, LENGTH)]]
    assert np.abs(whole(tiny, TEXT)[-1] - whole(tiny, swapped)[-1]).max() > 1e-3


def test_an_adapter_that_does_not_fit_is_refused(tiny):
    name, *_ = offsets = tiny.adapted()
    tokens, mask = jnp.asarray(TEXT), jnp.ones(LENGTH, bool)
    for model, params, given, fragment in (
        (tiny.model, tiny.factored, {**offsets, "h.0.other": offsets[name]}, "'h.0.other' is no"),
        (tiny.model, tiny.factored, {}, "has no entry for"),
        (tiny.base, tiny.params, offsets, "without one"),
    ):
        with pytest.raises(InputError, match=fragment):
            model.forward(params, given, tokens, mask)


@pytest.mark.parametrize("split", [0, PROMPT])
def test_states_of_some_places_are_those_of_the_whole(tiny, split):
    """By themselves and after a context, with padding, and for each row of a batch its own."""
    tokens, mask = pad(TEXT[split:], 1, LENGTH - split + 2)
    context = prefill(tiny, TEXT[:split])[1] if split else None
    offsets = tiny.adapted()
    expected = jax.jit(tiny.model.forward)(tiny.factored, offsets, tokens, mask, context)
    places = jnp.array([[1, 2, LENGTH - split], [5, 3, 4]])
    found = jax.jit(jax.vmap(tiny.model.forward, (None, None, None, None, None, 0)))(
        tiny.factored, offsets, tokens, mask, context, places
    )
    close(found, expected[places])
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_vmaps_over_texts_and_candidates_equal_loops(tiny):
    texts = [pad(TEXT[:12], 7, LENGTH), pad(TEXT[5:], 0, LENGTH)]
    candidates = [tiny.adapted(seed) for seed in range(3)]
    over_texts = jax.vmap(tiny.model.forward, (None, None, 0, 0))
    over_candidates = jax.jit(jax.vmap(over_texts, (None, 0, None, None)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *candidates)
    found = over_candidates(tiny.factored, stacked, *map(np.stack, zip(*texts, strict=True)))
    looped = [[forward(tiny, *text, candidate) for text in texts] for candidate in candidates]
    close(found, np.array(looped))
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_vmapped_decoding_of_a_group_equals_a_loop(tiny):
    _, context = prefill(tiny, TEXT[:8])
    group = np.stack([weights.tokens(FIELDS, 4, seed=seed) for seed in range(3)])
    cache = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (3, *x.shape)), tiny.model.init_cache(tiny.factored, 4)
    )
    step = jax.jit(jax.vmap(tiny.model.decode_step, (None, None, None, 0, 0, None)))
    states = []
    for index in range(4):
        tokens = group[:, index]
        hidden, cache = step(
            tiny.factored, tiny.adapted(), context, cache, tokens, jnp.int32(index)
        )
        states.append(hidden)
    looped = [decode(tiny, context, tokens) for tokens in group]
    close(jnp.stack(states, axis=1), np.array(looped))


def test_masked_rows_are_finite_and_so_are_their_gradients(tiny):
    def total(offsets):
        hidden = tiny.model.forward(tiny.factored, offsets, TEXT, np.zeros(LENGTH, bool))
        return jnp.sum(hidden), hidden

    gradient, hidden = jax.jit(jax.grad(total, has_aux=True))(tiny.adapted())
    assert np.isfinite(hidden).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_attention_over_segments_equals_attention_over_them_joined():
    rng = np.random.default_rng(0)
    query, keys, values = (rng.normal(size=(2, n, 4)).astype(np.float32) for n in (3, 9, 9))
    allowed = rng.random((3, 9)) < 0.6
    allowed[:, 0] = True
    found = base.attend(
        query,
        [(keys[:, a:b], values[:, a:b], allowed[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 9))],
    )
    for head in range(2):
        scores = query[head] @ keys[head].T / 2.0  # sqrt(4)
        shares = np.where(allowed, np.exp(scores), 0.0)
        expected = shares / shares.sum(-1, keepdims=True) @ values[head]
        close(found[head], expected, 1e-6)


@pytest.mark.parametrize("shared", [2, 3, 6])
def test_heads_that_share_keys_attend_as_with_copies_of_them_and_make_none(shared):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(6, 3, 4)).astype(np.float32)
    keys, values = (rng.normal(size=(6 // shared, 9, 4)).astype(np.float32) for _ in range(2))
    allowed = rng.random((3, 9)) < 0.6
    allowed[:, 0] = True

    def attend(keys, values):
        parts = [(keys[:, a:b], values[:, a:b], allowed[:, a:b]) for a, b in ((0, 4), (4, 9))]
        return base.attend(query, parts)

    # Head 0 and its neighbours share the first keys; np.tile would give them to every other head.
    copies = (np.repeat(x, shared, axis=0) for x in (keys, values))
    close(attend(keys, values), attend(*copies), 1e-6)
    made = [v.aval.shape for equation in equations(attend, keys, values) for v in equation.outvars]
    assert (6 // shared, shared * 3, 9) in made  # the attention weights
    assert not any(shape[0] == 6 and shape[1] in (4, 5, 9) for shape in made if len(shape) == 3)


def equations(function, *args):
    """Every operation in a function, also in those it calls."""

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from visit(inner)

    return visit(jax.make_jaxpr(function)(*args).jaxpr)


def dots(function, *args):
    """Operand and result types of every matrix product in a function."""
    return [
        [v.aval.dtype.name for v in (*equation.invars, *equation.outvars)]
        for equation in equations(function, *args)
        if equation.primitive.name == "dot_general"
    ]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mixed_precision_multiplies_matrices_in_half_and_keeps_the_rest(tiny, dtype):
    params, offsets, name = base.cast_params(tiny.factored, dtype), tiny.adapted(), dtype.__name__
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == (dtype if leaf.ndim == 2 else jnp.float32)
    text = pad(TEXT[:9], 2, PROMPT)
    hidden, context = jax.eval_shape(tiny.model.prefill, params, offsets, *text)
    cache = tiny.model.init_cache(params, 4)
    assert {x.dtype.name for x in jax.tree.leaves((context.key_values, cache))} == {name}
    assert hidden.dtype == jnp.float32
    assert jax.eval_shape(tiny.model.logits, params, hidden).dtype == jnp.float32

    products = [
        *dots(tiny.model.forward, params, offsets, *text),
        *dots(tiny.model.decode_step, params, offsets, context, cache, TEXT[0], jnp.int32(0)),
        *dots(tiny.model.logits, params, hidden),
    ]
    # The maps, one of them in two factors, and two products of attention, doubled by a context.
    maps = len(tiny.model.sites) // 2 + 1
    assert len(products) == 2 * (maps + 2) + 2 * (maps + 4) + 1
    assert all(product == [name, name, "float32"] for product in products)


def test_bfloat16_decodes_what_its_forward_computes_near_float32(tiny):
    """Both round the same operands, so the policy that samples is the policy that learns."""
    params = base.cast_params(tiny.factored, jnp.bfloat16)
    _, context = prefill(tiny, TEXT[:PROMPT], params)
    decoded = decode(tiny, context, TEXT[PROMPT:], params)
    half, single = (whole(tiny, TEXT, p)[PROMPT:] for p in (params, tiny.factored))
    assert np.std(single) == pytest.approx(1.0, rel=0.2)
    rounding = np.abs(half - single).mean()
    assert 1e-3 < rounding < 0.03  # a bfloat16 holds 8 bits: 0.002 is lost on average
    assert np.abs(half - decoded).mean() < 0.1 * rounding


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-1.5b", 1_543_714_304),
        ("qwen2-7b", 7_615_616_512),
    ],
)
def test_published_shapes_have_the_published_sizes(shape, count):
    assert hub.load_outline(f"random:{shape}").num_params() == count


def test_every_kernel_is_a_site(tiny):
    leaves = jax.tree_util.tree_leaves_with_path(tiny.params)
    paths = {tuple(part.key for part in path) for path, _ in leaves}
    assert set(tiny.base.sites.values()) == {path for path in paths if path[-1] == "kernel"}


def test_a_block_is_traced_once_for_all_layers(tiny, monkeypatch):
    traced, block = [], tiny.architecture.Block
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda *x: traced.append(x) or call(*x))
    model = tiny.architecture.build(tiny.config, tiny.adapter.apply)
    jax.eval_shape(
        functools.partial(model.forward, tokens=TEXT, mask=np.ones(LENGTH, bool)),
        tiny.factored,
        tiny.adapted(),
    )
    assert tiny.config.num_layers > 1
    assert len(traced) == 1


def test_the_head_in_parts_is_the_head(tiny):
    hidden = jax.random.normal(jax.random.key(0), (3, tiny.config.width))
    whole = tiny.base.logits(tiny.params, hidden)
    assert whole.shape == (3, tiny.config.vocab_size)
    part = jax.jit(lambda start: tiny.base.logits(tiny.params, hidden, start, 5))(jnp.int32(4))
    close(part, whole[:, 4:9])


def test_a_record_may_be_a_static_argument(tiny):
    traced = []

    @functools.partial(jax.jit, static_argnames="model")
    def logits(params, hidden, model):
        traced.append(model)
        return model.logits(params, hidden)

    hidden = jnp.ones(tiny.config.width)
    logits(tiny.params, hidden, model=tiny.base)
    logits(tiny.params, hidden, model=tiny.base)
    logits(tiny.params, hidden, model=tiny.architecture.build(tiny.config))
    assert len(traced) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_completions_of_one_token_and_of_more_have_the_log_probabilities_of_a_whole_text(
    tiny, count
):
    prompt, rest = TEXT[:PROMPT], TEXT[PROMPT : PROMPT + count]
    logps = jax.jit(functools.partial(likelihood.completion_logps, tiny.model))(
        tiny.factored,
        tiny.adapted(),
        *pad(prompt, 0, PROMPT),
        np.asarray(rest)[None],
        np.ones((1, count), bool),
        1.0,
    )[0]
    logits = tiny.model.logits(tiny.factored, whole(tiny, TEXT[: PROMPT + count]))
    expected = jax.nn.log_softmax(logits)[PROMPT - 1 : -1]
    close(logps[0], expected[np.arange(count), np.asarray(rest)])
