"""Adaptation at inference: a trained adapter is searched further for a prompt or a few examples.

    run = load_run("runs/tiny")
    result = adapt(run, "Review: The soup was cold.")
    print(complete(run, result.offsets, ["Review: The soup was cold."]))

The model's parameters and the trained adapter are never changed; the result is a new adapter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import rollouts
from grpocem_jax.adaptation.adapted import check_room
from grpocem_jax.adaptation.texts import (
    Text,
    batch,
    encode,
    halves,
    together,
    tokenize,
    within_context,
)
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import SearchConfig, check_fits_reward, make_method, section
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.runs import checkpoints
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search import fitness, loop, spaces
from grpocem_jax.search.base import SearchMethod, check_method
from grpocem_jax.utils import memory, user_code
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand

JUDGED_SAMPLES = 8
"""Completions of a prompt that the gate judges by, for each one of a prompt that is adapted to:
single rewards of a few prompts tell little, and the gate judges four points, once."""

ONE_TOKEN = "a single token has no likelihood given what comes before it"
TOO_FEW_TOKENS = "too few tokens for two halves, so the gate cannot judge"
"""Why there was no search, see `Adaptation`."""

LIBRARY = Path(__file__).parents[1] / "builtin" / "experts"
"""The experts of the built-in model."""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The result of adapting to some texts or prompts.

    Attributes:
      offsets: the adapter found; the one adapted from where the gate let nothing pass.
      fitness_before: fitness of the adapter started from, on all that was given; NaN of one token.
      fitness_after: fitness of the result.
      search: the search itself; None where there was too little text for one.
      note: why there was no search; "" where there was one.
    """

    offsets: Offsets
    fitness_before: float
    fitness_after: float
    search: loop.SearchResult | None
    note: str = ""

    @property
    def returned(self) -> str:
        """Which point the result is: "mean", "best" or "start"."""
        return "start" if self.search is None else self.search.returned


def make_space(policy: Policy, start: Offsets, settings: SearchConfig) -> spaces.Space:
    """The search space of the settings around an adapter.

    Raises:
      InputError: an expert library that cannot be used.
    """
    if settings.space == "full":
        return spaces.full_space(start)
    given = settings.experts
    folder = LIBRARY if given == "builtin" else expand(given, "config.search.experts")
    experts, vectors = checkpoints.load_library(
        folder, policy.zero, base_sha256=policy.pretrained.sha256
    )
    with section("search", SearchConfig):
        if settings.space == "subspace":
            return spaces.principal_space(start, vectors, settings.rank)
        return spaces.expert_space(start, list(experts.values()), per_site=settings.per_site)


class _Subject(NamedTuple):
    """What is adapted to, whatever the fitness.

    Attributes:
      fitness: what is maximised.
      data: its data.
      halves: the same in two parts for the gate; None without it, or where they are too few.
      value: the fitness of one adapter on all that was given.
      name: the setting that names the fitness.
      fix: what to do where it is not finite.
      chunk: candidates to score at a time, where the settings do not say.
    """

    fitness: loop.Fitness | loop.HostFitness
    data: Any
    halves: tuple[Any, Any] | None
    value: Callable[[Offsets], float]
    name: str
    fix: str
    chunk: int


