"""Adaptation at inference: a trained adapter is searched further for a prompt or a few examples.

    run = load_run("runs/tiny")
    result = adapt(run, "Review: The soup was cold.")
    print(complete(run, result.adapter, ["Review: The soup was cold."]))

The model's parameters and the trained adapter are never changed; the result is a new adapter.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from grpocem_jax import checkpoints, devices, memory, rollouts, user_code
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import CEMConfig, Config, check_fits_reward, parse_config, section
from grpocem_jax.config_files import load_config
from grpocem_jax.errors import InputError
from grpocem_jax.files import expand, is_file, read_object
from grpocem_jax.policy import Policy, load_policy
from grpocem_jax.search import fitness, loop, spaces
from grpocem_jax.search.base import check_method

HELD_BACK_SAMPLES = 8
"""Completions of a held-back prompt for each one of a prompt that is adapted to: single rewards of
a few prompts tell little, and the gate judges three points at a time, not a population."""

LIBRARY = Path(__file__).parent / "builtin" / "experts"
"""The experts of the built-in model."""


class TrainedRun(NamedTuple):
    """What `grpocem_jax.train` left behind: settings, policy and trained adapter."""

    config: Config
    policy: Policy
    adapter: Offsets


class Text(NamedTuple):
    """A text to adapt to: all of it counts, or only the completion where there is one."""

    prompt: str
    completion: str = ""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The result of adapting to some texts or prompts.

    Attributes:
      adapter: the adapter found; the one adapted from where the gate let nothing pass.
      fitness_before: fitness of the adapter started from, on all that was given; NaN of one token.
      fitness_after: fitness of the result.
      search: the search itself; None where there was too little text for one.
      note: why there was no search; "" where there was one.
    """

    adapter: Offsets
    fitness_before: float
    fitness_after: float
    search: loop.SearchResult | None
    note: str = ""

    @property
    def returned(self) -> str:
        """Which point the result is: "mean", "best" or "start"."""
        return "start" if self.search is None else self.search.returned


def load_run(
    workdir: str | Path,
    settings: ml_collections.ConfigDict | None = None,
    *,
    adapter: str | Path | None = None,
    model: str | None = None,
) -> TrainedRun:
    """Loads a trained run.

    Args:
      workdir: a run directory.
      settings: other settings than the run's own.
      adapter: the folder of another adapter of the same model and settings than the one that the
        run ended with, ``workdir/adapter``: what ``grpocem-adapt --save`` wrote, or
        ``workdir/best_adapter``, that of the checkpoint that did best on validation prompts
        (``train.evaluate_every_steps``).
      model: where the base model lies now, in place of ``model.source`` of the settings; its
        weights must be those that the adapter was trained on.

    Both paths are relative to the current directory, as those of `load_adapter` and ``--save``.

    Raises:
      InputError: no run there, no base model at its place, no trained adapter in it, or one of
        another model or shape.
    """
    workdir = expand(workdir, "--workdir")
    folder = workdir / "adapter" if adapter is None else expand(adapter, "adapter")
    if not is_file(folder / "adapter_model.safetensors"):
        if adapter is None:
            raise InputError(
                f"--workdir={workdir}: holds no trained adapter in adapter/; train one with "
                f"grpocem-train --config CONFIG --workdir {workdir}."
            )
        inside = workdir / folder
        there = is_file(inside / "adapter_model.safetensors")
        hint = f"give {str(inside)!r}" if there else "correct it"
        raise InputError(
            f"adapter={str(folder)!r}: there is no adapter; the path is relative to the current "
            f"directory, so {hint}."
        )
    if settings is None:
        settings = load_config(str(workdir / "config.json"))
    config = parse_config(settings)
    if model is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, source=model))
    try:
        policy = load_policy(
            config.model,
            config.adapter,
            stop=config.generation.stop,
            keep_special_tokens=config.generation.keep_special_tokens,
            seed=config.seed,
            mesh=devices.make_mesh(jax.devices()),
        )
    except InputError as error:
        if model is not None or not str(error).startswith("model.source="):
            raise
        raise InputError(
            f"{str(error).rstrip('.')}; where the run's base model lies elsewhere now, give its "
            "place with --model."
        ) from error
    return TrainedRun(config, policy, load_fitting_adapter(config, policy, folder))


