"""The foreign passages: their shape, and how foreign they are to the built-in model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpocem_jax.builtin import data, foreign
from grpocem_jax.models import hub


@pytest.fixture(scope="module")
def pretrained():
    return hub.load_model("builtin")


@pytest.fixture(scope="module")
def mean_loss(pretrained):
    """A function of 16 texts: the mean loss of their tokens after the first, in nats."""
    model = pretrained.build()

    @jax.jit
    def losses(params, tokens, mask):
        hidden = jax.vmap(model.forward, (None, None, 0, 0))(params, {}, tokens, mask)
        logits = model.logits(params, hidden[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def mean(texts):
        encoded = pretrained.tokenizer(texts)["input_ids"]
        tokens = np.zeros((len(texts), pretrained.config.context_length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, ids in enumerate(encoded):
            tokens[i, : len(ids)] = ids
            mask[i, : len(ids)] = True
        values = losses(pretrained.params, jnp.asarray(tokens), jnp.asarray(mask))
        return float(np.mean(np.asarray(values)[mask[:, 1:]]))

    return mean


def word_types(texts):
    return {word for text in texts for word in re.findall("[a-z]{4,}", text.lower())}


def test_there_are_many_frames_of_each_kind_and_all_are_used():
    for kind, parts in (
        ("recipe", foreign.RECIPE_FRAMES),
        ("log", tuple(foreign.LOG_FRAMES.values())),
    ):
        frames = [frame for part in parts for frame in part]
        assert len(set(frames)) == len(frames) >= 12
        text = "\n".join(foreign.passages(kind, 500, 0)).lower()
        for frame in frames:
            assert re.search(re.sub(r"\\{\w+\\}", "[^;]+?", re.escape(frame.lower())), text), frame


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_passages_are_well_formed(kind):
    for text in foreign.passages(kind, 500, 0):
        assert text.isascii()
        assert text == text.strip()
        assert not re.search(r"  |,,|\.\.| [.,;]|[{}]", text), text
        if kind == "recipe":
            assert 3 <= len(re.findall(r"\.(?: |$)", text)) <= 6, text
            assert not re.search(r"\. [a-z]|\n", text), text
        else:
            assert 3 <= len(text.split("\n")) <= 6, text
            assert all(
                re.match(r"\d{4}Z |\[\d\d:\d\d\] |T\d\d\.\d\d ", x) for x in text.split("\n")
            )


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_passages_are_unique_and_the_same_on_every_call(kind):
    passages = foreign.passages(kind, 300, 0)
    assert len(passages) == len(set(passages)) == 300
    assert foreign.passages(kind, 300, 0) == passages
    assert foreign.passages(kind, 100, 0) == passages[:100]
    assert foreign.passages(kind, 0, 0) == []


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_seeds_share_no_passage(kind):
    seeds = [set(foreign.passages(kind, 1000, seed)) for seed in range(4)]
    assert len(set.union(*seeds)) == 4000


def test_unknown_kind_is_a_key_error():
    with pytest.raises(KeyError, match="poem"):
        foreign.passages("poem", 0, 0)


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_passages_fit_the_context(kind, pretrained):
    encoded = pretrained.tokenizer(foreign.passages(kind, 2000, 0))["input_ids"]
    lengths = np.array([len(ids) for ids in encoded])
    assert np.max(lengths) <= 124
    assert np.mean((lengths >= 70) & (lengths <= 120)) >= 0.95


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_words_are_foreign(kind):
    types = word_types(foreign.passages(kind, 200, 0))
    known = types & word_types(data.pretraining_texts(0, 3000))
    assert len(types) >= 60
    assert len(known) < 0.1 * len(types), known


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_model_expects_foreign_passages_much_less_than_its_own_texts(kind, mean_loss):
    own = mean_loss(list(data.pretraining_texts(1234, 16)))
    assert mean_loss(foreign.passages(kind, 16, 0)) > own + 2.0
