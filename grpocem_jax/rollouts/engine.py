"""The rollout engine: prompts to completions, on the device and on the host.

`complete` is the one way from prompts to completions: a step of training, an evaluation, the
completion of a prompt and a population of candidates differ in its arguments alone.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import GenerationConfig
from grpocem_jax.models import sampling
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.rollouts.prompts import Prompts, bucket_length, pad
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError

SHARED = ("tokens", "logps", "entropies", "texts")
"""What of completions one process may have from others; their lengths it has in any case."""


class Completions(NamedTuple):
    """Completions of ``P`` prompts, ``G`` samples each, at most ``N`` tokens.

    Attributes:
      prompts: the padded prompts.
      rollouts: the completions on the device, with log-probabilities and entropies.
      tokens: int32 ``[P, G, N]``, as in ``rollouts`` but on the host.
      mask: bool ``[P, G, N]``, the same.
      finite: bool ``[P, G]``, whether all log-probabilities of a completion are finite. Where they
        are not, the logits were not either, and the tokens mean nothing.
      cut: bool ``[P, G]``, whether a completion ended because it has ``N`` tokens.
      texts: the decoded completions, ``[P][G]``.
      base_logps: log-probabilities of each completion's ``n`` tokens under the base model at
        temperature 1, its end token's included, ``[P][G]`` of float32 ``[n]``; None unless a reward
        function asks for them, see `rollouts.with_base_logps`.
    """

    prompts: Prompts
    rollouts: sampling.Rollouts
    tokens: np.ndarray
    mask: np.ndarray
    finite: np.ndarray
    cut: np.ndarray
    texts: list[list[str]]
    base_logps: list[list[np.ndarray]] | None = None

    def take(self, rows: np.ndarray) -> "Completions":
        """Those of some prompts; ``rows`` is int ``[P']``."""
        arrays = jax.tree.map(lambda x: x[rows], self._replace(texts=[], base_logps=None))
        logps = self.base_logps
        return arrays._replace(
            texts=[self.texts[i] for i in rows],
            base_logps=None if logps is None else [logps[i] for i in rows],
        )


def complete(
    policy: Policy,
    offsets: Offsets,
    prompts: Sequence[np.ndarray],
    keys: jax.Array,
    generation: GenerationConfig,
    *,
    num_samples: int,
    temperature: float,
    buckets: Sequence[int],
    greedy: bool = False,
    own_adapters: bool = False,
    require_finite: bool = False,
    shared: Collection[str] = SHARED,
) -> Completions:
    """Completes a batch of prompts.

    The completions of a prompt depend on its tokens, its key and its adapter alone, not on the
    other prompts or the bucket, nor on the process that makes them: each completes its share, and
    all of them have the masks and what else is ``shared``.

    Args:
      policy: the policy.
      offsets: its offsets; with ``own_adapters`` one for each prompt, a leading axis ``P``.
      prompts: tokens of ``P`` prompts, int32 ``[S]`` each, at least one.
      keys: PRNG keys ``[P]``; consumed.
      generation: sampling settings; its temperatures are not read.
      num_samples: ``G``, completions of each prompt.
      temperature: above 0.
      buckets: lengths to pad the prompts to. The smallest that holds the longest prompt is taken,
        at most the model's context; where none does, the prompts are padded to the longest.
      greedy: the last sample of each prompt takes the most probable tokens, the others are drawn.
      own_adapters: whether each prompt has an adapter of its own.
      require_finite: whether completions are of use only if all their logits are finite.
      shared: which of `SHARED` a process gets of the completions that others make; the rest is
        zero there, and the texts empty.

    Raises:
      InputError: a prompt that leaves no room for ``generation.max_new_tokens``; with
        ``require_finite``, logits that are not finite; a setting out of range.
    """
    context = policy.model.context_length
    longest = max(len(tokens) for tokens in prompts)
    if longest + generation.max_new_tokens > context:
        raise InputError(
            f"a prompt of {longest} tokens and generation.max_new_tokens="
            f"{generation.max_new_tokens} are longer together than the model's context of "
            f"{policy.model.context}; shorten it, or lower generation.max_new_tokens."
        )
    padded = pad(prompts, bucket_length(longest, [min(bucket, context) for bucket in buckets]))

    def of_rows(rows: np.ndarray) -> dict[str, Any]:
        def own(tree: Any) -> Any:
            return tree if len(rows) == len(prompts) else jax.tree.map(lambda x: x[rows], tree)

        out = generate(
            policy,
            own(offsets) if own_adapters else offsets,
            own(padded),
            own(keys),
            generation,
            num_samples=num_samples,
            temperature=temperature,
            greedy=greedy,
            own_adapters=own_adapters,
        )
        tokens, mask, logps = jax.device_get((out.tokens, out.mask, out.logps))
        cut = mask[..., -1] & ~np.isin(tokens[..., -1], np.asarray(policy.end_ids))
        cut[cut] = ~policy.stopped(tokens[cut])
        return {
            **out._asdict(),
            "lengths": mask.sum(-1, dtype=np.int32),
            "finite": np.isfinite(logps).all(-1),
            "cut": cut,
            "texts": decode(policy, tokens, mask),
        }

    kept = {"mask", *SHARED}.difference(shared)
    found = policy.processes.divided(len(prompts), of_rows, kept)
    lengths, finite, cut = (found.pop(name) for name in ("lengths", "finite", "cut"))
    texts = [group or [""] * num_samples for group in found.pop("texts")]
    if policy.processes.count > 1:  # the mask of a completion is its length
        found["mask"] = np.arange(found["tokens"].shape[-1]) < lengths[..., None]
    out = sampling.Rollouts(**found)
    tokens, mask = jax.device_get((out.tokens, out.mask))
    if require_finite and not finite.all():
        count = f"in {np.sum(~finite)} of {finite.size} completions "
        raise InputError(
            f"{count}{policy.nonfinite_logits('use another adapter, or other prompts')}."
        )
    return Completions(padded, out, tokens, mask, finite, cut, texts)


def generate(
    policy: Policy,
    offsets: Offsets,
    prompts: Prompts,
    keys: jax.Array,
    generation: GenerationConfig,
    *,
    num_samples: int,
    temperature: float,
    greedy: bool = False,
    own_adapters: bool = False,
) -> sampling.Rollouts:
    """`sampling.sample` with the settings of a config, prompts divided among the devices."""
    tokens, mask, keys = devices.divide(policy.mesh, (*prompts, keys))
    if own_adapters:
        offsets = devices.divide(policy.mesh, offsets)
    return sampling.sample(
        policy.params,
        offsets,
        tokens,
        mask,
        keys,
        policy.end_ids,
        temperature,
        model=policy.model,
        num_samples=num_samples,
        max_new_tokens=generation.max_new_tokens,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        greedy=greedy,
        own_adapters=own_adapters,
        stop_table=policy.stop_table,
    )


def decode(policy: Policy, tokens: np.ndarray, mask: np.ndarray) -> list[list[str]]:
    """Texts ``[P][G]`` of completions ``[P, G, N]``, without what ended them.

    That is an end token, or a stop string and what follows it in the token that completes it.
    """
    end_ids = np.asarray(policy.end_ids)
    groups = []
    for group_tokens, group_mask in zip(tokens, mask, strict=True):
        ids = [row[keep] for row, keep in zip(group_tokens, group_mask, strict=True)]
        ids = [row[:-1] if len(row) and row[-1] in end_ids else row for row in ids]
        groups.append(policy.decode_completions(ids))
    return groups