def load_fitting_adapter(config: Config, policy: Policy, folder: Path) -> Offsets:
    """An adapter made with the config's settings: equal shapes do not mean that it fits.

    Raises:
      InputError: as `checkpoints.load_adapter`; an adapter made with other settings.
    """
    offsets = checkpoints.load_adapter(folder, policy.zero, base_sha256=policy.pretrained.sha256)
    path = folder / "adapter_config.json"
    stored = read_object(path, fix="train the adapter again")
    wanted = json.loads(json.dumps(policy.adapter_config(config.adapter)))
    for name in wanted.keys() - {"base_model"}:
        if stored.get(name) != wanted[name]:
            raise InputError(
                f"{path}: {name}={stored.get(name)!r}, but config.adapter has {wanted[name]!r}; "
                "give the settings, or the run, that the adapter was made with."
            )
    return offsets


def make_space(policy: Policy, start: Offsets, settings: CEMConfig) -> spaces.Space:
    """The search space of the settings around an adapter.

    Raises:
      InputError: an expert library that cannot be used.
    """
    if settings.space == "full":
        return spaces.full_space(start)
    given = settings.experts
    folder = LIBRARY if given == "builtin" else expand(given, "config.cem.experts")
    experts, vectors = checkpoints.load_library(
        folder, policy.zero, base_sha256=policy.pretrained.sha256
    )
    with section("cem", CEMConfig):
        if settings.space == "subspace":
            return spaces.principal_space(start, vectors, settings.rank)
        return spaces.expert_space(start, list(experts.values()), per_site=settings.per_site)


class _Subject(NamedTuple):
    """What is adapted to, whatever the fitness.

    Attributes:
      fitness: what is maximised.
      fitted: its data.
      held_back: data for the gate, None without one.
      value: the fitness of one adapter on all that was given.
      name: the setting that names the fitness.
      fix: what to do where it is not finite.
      chunk: candidates to score at a time, where the settings do not say.
    """

    fitness: loop.Fitness | loop.HostFitness
    fitted: Any
    held_back: Any
    value: Callable[[Offsets], float]
    name: str
    fix: str
    chunk: int


def adapt(
    run: TrainedRun,
    examples: str | Text | Sequence[str | Text] | Sequence[rollouts.Item],
    *,
    key: jax.Array | None = None,
    settings: CEMConfig | None = None,
    space: spaces.Space | None = None,
    on_chunk: Callable[[int, loop.History], None] | None = None,
) -> Adaptation:
    """Adapts to one text, or to several that stand for their kind, by the fitness of the settings.

    Texts are adapted to by likelihood or by a fitness of the user's own, prompts of a task by the
    reward of their completions.  The search method may be any; with a reward, one that needs no
    gradient.

    With the gate, one text is adapted to in its first part and judged on its last; of several texts
    or prompts, some are held back, at least 2 prompts: the gain on a single one has no standard
    error, and what helped it by chance would pass. Where the texts are too short for that, they are
    left alone, as is a text of one token, of which nothing can be scored.

    Args:
      run: what to adapt.
      examples: a text, or several; with ``settings.fitness="reward"`` prompts, `rollouts.encode`,
        at least 3 with the gate.
      key: PRNG key; by default from the config's seed.
      settings: other settings than ``run.config.cem``.
      space: the search space, to reuse one; by default `make_space` around the run's adapter.
      on_chunk: as in `search.search`.

    Raises:
      InputError: a text that is empty, has nothing to score or is too long; too few prompts, or one
        that leaves no room for a completion; prompts where texts are wanted, or the reverse;
        settings or a search method that cannot be used; a fitness that is not finite for the run's
        adapter (before any search) or the result.
    """
    settings = settings or run.config.cem
    key = jax.random.key(run.config.seed) if key is None else key
    method = settings.search_method
    listed = [examples] if isinstance(examples, str | Text) else examples
    if not isinstance(listed, Sequence) or not listed:
        raise InputError("there is nothing to adapt to; give at least one text or prompt.")
    if settings.fitness == "reward":
        check_fits_reward(settings, method)
        subject = _rewarded(run, listed, settings, key)
    else:
        texts = [x for x in listed if not isinstance(x, rollouts.Item)]
        if len(texts) < len(listed):
            raise InputError(
                f"config.cem.fitness={settings.fitness!r}: prompts of a task have a reward, texts "
                "a likelihood; give texts, or set config.cem.fitness='reward'."
            )
        if len(texts) == 1 and len(_encode(run.policy, _as_text(texts[0]), settings)[0]) == 1:
            note = "a single token has no likelihood given what comes before it"
            return Adaptation(run.adapter, math.nan, math.nan, None, note)
        subject = _written(run, texts, settings, key)
    space = space or make_space(run.policy, run.adapter, settings)
    if settings.method not in ("cem", "gradient"):
        check_method(method, space.origin, name=f"config.cem.method={settings.method!r}")
    fix = subject.fix
    before = _finite(subject.value(run.adapter), subject.name, "to start from", fix)
    if settings.gate and subject.held_back is None:
        note = "too few tokens to hold a part back, so the gate cannot judge"
        return Adaptation(run.adapter, before, before, None, note)
    with section("cem", CEMConfig):
        found = loop.search(
            method,
            subject.fitness,
            space,
            subject.fitted,
            key,
            generations=settings.generations,
            held_back=subject.held_back,
            gate_z=settings.gate_z,
            returned=settings.returned,
            population_chunk=settings.population_chunk or subject.chunk,
            fit_memory=settings.fit_memory,
            mesh=run.policy.mesh,
            budget_s=settings.budget_s,
            on_chunk=on_chunk,
        )
    fix += "" if settings.gate else ", or set cem.gate=True"
    after = _finite(subject.value(found.adapter), subject.name, "found", fix)
    return Adaptation(found.adapter, before, after, found)


