"""Texts to adapt to, as arrays: what counts, and what is held back."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import rollouts
from grpocem_jax.config import SearchConfig
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.search import fitness
from grpocem_jax.tasks import Messages
from grpocem_jax.utils.errors import InputError


class Text(NamedTuple):
    """A text to adapt to as the model sees it, chat template and all.

    All of it counts, or only the completion where there is one.
    """

    prompt: str
    completion: str = ""


Encoded: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Tokens of a text, int32 ``[n]``, and which of them count, bool ``[n]``."""


def as_text(policy: Policy, text: str | Messages | Text) -> Text:
    """A prompt as the policy writes it; a `Text` as it is.

    Raises:
      InputError: no prompt, see `grpocem_jax.tasks.PromptFormat`.
    """
    if isinstance(text, Text):
        return text
    if isinstance(text, str) and not text.strip():
        raise InputError("the prompt is empty; give some text.")
    return Text(policy.prompt_format.write(text))


def tokenize(
    policy: Policy, text: str | Messages | Text, settings: SearchConfig
) -> tuple[np.ndarray, int]:
    """Tokens of a text, int32 ``[n]``, and the number of the first that counts."""
    text = as_text(policy, text)
    if not isinstance(text.prompt, str) or not isinstance(text.completion, str):
        raise InputError(f"{text!r} is no text to adapt to or to complete; give strings.")
    if not text.prompt.strip():
        raise InputError("the prompt is empty; give some text.")
    try:
        (text.prompt + text.completion).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not UTF-8 text (character {error.start} is "
            f"{error.object[error.start]!r}); convert it."
        ) from None
    prompt = policy.encode(text.prompt)
    completion = policy.encode_completion(text.completion)
    tokens = np.asarray(prompt + completion, np.int32)
    limit = min(settings.buckets[-1], policy.model.context_length)
    if len(tokens) > limit:
        raise InputError(
            f"a text of {len(tokens)} tokens is longer than the limit of {limit}, the last of "
            f"search.buckets={settings.buckets} (the model's context is "
            f"{policy.model.context}); shorten it, or end search.buckets with {len(tokens)} "
            "or more."
        )
    return tokens, len(prompt) if completion else 1


def check_list(name: str, texts: object) -> None:
    """Refuses a single text where several are wanted, which would be taken for its characters.

    Raises:
      InputError: it is one.
    """
    if isinstance(texts, str | Text):
        raise InputError(f"{name}={texts!r} is one text; give a list of them.")


def encode(policy: Policy, text: str | Messages | Text, settings: SearchConfig) -> Encoded:
    """Tokens of a text, int32 ``[n]``, and which of them count, bool ``[n]``.

    Raises:
      InputError: an empty prompt, a single token (there is nothing to predict), or too many.
    """
    tokens, first = tokenize(policy, text, settings)
    if len(tokens) < 2:
        raise InputError(
            f"the prompt {as_text(policy, text).prompt!r} is one token, which has no likelihood "
            "given what comes before it; give a longer one."
        )
    return tokens, np.arange(len(tokens)) >= first


def batch(
    encoded: Sequence[Encoded], settings: SearchConfig, *, prefix: bool = False
) -> fitness.Texts:
    """Encoded texts as arrays, padded to the bucket of the longest.

    Args:
      encoded: the texts.
      settings: of the search; its buckets are those of what is behind a prefix.
      prefix: whether a prefix of all texts is given as such, see `Texts`.
    """
    start = common_prefix(encoded) if prefix else 0
    return to_arrays(encoded, padded(encoded, settings, start), most_scored(encoded), start)


def halves(
    encoded: Sequence[Encoded], settings: SearchConfig, *, prefix: bool = False
) -> tuple[fitness.Texts, fitness.Texts] | None:
    """As `deal`, padded alike and with the same prefix as all of them in `batch`.

    With copies of a text one half may have fewer; texts of which nothing is scored fill it up.
    """
    parts = deal(encoded)
    if parts is None:
        return None
    for part in parts:
        tokens, scored = part[0]
        part += [(tokens, np.zeros_like(scored))] * (max(map(len, parts)) - len(part))
    start = common_prefix(encoded) if prefix else 0
    length = padded(encoded, settings, start)
    most = max(map(most_scored, parts))
    first, second = (to_arrays(part, length, most, start) for part in parts)
    return first, second


PREFIX_STEP = 4
"""Of its length, as each is a program of its own."""

PREFIX_TEXTS = 8
"""Fewer do not make up for compiling the model a second time, for the prefix."""


