"""What a run's model does with an adapter: completions and likelihoods of texts."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from grpocem_jax import rollouts
from grpocem_jax.adaptation.texts import (
    Text,
    batch,
    check_list,
    encode,
    tokenize,
    within_context,
)
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search import fitness
from grpocem_jax.tasks import Messages
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError


def complete(
    run: TrainedRun, offsets: Offsets, prompts: Sequence[str | Messages | Text]
) -> list[str]:
    """Greedy completions of prompts, each in a program of its bucket's length.

    With ``data.chat`` a string is a message of the user; a list of messages is a chat in any case.

    Raises:
      InputError: a prompt that is empty, or too long to be completed; a single one; logits that
        are not finite.
    """
    check_list("prompts", prompts)
    encoded = []
    for prompt in prompts:
        tokens, _ = tokenize(run.policy, prompt, run.config.search)
        check_room(run, len(tokens))
        encoded.append(tokens)
    texts = []
    for tokens in encoded:
        out = rollouts.complete(
            run.policy,
            offsets,
            [tokens],
            jax.random.split(jax.random.key(0), 1),
            run.config.generation,
            num_samples=1,
            temperature=run.config.generation.temperature,
            buckets=run.config.search.buckets,
            greedy=True,
            require_finite=True,
            shared=("texts",),
        )
        texts.append(out.texts[0][0])
    return texts


def room(run: TrainedRun) -> int:
    """Tokens of the longest prompt that leaves room for ``generation.max_new_tokens``."""
    new, context = run.config.generation.max_new_tokens, run.policy.model.context_length
    return min(context - new, run.config.search.buckets[-1])


def check_room(run: TrainedRun, length: int) -> None:
    """Refuses a prompt of ``length`` tokens that is too long to be completed.

    Raises:
      InputError: it leaves no room for ``generation.max_new_tokens``, or is beyond
        ``search.buckets``.
    """
    if length > room(run):
        raise InputError(
            f"a prompt has {length} tokens, but search.buckets={run.config.search.buckets} and "
            f"generation.max_new_tokens={run.config.generation.max_new_tokens} of a context of "
            f"{run.policy.model.context} allow {room(run)}; shorten it."
        )


def count_tokens(run: TrainedRun, prompt: str | Messages | Text) -> int:
    """Tokens of a prompt.

    Raises:
      InputError: it is empty, not UTF-8 text, or longer than the last of ``search.buckets``.
    """
    return len(tokenize(run.policy, prompt, run.config.search)[0])


def log_likelihoods(
    run: TrainedRun, offsets: Offsets, texts: Sequence[Text], *, own_adapters: bool = False
) -> np.ndarray:
    """Mean log-likelihood per scored token of each text, nats, float32 ``[n]``.

    Args:
      run: the run.
      offsets: the trained arrays; with ``own_adapters`` one for each text, a leading axis ``n``.
      texts: the texts.
      own_adapters: whether each text has an adapter of its own.

    Raises:
      InputError: no text, a single one, one that cannot be used, or logits that are not finite.
    """
    check_list("texts", texts)
    if not texts:
        raise InputError("there are no texts to judge; give at least one.")
    settings = run.config.search
    encoded = [encode(run.policy, text, settings) for text in texts]
    settings = within_context(settings, run.policy)
    everything = batch(encoded, settings, prefix=not own_adapters)
    score = fitness.Likelihood(run.policy.params, run.policy.model)
    values = []
    for start in range(0, len(texts), 16):
        # The last batch repeats its last text: one compiled shape.
        rows = np.minimum(np.arange(start, start + 16), len(texts) - 1)
        part = jax.tree.map(lambda x, rows=rows: x[rows], everything._replace(prefix=None))
        part = devices.divide(run.policy.mesh, part)._replace(prefix=everything.prefix)
        own = jax.tree.map(lambda x, rows=rows: x[rows], offsets) if own_adapters else offsets
        values.append(np.asarray(_values(score, own, part, own_adapters=own_adapters)))
    found = np.concatenate(values)[: len(texts)]
    if not np.isfinite(found).all():
        fix = "give other texts, or another adapter"
        raise InputError(f"a likelihood is not finite: {run.policy.nonfinite_logits(fix)}.")
    return found


@functools.partial(jax.jit, static_argnames="own_adapters")
def _values(score, offsets, texts, *, own_adapters):
    if own_adapters:
        logps, scored = jax.vmap(score.of_text)(offsets, texts)
    else:
        flat = score.scores(offsets, texts, jax.random.key(0))
        logps, scored = (x.reshape(len(texts.tokens), -1) for x in flat)
    return logps.sum(axis=1) / scored.sum(axis=1)