def _written(
    run: TrainedRun, texts: Sequence[str | Text], settings: CEMConfig, key: jax.Array
) -> _Subject:
    """Texts, by likelihood or by a fitness of the user's own."""
    encoded = [encode(run.policy, text, settings) for text in texts]
    settings = _within_context(settings, run.policy)
    everything = batch(encoded, settings)
    score = make_fitness(run.policy, settings, everything)

    def value(adapter: Offsets) -> float:
        with memory.advise("the fitness of one adapter", "give shorter texts or fewer"):
            return float(_value(score, adapter, batch=everything, key=key))

    own = user_code.is_reference(settings.fitness)
    fix = "give other texts, or another adapter"
    if own:
        fix = "return a finite number for it"
    elif run.policy.dtype == "float16":
        fix = run.policy.nonfinite_logits("")
    parts = hold_back(encoded, settings) if settings.gate else None
    fitted, held_back = parts or (everything, None)
    return _Subject(
        fitness=score,
        fitted=fitted,
        held_back=held_back,
        value=value,
        name=settings.fitness if own else "likelihood",
        fix=fix,
        chunk=fitness.population_chunk(settings.search_method.population_size, fitted),
    )


def _rewarded(
    run: TrainedRun, items: Sequence[Any], settings: CEMConfig, key: jax.Array
) -> _Subject:
    """Prompts of a task, by the reward of their completions."""
    if not all(isinstance(item, rollouts.Item) for item in items):
        raise InputError(
            "config.cem.fitness='reward': a text has no reward; give prompts of a task "
            "(grpocem_jax.encode), or set config.cem.fitness='likelihood'."
        )
    if len(items) < (3 if settings.gate else 1):
        raise InputError(
            f"{len(items)} prompts to adapt to: give at least 1, and with cem.gate=True, which "
            "holds back at least 2, at least 3."
        )
    for item in items:
        check_room(run, len(item.tokens))
    held = num_held_back(len(items), settings.held_back, least=2) if settings.gate else 0

    def rewards(num_samples, adapters, items, key):
        return rollouts.population_rewards(
            run.policy,
            adapters,
            items,
            key,
            run.config.generation,
            num_samples=num_samples,
            buckets=settings.buckets,
        )

    # What is compared with the start is paired with it, and looked at more closely.
    closely = functools.partial(rewards, HELD_BACK_SAMPLES * settings.samples)

    def value(adapter: Offsets) -> float:
        one = jax.tree.map(lambda x: x[None], adapter)
        with memory.advise("the reward of one adapter", "give fewer prompts"):
            found = closely(one, items, key)
        present = found[~np.isnan(found)]
        return float(present.mean()) if len(present) else math.nan

    return _Subject(
        fitness=loop.HostFitness(functools.partial(rewards, settings.samples), closely),
        fitted=items[held:],
        held_back=items[:held] if held else None,
        value=value,
        name="reward",
        fix="correct the reward function, which abstained each time, or give other examples",
        chunk=0,
    )


def _finite(value: float, name: str, which: str, fix: str) -> float:
    """A fitness that others can be compared with.

    Raises:
      InputError: it is not finite.
    """
    if not math.isfinite(value):
        raise InputError(
            f"config.cem.fitness={name!r} is {value} for the adapter {which}, and there is nothing "
            f"to compare with that; {fix}."
        )
    return value