def adapt(
    run: TrainedRun,
    examples: str | Text | Sequence[str | Text] | Sequence[rollouts.Item],
    *,
    key: jax.Array | None = None,
    settings: SearchConfig | None = None,
    method: SearchMethod | None = None,
    space: spaces.Space | None = None,
    on_chunk: Callable[[int, loop.History], None] | None = None,
) -> Adaptation:
    """Adapts to one text, or to several that stand for their kind, by the fitness of the settings.

    Texts are adapted to by likelihood or by a fitness of the user's own, prompts of a task by the
    reward of their completions.  The search method may be any; with a reward, one that needs no
    gradient.

    With the gate, the texts or prompts are split into halves, a single text at its middle; each
    half is searched by itself and judged by the other, and where both agree that it helps all of
    them are searched, see `search.cross_fit`. Where the texts are too short for that, they are left
    alone, as is a text of one token, of which nothing can be scored.

    Args:
      run: what to adapt.
      examples: a text, or several; with ``settings.fitness="reward"`` prompts, `rollouts.encode`,
        at least 4 with the gate.
      key: PRNG key; by default from the config's seed.
      settings: other settings than ``run.config.search``.
      method: another search method than the one that the settings name.
      space: the search space, to reuse one; by default `make_space` around the run's adapter.
      on_chunk: as in `search.maximize`.

    Raises:
      InputError: a text that is empty, has nothing to score or is too long; too few prompts, or one
        that leaves no room for a completion; prompts where texts are wanted, or the reverse;
        settings or a search method that cannot be used; a fitness that is not finite for the run's
        adapter (before any search) or the result.
    """
    settings = run.config.search if settings is None else settings
    if not isinstance(settings, SearchConfig):
        raise InputError(
            f"settings={settings!r}: must be a SearchConfig; change the run's own, as in "
            "dataclasses.replace(run.config.search, generations=10)."
        )
    key = jax.random.key(run.config.seed) if key is None else key
    own = method is not None or settings.method not in ("cem", "gradient")
    name = "method" if method is not None else f"config.search.method={settings.method!r}"
    if method is None:
        method = make_method(dataclasses.replace(run.config, search=settings))
    listed = as_list(examples)
    if settings.fitness == "reward":
        check_fits_reward(settings, method)
        subject = _rewarded(run, listed, settings, key)
    else:
        texts = only_texts(listed, settings)
        if is_one_token(run.policy, texts, settings):
            return Adaptation(run.offsets, math.nan, math.nan, None, ONE_TOKEN)
        subject = _written(run, texts, settings, method, key)
    space = space or make_space(run.policy, run.offsets, settings)
    if own:
        check_method(method, space.origin, name=name)
    fix = subject.fix
    before = check_finite(subject.value(run.offsets), subject.name, "to start from", fix)
    search: Callable[..., loop.SearchResult] = loop.maximize
    if settings.gate:
        if subject.halves is None:
            return Adaptation(run.offsets, before, before, None, TOO_FEW_TOKENS)
        search = functools.partial(loop.cross_fit, halves=subject.halves, gate_z=settings.gate_z)
    with section("search", SearchConfig):
        found = search(
            method,
            subject.fitness,
            space,
            subject.data,
            key,
            generations=settings.generations,
            returned=settings.returned,
            population_chunk=settings.population_chunk or subject.chunk,
            fit_memory=settings.fit_memory,
            mesh=run.policy.mesh,
            processes=run.policy.processes,
            budget_s=settings.budget_s,
            on_chunk=on_chunk,
        )
    fix = ungated(fix, settings)
    after = check_finite(subject.value(found.offsets), subject.name, "found", fix)
    return Adaptation(found.offsets, before, after, found)


def as_list(examples: Any) -> Sequence[Any]:
    """What is adapted to as a list, also where it is one text.

    Raises:
      InputError: there is nothing.
    """
    listed = [examples] if isinstance(examples, str | Text) else examples
    if not isinstance(listed, Sequence) or not listed:
        raise InputError("there is nothing to adapt to; give at least one text or prompt.")
    return listed


def only_texts(listed: Sequence[Any], settings: SearchConfig) -> list[str | Text]:
    """What is adapted to by a fitness of texts.

    Raises:
      InputError: prompts of a task, which have a reward.
    """
    texts = [x for x in listed if not isinstance(x, rollouts.Item)]
    if len(texts) < len(listed):
        raise InputError(
            f"config.search.fitness={settings.fitness!r}: prompts of a task have a reward, "
            "texts a likelihood; give texts, or set config.search.fitness='reward'."
        )
    return texts


def is_one_token(policy: Policy, texts: Sequence[str | Text], settings: SearchConfig) -> bool:
    """Whether there is a single token in all, so that nothing can be scored."""
    return len(texts) == 1 and len(tokenize(policy, texts[0], settings)[0]) == 1


def likelihood_fix(policy: Policy) -> str:
    """What to do where a likelihood is not finite."""
    if policy.dtype == "float16":
        return policy.nonfinite_logits("")
    return "give other texts, or another adapter"


def ungated(fix: str, settings: SearchConfig) -> str:
    """What to do where the fitness of what was found is not finite."""
    return fix + ("" if settings.gate else ", or set search.gate=True")


def _written(
    run: TrainedRun,
    texts: Sequence[str | Text],
    settings: SearchConfig,
    method: SearchMethod,
    key: jax.Array,
) -> _Subject:
    """Texts, by likelihood or by a fitness of the user's own."""
    encoded = [encode(run.policy, text, settings) for text in texts]
    settings = within_context(settings, run.policy)
    own = user_code.is_reference(settings.fitness)  # sees each text as a whole
    everything = batch(encoded, settings, prefix=not own)
    score = make_fitness(run.policy, settings, everything)

    def value(offsets: Offsets) -> float:
        with memory.advise("the fitness of one adapter", "give shorter texts or fewer"):
            return float(_value(score, offsets, batch=everything, key=key))

    return _Subject(
        fitness=score,
        data=everything,
        halves=halves(encoded, settings, prefix=not own) if settings.gate else None,
        value=value,
        name=settings.fitness if own else "likelihood",
        fix="return a finite number for it" if own else likelihood_fix(run.policy),
        chunk=fitness.population_chunk(method.population_size, everything),
    )


