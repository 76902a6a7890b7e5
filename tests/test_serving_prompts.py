"""What prompts begin with is processed once, and answers do not show it."""

import jax
import numpy as np
import pytest

from grpocem_jax import adaptation
from grpocem_jax.serving import Engine, Request
from grpocem_jax.serving.prompts import Prompt
from tests.runs import get_config, random_offsets, thin_model

BUCKETS = (3, 6, 24)
SYSTEM = "Review: The soup was cold."  # longer than the second bucket
TAILS = (" A", " The tea was good", "\nSentiment:", " Bad.")

pytestmark = pytest.mark.usefixtures("one_policy")


@pytest.fixture(scope="module")
def run():
    changes = {"generation.max_new_tokens": 6, "search.buckets": (8, 32)}
    return adaptation.load_base(get_config(**{"model.source": thin_model(), **changes}))


def make_engine(run, **changes):
    def load(name):
        return random_offsets(run.offsets, seed=int(name), scale=2.0)

    options = {"slots": 4, "rows": 3, "buckets": BUCKETS, "max_new_tokens": 6, "load": load}
    return Engine(run.policy, run.offsets, **{**options, **changes})


def requests(run, texts, adapter=None):
    tokens = [np.asarray(run.policy.encode(text), np.int32) for text in texts]
    return [Request(tokens=x, adapter=adapter, max_new_tokens=6) for x in tokens]


def complete(engine, requests):
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return ["".join(piece.text for piece in ticket.pieces(timeout=0)) for ticket in tickets]


def processed(engine, requests):
    """The answers, and how many tokens of prompts they took."""
    before = engine.stats.prompt_tokens
    return complete(engine, requests), engine.stats.prompt_tokens - before


def test_a_beginning_is_processed_once_and_no_answer_shows_it(run):
    asked = requests(run, [SYSTEM + tail for tail in TAILS])
    lengths = [len(x.tokens) for x in asked]
    assert min(lengths) > 6  # all begin with the second bucket
    assert max(lengths) <= 24
    engine = make_engine(run)
    found, tokens = processed(engine, asked)
    assert tokens == 6 + sum(lengths) - 6 * len(lengths)
    texts = [SYSTEM + tail for tail in TAILS]
    assert found == adaptation.complete(run, run.offsets, texts)
    assert found == [complete(make_engine(run), [each])[0] for each in asked]
    # In a later batch too.
    again, tokens = processed(engine, asked[::-1])
    assert again == found[::-1]
    assert tokens == sum(lengths) - 6 * len(lengths)


def test_a_beginning_of_a_beginning_is_shared_as_well(run):
    first = np.arange(20, 31, dtype=np.int32)
    other = np.concatenate([first[:4], first[:6]])  # the same in the first bucket alone
    asked = [Request(tokens=x, max_new_tokens=6) for x in (first, other)]
    engine = make_engine(run)
    found, tokens = processed(engine, asked)
    assert tokens == 3 + (3 + 5) + (3 + 4)
    assert found == [complete(make_engine(run), [each])[0] for each in asked]


def test_another_adapter_has_other_keys_and_values(run):
    engine = make_engine(run)
    texts = [SYSTEM + tail for tail in TAILS[:2]]
    base, tokens = processed(engine, requests(run, texts))
    for name in ("1", "2"):
        found, own = processed(engine, requests(run, texts, adapter=name))
        assert own == tokens
        assert found != base
        assert found == complete(make_engine(run), requests(run, texts, adapter=name))
    # A name that stands for another adapter from now on.
    engine.forget("1")
    assert processed(engine, requests(run, texts, adapter="1"))[1] == tokens


@pytest.mark.parametrize("kept", [0, 6, 9])
def test_no_more_is_kept_than_may_be(run, kept):
    engine = make_engine(run, prefix_tokens=kept)
    texts = [x + TAILS[0] for x in (SYSTEM, "The tea was warm and good, and so it")]
    asked = requests(run, texts)
    found = [complete(make_engine(run), [each])[0] for each in asked]
    for _ in range(3):
        assert [complete(engine, [each])[0] for each in asked] == found
        held = [head.cache.keys[0].shape[1] for head in engine._prompts._kept.values()]
        assert sum(held) <= kept
        assert sum(held) == engine._prompts._held


def test_keys_and_values_are_those_of_the_whole_prompt(run):
    engine = make_engine(run)
    engine.warm_up()
    (request,) = requests(run, [SYSTEM + TAILS[1]])
    prompt = Prompt(None, 0, request.tokens)
    made = engine._prompts.process(engine._resident.table, 24, [prompt])
    model, params = run.policy.model, run.policy.params
    tokens = request.tokens
    hidden, context = model.prefill(params, run.offsets, tokens, np.ones(len(tokens), bool))
    assert int(made.held[0]) == len(tokens)
    np.testing.assert_allclose(made.hidden[0], hidden, atol=1e-4)
    for own, whole in zip(
        jax.tree.leaves(made.cache), jax.tree.leaves(context.key_values), strict=True
    ):
        np.testing.assert_allclose(own[0][:, : len(tokens)], whole, atol=1e-4)