def make_fitness(
    policy: Policy, settings: CEMConfig, texts: fitness.Texts
) -> fitness.Likelihood | fitness.Own:
    """The fitness that the settings name, for texts.

    Raises:
      InputError: a fitness of the user's own that fails on the texts, or gives no single number.
    """
    if not user_code.is_reference(settings.fitness):
        return fitness.Likelihood(policy.params, policy.model)
    field = "config.cem.fitness"
    function = user_code.load_function(settings.fitness, field=field)
    own = fitness.Own(policy.params, policy.model, function)
    try:
        value = jax.eval_shape(own, policy.zero, texts, jax.random.key(0))
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(
            f"{field}={settings.fitness!r} raised {kind} ({message.splitlines()[0]}); it is called "
            "as (model, params, adapter, texts, key) and must be traceable by JAX."
        ) from error
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(
            f"{field}={settings.fitness!r} returned {value}; it must return one float, shape ()."
        )
    return own


def complete(run: TrainedRun, adapter: Offsets, prompts: Sequence[str]) -> list[str]:
    """Greedy completions of prompts, each in a program of its bucket's length.

    Raises:
      InputError: a prompt that is empty, or too long to be completed; a single string; logits
        that are not finite.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts={prompts!r} is one string; give a list of prompts.")
    settings = _within_context(run.config.cem, run.policy)
    texts = []
    for prompt in prompts:
        tokens, _ = _encode(run.policy, Text(prompt), run.config.cem)
        check_room(run, len(tokens))
        padded = rollouts.pad([tokens], _bucket(len(tokens), settings))
        out = rollouts.generate(
            run.policy,
            adapter,
            padded,
            jax.random.split(jax.random.key(0), 1),
            run.config.generation,
            num_samples=1,
            temperature=run.config.generation.temperature,
            greedy=True,
        )
        drawn = rollouts.fetch_finite(run.policy, out)
        texts.append(rollouts.decode(run.policy, drawn.tokens, drawn.mask)[0][0])
    return texts


def room(run: TrainedRun) -> int:
    """Tokens of the longest prompt that leaves room for ``generation.max_new_tokens``."""
    new, context = run.config.generation.max_new_tokens, run.policy.model.context_length
    return min(context - new, run.config.cem.buckets[-1])


def check_room(run: TrainedRun, length: int) -> None:
    """Refuses a prompt of ``length`` tokens that is too long to be completed.

    Raises:
      InputError: it leaves no room for ``generation.max_new_tokens``, or is beyond ``cem.buckets``.
    """
    if length > room(run):
        raise InputError(
            f"a prompt has {length} tokens, but cem.buckets={run.config.cem.buckets} and "
            f"generation.max_new_tokens={run.config.generation.max_new_tokens} of a context of "
            f"{run.policy.model.context} allow {room(run)}; shorten it."
        )


def count_tokens(run: TrainedRun, prompt: str) -> int:
    """Tokens of a prompt.

    Raises:
      InputError: it is empty, not UTF-8 text, or longer than the last of ``cem.buckets``.
    """
    return len(_encode(run.policy, Text(prompt), run.config.cem)[0])


def log_likelihoods(
    run: TrainedRun, adapters: Offsets, texts: Sequence[Text], *, own_adapters: bool = False
) -> np.ndarray:
    """Mean log-likelihood per scored token of each text, nats, float32 ``[n]``.

    Args:
      run: the run.
      adapters: offsets; with ``own_adapters`` one for each text, a leading axis ``n``.
      texts: the texts.
      own_adapters: whether each text has an adapter of its own.

    Raises:
      InputError: a text that cannot be used, or logits that are not finite.
    """
    settings = run.config.cem
    encoded = [encode(run.policy, text, settings) for text in texts]
    settings = _within_context(settings, run.policy)
    length = max(_bucket(len(tokens), settings) for tokens, _ in encoded)
    arrays = [_arrays([(tokens, scored)], length) for tokens, scored in encoded]
    score = fitness.Likelihood(run.policy.params, run.policy.model)
    values = []
    for start in range(0, len(texts), 16):
        # The last batch repeats its last text: one compiled shape.
        rows = np.minimum(np.arange(start, start + 16), len(texts) - 1)
        part = jax.tree.map(lambda *x: jnp.stack(x), *(arrays[i] for i in rows))
        part = devices.divide(run.policy.mesh, part)
        own = jax.tree.map(lambda x, rows=rows: x[rows], adapters) if own_adapters else adapters
        values.append(np.asarray(_values(score, own, part, own_adapters=own_adapters)))
    found = np.concatenate(values)[: len(texts)]
    if not np.isfinite(found).all():
        fix = "give other texts, or another adapter"
        raise InputError(f"a likelihood is not finite: {run.policy.nonfinite_logits(fix)}.")
    return found


@jax.jit
def _value(score, adapter, *, batch, key):
    return score(adapter, batch, key)


@functools.partial(jax.jit, static_argnames="own_adapters")
def _values(score, adapters, batches, *, own_adapters):
    key = jax.random.key(0)
    axes = (0 if own_adapters else None, 0)
    return jax.vmap(lambda adapter, batch: score(adapter, batch, key), axes)(adapters, batches)


def _as_text(text: str | Text) -> Text:
    return text if isinstance(text, Text) else Text(text)


def _encode(policy: Policy, text: Text, settings: CEMConfig) -> tuple[np.ndarray, int]:
    """Tokens of a text, int32 ``[n]``, and the number of the first that counts."""
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
            f"cem.buckets={settings.buckets} (the model's context is "
            f"{policy.model.context}); shorten it, or end cem.buckets with {len(tokens)} "
            "or more."
        )
    return tokens, len(prompt) if completion else 1


def encode(policy: Policy, text: str | Text, settings: CEMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a text, int32 ``[n]``, and which of them count, bool ``[n]``.

    Raises:
      InputError: an empty prompt, a single token (there is nothing to predict), or too many.
    """
    text = _as_text(text)
    tokens, first = _encode(policy, text, settings)
    if len(tokens) < 2:
        raise InputError(
            f"the prompt {text.prompt!r} is one token, which has no likelihood given what comes "
            "before it; give a longer one."
        )
    return tokens, np.arange(len(tokens)) >= first