def _rewarded(
    run: TrainedRun, items: Sequence[Any], settings: SearchConfig, key: jax.Array
) -> _Subject:
    """Prompts of a task, by the reward of their completions."""
    if not all(isinstance(item, rollouts.Item) for item in items):
        raise InputError(
            "config.search.fitness='reward': a text has no reward; give prompts of a task "
            "(grpocem_jax.encode), or set config.search.fitness='likelihood'."
        )
    for item in items:
        check_room(run, len(item.tokens))
    groups = together(
        [item.task.completion(item.example) for item in items],
        [tuple(item.tokens) for item in items],
    )
    if len(groups) < (4 if settings.gate else 1):
        raise InputError(
            f"{len(items)} prompts to adapt to: give at least 1, and with search.gate=True, which "
            f"judges by halves of at least 2, at least 4 that differ; these are {len(groups)}."
        )

    def rewards(num_samples, offsets, items, key):
        return rollouts.population_rewards(
            run.policy,
            offsets,
            items,
            key,
            run.config.generation,
            num_samples=num_samples,
            buckets=settings.buckets,
        )

    dealt = [[items[i] for copies in groups[start::2] for i in copies] for start in (0, 1)]
    # What is compared with the start is paired with it, and looked at more closely.
    closely = functools.partial(rewards, JUDGED_SAMPLES * settings.samples)

    def value(offsets: Offsets) -> float:
        one = jax.tree.map(lambda x: x[None], offsets)
        with memory.advise("the reward of one adapter", "give fewer prompts"):
            found = closely(one, items, key)
        present = found[~np.isnan(found)]
        return float(present.mean()) if len(present) else math.nan

    return _Subject(
        fitness=loop.HostFitness(functools.partial(rewards, settings.samples), closely),
        data=items,
        halves=(dealt[0], dealt[1]) if settings.gate else None,
        value=value,
        name="reward",
        fix="correct the reward function, which abstained each time, or give other examples",
        chunk=0,
    )


def check_finite(value: float, name: str, which: str, fix: str) -> float:
    """A fitness that others can be compared with.

    Raises:
      InputError: it is not finite.
    """
    if not math.isfinite(value):
        raise InputError(
            f"config.search.fitness={name!r} is {value} for the adapter {which}, and there is "
            f"nothing to compare with that; {fix}."
        )
    return value


def make_fitness(
    policy: Policy, settings: SearchConfig, texts: fitness.Texts
) -> fitness.Likelihood | fitness.Own:
    """The fitness that the settings name, for texts.

    Raises:
      InputError: a fitness of the user's own that fails on the texts, or gives no single number.
    """
    if not user_code.is_reference(settings.fitness):
        return fitness.Likelihood(policy.params, policy.model)
    field = "config.search.fitness"
    function = user_code.load_function(settings.fitness, field=field)
    own = fitness.Own(policy.params, policy.model, function)
    try:
        value = jax.eval_shape(own, policy.zero, texts, jax.random.key(0))
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(
            f"{field}={settings.fitness!r} raised {kind} ({message.splitlines()[0]}); it is called "
            "as (model, params, offsets, texts, key) and must be traceable by JAX."
        ) from error
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(
            f"{field}={settings.fitness!r} returned {value}; it must return one float, shape ()."
        )
    return own


@jax.jit
def _value(score, offsets, *, batch, key):
    return score(offsets, batch, key)


def summary(result: Adaptation) -> dict[str, Any]:
    """The result as plain values, with the names of ``adapt.py --json``."""
    found = result.search
    return {
        "fitness_before": None if math.isnan(result.fitness_before) else result.fitness_before,
        "fitness_after": None if math.isnan(result.fitness_after) else result.fitness_after,
        "adapted": result.returned != "start",
        "returned": result.returned,
        "held_back_gain": None
        if found is None or math.isnan(found.held_back_gain)
        else found.held_back_gain,
        "generations": found.generations if found else 0,
        "candidates": found.candidates if found else 0,
        "converged": found.converged if found else False,
        "population_chunk": found.population_chunk if found else 0,
        "seconds": found.seconds if found else 0.0,
        "compile_seconds": found.compile_seconds if found else 0.0,
        "note": result.note,
    }