def common_prefix(encoded: Sequence[Encoded]) -> int:
    """Tokens that texts begin with alike, and behind which one more is not scored.

    A multiple of `PREFIX_STEP`; 0 where they are less than a quarter of the longest text, or the
    texts fewer than `PREFIX_TEXTS`.
    """
    if len(encoded) < PREFIX_TEXTS:
        return 0
    unscored = min(int(np.argmax(counts)) for _, counts in encoded) - 1
    rows = np.array([tokens[:unscored] for tokens, _ in encoded])
    alike = (rows == rows[0]).all(axis=0)
    start = int(np.argmin(np.append(alike, False))) // PREFIX_STEP * PREFIX_STEP
    return start if 4 * start >= max(len(tokens) for tokens, _ in encoded) else 0


def padded(encoded: Sequence[Encoded], settings: SearchConfig, start: int) -> int:
    """The length that texts with a prefix of ``start`` tokens are padded to."""
    longest = max(len(tokens) for tokens, _ in encoded)
    return min(start + bucket(longest - start, settings), settings.buckets[-1])


def together(answers: Sequence[Hashable], texts: Sequence[Hashable]) -> list[list[int]]:
    """Rows to be dealt: those with equal answers one after another, copies of a text as one."""
    rows: dict[Hashable, dict[Hashable, list[int]]] = {}
    for i, (answer, text) in enumerate(zip(answers, texts, strict=True)):
        rows.setdefault(answer, {}).setdefault(text, []).append(i)
    return [copies for own in rows.values() for copies in own.values()]


def deal(encoded: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]] | None:
    """Splits encoded texts into halves that judge each other.

    The texts are dealt in turn, those with the same completion one after another, so that of each
    label both halves have their share; copies of a text go to the same half, which the other must
    not have been fitted to.  Of an odd number the last goes to both, scored in its first half in
    one, and in its second in the other.

    Returns:
      the two; None where either would have fewer than 2 scored tokens.
    """
    groups = together(
        [tokens[scored].tobytes() for tokens, scored in encoded],
        [(tokens.tobytes(), scored.tobytes()) for tokens, scored in encoded],
    )
    even = len(groups) // 2 * 2
    first = [encoded[i] for copies in groups[0:even:2] for i in copies]
    second = [encoded[i] for copies in groups[1:even:2] for i in copies]
    for tokens, scored in (encoded[i] for copies in groups[even:] for i in copies):
        places = np.flatnonzero(scored)
        middle = len(places) // 2
        for part, own in ((first, places[:middle]), (second, places[middle:])):
            part.append((tokens, np.isin(np.arange(len(tokens)), own)))
    if min(count_scored(part) for part in (first, second)) < 2:
        return None
    return first, second


def count_scored(encoded: Sequence[Encoded]) -> int:
    """Tokens of encoded texts that are scored: what counts, but for the first of a text."""
    return sum(int(counts[1:].sum()) for _, counts in encoded)


def most_scored(encoded: Sequence[Encoded]) -> int:
    """The most tokens that are scored of one of some encoded texts."""
    return max(count_scored([text]) for text in encoded)


def within_context(settings: SearchConfig, policy: Policy) -> SearchConfig:
    """The settings with the model's context in place of the buckets beyond it."""
    limit = policy.model.context_length
    return dataclasses.replace(
        settings, buckets=tuple(sorted({min(length, limit) for length in settings.buckets}))
    )


def bucket(length: int, settings: SearchConfig) -> int:
    """The length that a text of ``length`` tokens is padded to."""
    return rollouts.bucket_length(length, settings.buckets)


def to_arrays(encoded: Sequence[Encoded], length: int, most: int, start: int = 0) -> fitness.Texts:
    """Encoded texts as arrays of ``length`` tokens, of which no text has more than ``most`` scored.

    States that predict are as many as that, or somewhat more: all behind a prefix of ``start``
    tokens, or what is left of them by halving, so that the programs for texts of one length are
    few.
    """
    tokens = np.zeros((len(encoded), length), np.int32)
    mask = np.zeros((len(encoded), length), bool)
    scored = np.zeros((len(encoded), length), bool)
    for row, (own, counts) in enumerate(encoded):
        tokens[row, : len(own)] = own
        mask[row, : len(own)] = True
        scored[row, : len(own)] = counts
    everywhere = states = length - 1 - start
    while (states + 1) // 2 >= most and states > 1:
        states = (states + 1) // 2
    places = None
    if states < everywhere:
        places = start + fitness.predicting(scored[:, start:], states)
    prefix = tokens[0, :start] if start else None
    return jax.tree.map(jnp.asarray, fitness.Texts(tokens, mask, scored, places, prefix))
