"""A vote over random perturbations: those that do best on some prompts answer, the majority counts.

In the manner of RandOpt (2026, github.com/sunrainyg/RandOpt): no search, a single population.
Ours: offsets of an adapter are perturbed instead of all weights, so that all answer in one batch.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import rollouts
from grpocem_jax.adaptation.adapted import check_room
from grpocem_jax.adaptation.texts import Text, check_list, tokenize
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search.cem import CEM
from grpocem_jax.tasks import Messages
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import whole
from grpocem_jax.utils.statistics import mean_of_present


def best_perturbations(
    run: TrainedRun,
    items: Sequence[rollouts.Item],
    key: jax.Array,
    *,
    population_size: int = 100,
    noise_std: float = 0.1,
    keep: int = 5,
    samples: int = 1,
) -> Offsets:
    """Adapters around the run's own: of some random ones those with the largest mean reward.

    All of them complete all prompts in one program, which the device has to hold.

    Args:
      run: what to perturb.
      items: prompts of a task, `rollouts.encode`, at least one.
      key: PRNG key; consumed.
      population_size: how many are drawn, at least 2.
      noise_std: standard deviation of the perturbations, above 0.
      keep: how many are kept, at most ``population_size``.
      samples: completions of each prompt by each.

    Returns:
      offsets with a leading axis ``keep``, the best first; one whose reward abstained each time
      comes last.

    Raises:
      InputError: a value outside its range, no prompts or ones that are too long, no reward at
        all, or what reward functions do wrong.
    """
    keep, samples = whole("keep", keep), whole("samples", samples)
    if keep > population_size:
        raise InputError(f"keep={keep}: must be at most population_size={population_size}.")
    if not items:
        raise InputError("items: there are none to choose by; give at least one prompt.")
    draw_key, reward_key = jax.random.split(key)
    method = CEM(population_size=population_size, noise_std=noise_std, elite_ratio=1.0)
    drawn = method.ask(draw_key, method.init(run.offsets))
    rewards = rollouts.population_rewards(
        run.policy,
        drawn,
        items,
        reward_key,
        run.config.generation,
        num_samples=samples,
        buckets=run.config.search.buckets,
    )
    means = mean_of_present(rewards)
    if np.isnan(means).all():
        raise InputError(
            "items: no perturbation got a reward: all completions were abstained on, or had logits "
            "that are not finite; give other prompts, or lower noise_std."
        )
    # NaN, where all abstain, comes last.
    chosen = np.argsort(-means, kind="stable")[:keep]
    return jax.tree.map(lambda x: x[chosen], drawn)


class Vote(NamedTuple):
    """What a vote decided.

    Attributes:
      text: the completion.
      adapter: number of the first adapter that gave that answer.
      votes: how many gave it.
    """

    text: str
    adapter: int
    votes: int


def vote(
    run: TrainedRun,
    adapters: Offsets,
    prompts: Sequence[str | Messages | Text],
    *,
    answer: Callable[[str], str] = str.strip,
) -> list[Vote]:
    """The answer to each prompt that most adapters give, each completing it greedily.

    Args:
      run: the model and its settings.
      adapters: offsets with a leading axis ``K``, all of which answer a prompt in one batch.
      prompts: the prompts.
      answer: what of a completion is compared, by default all of it but the white space around.

    Returns:
      for each prompt the most frequent answer; of answers that are equally frequent, that of the
      first adapter.

    Raises:
      InputError: as `grpocem_jax.adaptation.complete`.
    """
    check_list("prompts", prompts)
    count = len(jax.tree.leaves(adapters)[0])
    encoded = [tokenize(run.policy, prompt, run.config.search)[0] for prompt in prompts]
    for tokens in encoded:
        check_room(run, len(tokens))
    found = []
    for tokens in encoded:
        out = rollouts.complete(
            run.policy,
            adapters,
            [tokens] * count,
            jnp.stack([jax.random.key(0)] * count),
            run.config.generation,
            num_samples=1,
            temperature=run.config.generation.temperature,
            buckets=run.config.search.buckets,
            greedy=True,
            own_adapters=True,
            require_finite=True,
        )
        answers = [answer(group[0]) for group in out.texts]
        winner, votes = collections.Counter(answers).most_common(1)[0]
        first = answers.index(winner)
        found.append(Vote(out.texts[first][0], first, votes))
    return found
