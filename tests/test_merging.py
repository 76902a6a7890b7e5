"""Adapters merged without training, by hand-computed numbers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adapters
from grpocem_jax.utils.errors import InputError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
MERGES = {
    "combine": adapters.combine,
    "project": adapters.project,
    "compete": functools.partial(adapters.compete, keep=1.0),
}


def of(*numbers):
    """Offsets of two sites."""
    return {"h.0": jnp.array(numbers[:2]), "h.1": {"b": jnp.array(numbers[2:])}}


def flat(offsets):
    return np.concatenate([offsets["h.0"], offsets["h.1"]["b"]])


@pytest.mark.parametrize("name", MERGES)
def test_one_adapter_is_merged_to_itself(name):
    close(flat(MERGES[name]([of(1.0, -2.0, 0.5)])), [1.0, -2.0, 0.5])


def test_task_vectors_are_added_and_taken_away():
    first, second = of(1.0, 2.0, 3.0), of(1.0, 0.0, -1.0)
    close(flat(adapters.combine([first, second])), [1, 1, 1])
    close(flat(adapters.combine([first, second], [1.0, -1.0])), [0, 2, 4])


def test_what_points_apart_is_projected_away():
    # The second against the first: its component along it, -1, is taken off, and the other way.
    first, second = of(1.0, 0.0, 0.0), of(-1.0, 1.0, 0.0)
    close(flat(adapters.project([first, second])), [0.5 + 0.0, 0.5 + 1.0, 0])
    # Where they agree it is the sum.
    close(flat(adapters.project([first, of(1.0, 1.0, 0.0)])), [2, 1, 0])
    close(flat(adapters.project([first, of(0.0, 0.0, 0.0)])), [1, 0, 0])


def test_numbers_compete_by_their_own_and_their_common_importance():
    d = np.array([[2.0, -1.0, 0.5], [1.0, 1.0, 0.0]])

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    intra = softmax(2 * np.array([[1, 0.25, 0.0625], [1, 1, 0]]))
    inter = softmax(np.array([[1 + 1, 0.25 - 0.5, 0.0625 + 0], [1 + 1, -0.5 + 1, 0]]))
    b = intra * inter
    merged = adapters.compete([of(*d[0]), of(*d[1])], keep=1.0, scale=2.0)
    close(flat(merged), 2 * (b * d).sum(0) / b.sum(0))
    # With a third kept, the largest of each, which is the first of both.
    assert (b.argmax(-1) == 0).all()
    merged = adapters.compete([of(*d[0]), of(*d[1])], keep=1 / 3)
    close(flat(merged), [(b[:, 0] * d[:, 0]).sum() / b[:, 0].sum(), 0, 0])


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (lambda: adapters.combine([]), "offsets: there are none to merge"),
        (lambda: adapters.combine(of(1.0, 2.0, 3.0)), "^offsets: is dict, not a list of those of"),
        (lambda: adapters.combine([of(1.0, 2.0, 3.0)], [1.0, 2.0]), "there are 2 for 1 adapters"),
        (
            lambda: adapters.project([of(1.0, 2.0, 3.0), of(1.0, 2.0, 3.0, 4.0)]),
            "number 1 has other sites or shapes than the first",
        ),
        (lambda: adapters.compete([of(1.0, 2.0, 3.0)], keep=0.0), "keep=0.0: must be above 0"),
        (lambda: adapters.compete([of(1.0, 2.0, 3.0)], scale=0.0), "scale=0.0: must be above 0"),
    ],
)
def test_what_cannot_be_merged_is_named(merge, said):
    with pytest.raises(InputError, match=said):
        merge()