def batch(encoded: Sequence[tuple[np.ndarray, np.ndarray]], settings: CEMConfig) -> fitness.Texts:
    """Encoded texts as arrays, padded to the bucket of the longest."""
    length = max(_bucket(len(tokens), settings) for tokens, _ in encoded)
    return _arrays(encoded, length)


def num_held_back(count: int, share: float, *, least: int = 1) -> int:
    """How many of ``count`` texts or prompts are held back: a share, ``least``, but never all.

    It is always the first ones.
    """
    return min(max(least, round(share * count)), count - 1)


def hold_back(
    encoded: Sequence[tuple[np.ndarray, np.ndarray]], settings: CEMConfig
) -> tuple[fitness.Texts, fitness.Texts] | None:
    """Splits texts into what is fitted and what the gate judges by.

    Of one text the last part of its scored tokens is held back; of several, the first texts.

    Returns:
      the two, padded alike; None where either would have fewer than 2 scored tokens.
    """
    length = max(_bucket(len(tokens), settings) for tokens, _ in encoded)
    if len(encoded) > 1:
        count = num_held_back(len(encoded), settings.held_back)
        fitted, held = encoded[count:], encoded[:count]
        parts = [_arrays(part, length) for part in (fitted, held)]
    else:
        ((tokens, scored),) = encoded
        places = np.flatnonzero(scored)
        count = math.ceil(settings.held_back * len(places))
        last = np.isin(np.arange(len(tokens)), places[len(places) - count :])
        cut = places[len(places) - count] if count else len(tokens)
        parts = [
            _arrays([(tokens[:cut], scored[:cut])], length),
            _arrays([(tokens, last)], length),
        ]
    if min(int(part.scored[:, 1:].sum()) for part in parts) < 2:
        return None
    return parts[0], parts[1]


def _within_context(settings: CEMConfig, policy: Policy) -> CEMConfig:
    """The settings with the model's context in place of the buckets beyond it."""
    limit = policy.model.context_length
    return dataclasses.replace(
        settings, buckets=tuple(sorted({min(length, limit) for length in settings.buckets}))
    )


def _bucket(length: int, settings: CEMConfig) -> int:
    return rollouts.bucket_length(length, settings.buckets, settings.buckets[-1])


def _arrays(encoded: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> fitness.Texts:
    tokens = np.zeros((len(encoded), length), np.int32)
    mask = np.zeros((len(encoded), length), bool)
    scored = np.zeros((len(encoded), length), bool)
    for row, (own, counts) in enumerate(encoded):
        tokens[row, : len(own)] = own
        mask[row, : len(own)] = True
        scored[row, : len(own)] = counts
    return fitness.Texts(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(scored))


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
