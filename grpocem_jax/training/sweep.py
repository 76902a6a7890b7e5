"""Many runs in one program: adapters are small, so runs are a batch axis over one frozen model.

The runs of a sweep differ in seed, learning rate and tasks.  They go in step: the prompts of all
are completed in one decode loop, each with its run's adapter, and all adapters are updated in one
program.  Each is what it would be by itself but for rounding, and has a run directory of its own
that every command takes.
"""

import contextlib
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from grpocem_jax import adapters, grpo, rollouts
from grpocem_jax.config import Config, parse_config, with_defaults
from grpocem_jax.rollouts.policy import Policy, load_policy
from grpocem_jax.runs import checkpoints, metrics, rundir
from grpocem_jax.runs.screens import setting
from grpocem_jax.training import evaluation, results
from grpocem_jax.training import step as steps
from grpocem_jax.training.algorithm import Algorithm, make_algorithm
from grpocem_jax.training.data import Data, check_length, load_data
from grpocem_jax.training.run import LastStep
from grpocem_jax.training.update import MEMORY_FIRST, repeat
from grpocem_jax.utils import memory
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_file, read_object, writing
from grpocem_jax.utils.progress import Progress
from grpocem_jax.utils.terminal import say

READ: dict[str, Callable[[str], Any]] = {
    "seed": int,
    "train.learning_rate": float,
    "data.tasks": lambda names: tuple(names.split("+")),
}
"""What runs of a sweep may differ in, and how their values are read."""
MOST = 32
"""Runs of a sweep."""


class Member(NamedTuple):
    """A run of a sweep.

    Attributes:
      name: what it differs in, and its folder.
      settings: its config.
      config: that config, parsed.
      data: its prompts.
      workdir: its run directory.
      key: PRNG key of its training.
      eval_key: of its evaluation.
    """

    name: str
    settings: ml_collections.ConfigDict
    config: Config
    data: Data
    workdir: Path
    key: jax.Array
    eval_key: jax.Array


def parse(text: str) -> dict[str, list[Any]]:
    """What runs differ in: ``seed=0,1 train.learning_rate=0.01,0.02 data.tasks=qa,sentiment+qa``.

    Fields stand apart by spaces, values by commas, and tasks of one run by a plus.

    Raises:
      InputError: another field, a value that is none, or one twice.
    """
    grid: dict[str, list[Any]] = {}
    for part in text.split():
        field, equals, values = part.partition("=")
        if field not in READ or field in grid or not equals:
            raise InputError(
                f"--sweep={text!r}: {part!r} is not one of {', '.join(READ)}, each once, with "
                "values behind an equals sign; as in --sweep 'seed=0,1 train.learning_rate=1e-2'."
            )
        try:
            grid[field] = [READ[field](value) for value in values.split(",")]
        except ValueError:
            raise InputError(
                f"--sweep={text!r}: {part!r} has a value that is no number; separate numbers by "
                "commas."
            ) from None
        if len(set(grid[field])) < len(grid[field]):
            raise InputError(f"--sweep={text!r}: {part!r} has a value twice; give each once.")
    count = int(np.prod([len(values) for values in grid.values()]))
    if not 2 <= count <= MOST:
        raise InputError(f"--sweep={text!r}: makes {count} runs; give 2 to {MOST}.")
    return grid


def sweep(
    settings: ml_collections.ConfigDict, grid: Mapping[str, Sequence[Any]], workdir: str | Path
) -> dict[str, dict[str, Any]]:
    """Trains a run for each combination of some settings, all in one program.

    An interrupted sweep goes on from its last checkpoint, and so does a complete one where
    ``train.max_steps`` or ``train.epochs`` are larger than before.  A run whose updates are skipped
    because they are not finite goes on beside the others, whatever ``train.max_skipped_updates``
    says; the table and its summary count them.

    Args:
      settings: a config, of which all runs are made.
      grid: values by the names of `READ`, see `parse`.
      workdir: the folder of the run directories.

    Returns:
      each run's summary.json by the run's name.

    Raises:
      InputError: settings, model, data or folder that cannot be used, for some run; runs of other
        lengths; what differs with the seed and cannot.
      Interrupted: SIGTERM or SIGINT came; the sweep was saved.
    """
    started = time.perf_counter()
    workdir = expand(workdir, "--workdir")
    named = _settings(settings, grid)
    configs = {name: parse_config(own) for name, own in named.items()}
    first, *others = configs.values()
    for field, given, leave in (
        ("train.evaluate_every_steps", first.train.evaluate_every_steps, 0),
        ("train.fit_memory", first.train.fit_memory, False),
        ("train.staleness", first.train.staleness, 0),
        ("model.weight_shards", first.model.weight_shards, 1),
        ("logging.report_to", first.logging.report_to, ()),
    ):
        if given != leave:
            raise InputError(f"--sweep: {field}={given!r} is for single runs; set it to {leave}.")
    ended = _summaries(workdir, named)
    if _complete(ended, configs):
        say(f"the sweep in {workdir} is complete")
        return ended
    digest = _check_folder(workdir, named)
    policy = load_policy(first)
    check_length(first, policy)
    if any(config.seed != first.seed for config in others):
        _check_seeds(first, policy)
    members = [
        Member(name, named[name], config, load_data(config, policy), workdir / name, *_keys(config))
        for name, config in configs.items()
    ]
    lengths = {steps.total_steps(member.config, len(member.data.train)) for member in members}
    if 0 in lengths:
        raise InputError(
            f"--sweep: a step takes {first.prompts_drawn_per_step} training prompts, and a run has "
            f"{min(len(member.data.train) for member in members)}; give more data or a smaller "
            "step."
        )
    if len(lengths) > 1:
        raise InputError(
            f"--sweep: its runs have {', '.join(map(str, sorted(lengths)))} steps, and go in step; "
            "set train.max_steps so that all have the same."
        )
    total = max(lengths)
    _check_trained(workdir, ended, total, first)
    rates = {config.train.learning_rate: config for config in configs.values()}
    made = {rate: make_algorithm(config, total_steps=total) for rate, config in rates.items()}
    algorithm = made[first.train.learning_rate]
    optimizers = tuple(made[config.train.learning_rate].optimizer for config in configs.values())
    with (
        writing(f"--workdir={workdir}", "make room; the same command continues the sweep"),
        rundir.Signals() as signals,
        rundir.lock(workdir),
        contextlib.ExitStack() as claims,
    ):
        for member in members:
            identity = {"model": policy.pretrained.sha256, "data": member.data.sha256}
            if first.model.dtype == "auto":
                identity["model.dtype"] = policy.dtype
            claims.enter_context(
                rundir.claim(member.workdir, with_defaults(member.settings).to_dict(), identity)
            )
        course = _Course(policy, algorithm, optimizers, members, total, workdir, digest, signals)
        sources = dict.fromkeys(line for member in members for line in member.data.lines)
        say("\n".join([*setting(first, policy), *(f"data      {line}" for line in sources)]))
        say(f"sweep     {len(members)} runs of {course.total} steps in {workdir}")
        if course.first_step:
            say(f"resumed   after step {course.first_step}")
        for difference in course.differences:
            say(f"differs   {difference}")
        clock, began = CompileClock.start(), time.perf_counter()
        states = course.train()
        trained = time.perf_counter() - began
        judged = _judge(policy, members, states.offsets)
        clock.stop()
        summaries = {}
        for i, (member, heldout) in enumerate(zip(members, judged, strict=True)):
            offsets = jax.tree.map(lambda x, i=i: x[i], states.offsets)
            summary = results.summarize(
                member.config,
                policy,
                offsets,
                member.data.train,
                member.data.bad_lines,
                heldout,
                {
                    "steps": course.total,
                    "adapter": "last",
                    "best_adapter": None,
                    "resumed_after_step": course.first_step,
                    "skipped_updates": course.skipped[i],
                    "continued": course.differences,
                    "micro_batch": member.config.train.batch_size,
                    "sweep": len(members),
                    # Of all runs together.
                    "seconds": time.perf_counter() - started,
                    "train_seconds": trained,
                    "compile_seconds": clock.seconds,
                },
            )
            results.write(member.workdir, member.config, policy, offsets, None, heldout, summary)
            summaries[member.name] = summary
        return summaries


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The held-out reward of each run over its tasks, sampled and greedy, one run a line.

    A run all of whose held-out rewards abstained has none.
    """
    wide = max(map(len, summaries))
    lines = [f"{'':<{wide}}  held-out reward, sampled          greedy"]
    for name, summary in summaries.items():
        parts = []
        for kind in ("heldout", "heldout_greedy"):
            gain, said = summary[kind].get("overall"), "no held-out reward"
            if gain is not None:
                low, high = gain["gain_ci95"]
                said = f"{gain['after']:6.3f}  {gain['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"
            parts.append(f"{said:<31}")
        if summary["skipped_updates"]:
            parts.append(f"{summary['skipped_updates']} updates skipped as not finite")
        lines.append(f"{name:<{wide}}  {'  '.join(parts)}".rstrip())
    return "\n".join(lines)


def _settings(
    settings: ml_collections.ConfigDict, grid: Mapping[str, Sequence[Any]]
) -> dict[str, ml_collections.ConfigDict]:
    """The config of each run by its name."""
    named = {}
    for values in itertools.product(*grid.values()):
        own = ml_collections.ConfigDict(settings.to_dict())
        parts = []
        for field, value in zip(grid, values, strict=True):
            own.update_from_flattened_dict({field: value})
            text = "+".join(value) if isinstance(value, tuple) else str(value)
            parts.append(f"{field.rpartition('.')[2]}={text}")
        named[",".join(parts)] = own
    return named


def _check_folder(workdir: Path, named: Mapping[str, ml_collections.ConfigDict]) -> str:
    """The hash of the sweep's settings; refuses a folder that another sweep or run is in."""
    if is_file(workdir / "config.json"):
        raise InputError(f"--workdir={workdir}: holds a single run; give another folder.")
    trained = {
        name: rundir.trained_settings(with_defaults(settings).to_dict())
        for name, settings in named.items()
    }
    digest, last = checkpoints.config_hash(trained), checkpoints.last_position(workdir)
    if last is not None and last.get("digest") != digest:
        raise InputError(
            f"--workdir={workdir}: holds the checkpoints of another sweep; give another folder."
        )
    return digest


def _summaries(
    workdir: Path, named: Mapping[str, ml_collections.ConfigDict]
) -> dict[str, dict[str, Any]]:
    """The summaries of those runs of these settings that have ended, by name."""
    for name, settings in named.items():
        rundir.check_settings(workdir / name, with_defaults(settings).to_dict())
    paths = {name: workdir / name / "summary.json" for name in named}
    return {
        name: read_object(path, fix="delete it") for name, path in paths.items() if is_file(path)
    }


def _complete(ended: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Config]) -> bool:
    """Whether all runs have ended and none is to have more steps, or fewer, than it has."""
    return ended.keys() == configs.keys() and all(
        summary["steps"]
        == steps.total_steps(configs[name], sum(own["train"] for own in summary["data"].values()))
        for name, summary in ended.items()
    )


def _check_trained(
    workdir: Path, ended: Mapping[str, Mapping[str, Any]], total: int, config: Config
) -> None:
    """Refuses a length that is below what was trained, or above it with nothing to go on from."""
    done = checkpoints.last_step(workdir)
    trained = max([done, *(summary["steps"] for summary in ended.values())])
    if total < trained:
        raise InputError(
            f"--workdir={workdir}: the sweep there has done {trained} steps, but "
            f"train.max_steps={config.train.max_steps} and train.epochs={config.train.epochs} give "
            f"{total}; give as many or more, or another folder."
        )
    if total > trained > done:
        raise InputError(
            f"--workdir={workdir}: the sweep there ended after {trained} steps, but its checkpoint "
            "of that step is not there to go on from; give another folder."
        )


def _keys(config: Config) -> tuple[jax.Array, jax.Array]:
    key, eval_key = jax.random.split(jax.random.key(config.seed))
    return key, eval_key


def _check_seeds(config: Config, policy: Policy) -> None:
    """Refuses seeds where the frozen model is another with each."""
    if policy.pretrained.kind == "random":
        raise InputError(
            f"--sweep: model.source={config.model.source!r} has other weights with each seed; "
            "sweep something else, or a model with weights."
        )
    kernel = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    one, two = (policy.adapter.factor(jax.random.key(seed), kernel) for seed in (0, 1))
    if not all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(two))):
        raise InputError(
            f"--sweep: adapter.type={config.adapter.type!r} has other frozen arrays with each "
            "seed; sweep something else, or another adapter."
        )


class _Course:
    """The training of all runs, from the last checkpoint on."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        optimizers: tuple[optax.GradientTransformation, ...],
        members: Sequence[Member],
        total: int,
        workdir: Path,
        digest: str,
        signals: rundir.Signals,
    ):
        self.policy, self.algorithm, self.members = policy, algorithm, members
        self.config, self.total, self.digest = members[0].config, total, digest
        self.signals = signals
        self.optimizers = optimizers
        self.steps_per_epoch = [
            len(member.data.train) // member.config.prompts_drawn_per_step for member in members
        ]
        started = [
            grpo.init_state(
                adapters.init_adapter(
                    policy.adapter, jax.random.key(member.config.seed), policy.params, policy.sites
                ),
                optimizer,
            )
            for member, optimizer in zip(members, optimizers, strict=True)
        ]
        self.states = jax.tree.map(lambda *x: jnp.stack(x), *started)
        self.checkpoints = checkpoints.Checkpoints(workdir, keep=self.config.train.keep_checkpoints)
        found, damaged = self.checkpoints.restore_latest(self._saved(self.states))
        for sentence in damaged:
            say(f"passed over: {sentence}", sys.stderr)
        position: dict[str, Any] = {}
        if found is not None:
            # Orbax binds arrays to a device, and programs would be compiled again for those.
            saved, position = jax.device_get(found[0]), found[2]
            step = jnp.full(len(members), saved.step, jnp.int32)
            self.states = jax.tree.map(jnp.asarray, saved._replace(step=step))
        self.first_step = int(self.states.step[0])
        zeros = [0] * len(members)
        planned = position.get("total_steps", total)
        self.differences: list[str] = list(position.get("differences", []))
        if planned != total:
            self.differences += steps.differences(self.config, planned, total, self.first_step)
        self.tokens = list(position.get("num_tokens", zeros))
        self.skipped = list(position.get("skipped", zeros))
        sizes = position.get("metrics_bytes", zeros)
        shown = position.get("completions_bytes", zeros)
        if self.first_step < total:
            shown = position.get("completions_bytes_but_of_the_end", shown)
        self.shown_before = shown
        self.metrics = [
            metrics.JsonLines(member.workdir / "metrics.jsonl", size)
            for member, size in zip(members, sizes, strict=True)
        ]
        self.completions = [
            metrics.JsonLines(member.workdir / "completions.jsonl", size)
            for member, size in zip(members, shown, strict=True)
        ]

    @staticmethod
    def _saved(states: grpo.TrainState) -> grpo.TrainState:
        """The states as a checkpoint has them: the step is one number."""
        return states._replace(step=states.step[0])

    def train(self) -> grpo.TrainState:
        """Runs the steps that are left and returns the last states.

        Raises:
          Interrupted: a signal came; the step under way and its checkpoint were finished.
          InputError: whatever a reward function raises.  Whatever ends it, the last step that was
            completed has a checkpoint first.
        """
        every = self.config.train.checkpoint_every_steps
        epochs = self.config.train.save_interval * min(self.steps_per_epoch)
        minutes = self.config.train.checkpoint_every_minutes or math.inf
        states, position = self.states, self.position(self.first_step)
        progress, self.signals.at_once = Progress(self.total), False
        with contextlib.ExitStack() as stack:
            # All of them, also where one fails because the disk is full.
            logs = (*self.metrics, *self.completions)
            closes = [log.close for log in logs]
            for close in (self.checkpoints.close, *closes, progress.close):
                stack.callback(close)
            stack.callback(setattr, self.signals, "at_once", True)

            def save() -> None:
                for log in logs:
                    log.sync()
                self.checkpoints.save(self._saved(states), jax.random.key(0), position)

            last = stack.enter_context(
                LastStep(
                    save,
                    self.checkpoints.wait,
                    done=self.first_step,
                    total=self.total,
                    what="sweep",
                )
            )
            for step in range(self.first_step, self.total):
                new, rewards = self.step(states, step)
                place = self.position(step + 1)
                # At once, for what a signal may break off: a checkpoint has all of them.
                states, last.completed, position = new, step + 1, place
                progress.update(step + 1, reward=" ".join(f"{reward:.2f}" for reward in rewards))
                due = step + 1 == self.total or (step + 1) % epochs == 0
                due = due or bool(every and (step + 1) % every == 0)
                late = time.monotonic() - last.saved_at >= 60 * minutes
                if self.signals.received or due or late:
                    last.save()
                if self.signals.received:
                    break
        if self.signals.received:
            say(
                f"stopped after step {last.completed} of {self.total}; the same command continues "
                "the sweep",
                sys.stderr,
            )
            raise rundir.Interrupted(128 + self.signals.received)
        return states

    def position(self, done: int) -> dict[str, Any]:
        """Where the sweep stands, for the checkpoint after ``done`` steps."""
        shown = [log.size for log in self.completions]
        at_the_end_only = steps.shown_at_the_end_only(self.config, done - 1, self.total)
        return {
            "digest": self.digest,
            "total_steps": self.total,
            "differences": self.differences,
            "num_tokens": list(self.tokens),
            "skipped": list(self.skipped),
            "metrics_bytes": [log.size for log in self.metrics],
            "completions_bytes": shown,
            # Without what was shown because it was the end, which a longer sweep does not show.
            "completions_bytes_but_of_the_end": self.shown_before if at_the_end_only else shown,
        }

    def step(self, states: grpo.TrainState, step: int) -> tuple[grpo.TrainState, list[float]]:
        """One step of all runs; their states after it and the mean reward of each."""
        began = time.perf_counter()
        config, policy, draw = self.config, self.policy, self.policy.adapter.draw
        items = [steps.prompts(member.config, member.data.train, step) for member in self.members]
        count = len(items[0])
        keys = [steps.keys(member.key, step, count) for member in self.members]
        draw_keys = jnp.stack([own.draw for own in keys])
        offsets = states.offsets
        if draw is not None:
            offsets = jax.vmap(draw)(draw_keys, offsets)
        temperature = steps.temperature(config, step, self.total)
        advice = "give fewer runs, or lower train.accumulation_steps"
        with memory.advise("a step's rollouts", advice):
            out = rollouts.complete(
                policy,
                jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), offsets),
                [item.tokens for own in items for item in own],
                jnp.concatenate([own.prompts for own in keys]),
                config.generation,
                num_samples=config.grpo.group_size,
                temperature=temperature,
                buckets=(*config.generation.prompt_buckets, config.data.max_prompt_tokens),
                own_adapters=True,
            )
            out = steps.with_likelihoods(config, policy, list(itertools.chain(*items)), out, step)
        prepared = [
            steps.prepare(
                member.config,
                policy,
                self.algorithm,
                own,
                out.take(np.arange(i * count, (i + 1) * count)),
                own_keys.weights,
            )
            for i, (member, own, own_keys) in enumerate(zip(self.members, items, keys, strict=True))
        ]
        batches = jax.tree.map(lambda *x: jnp.stack(x), *(one.batch for one in prepared))

        def once(states: grpo.TrainState) -> tuple[grpo.TrainState, dict[str, jax.Array]]:
            return _update(
                states,
                policy.params,
                batches,
                temperature,
                draw_keys,
                model=policy.model,
                objective=self.algorithm.objective,
                optimizers=self.optimizers,
                beta=config.grpo.beta,
                entropy=config.grpo.entropy,
                micro_batch=config.train.batch_size,
                draw=draw,
            )

        with memory.advise("a step's update", "give fewer runs, or lower train.batch_size"):
            new, updates = repeat(once, states, config.grpo.updates)
            new = jax.block_until_ready(new)
        updates = jax.device_get(updates)
        seconds = time.perf_counter() - began
        self.shown_before = [log.size for log in self.completions]
        for i, own in enumerate(prepared):
            self.tokens[i] += own.tokens
            self.skipped[i] += int(updates["skipped"][i])
            record = {
                "step": step + 1,
                "epoch": (step + 1) / self.steps_per_epoch[i],
                **{name: float(values[i]) for name, values in updates.items()},
                **own.metrics,
                "temperature": temperature,
                "num_tokens": self.tokens[i],
                "step_time": seconds,
            }
            self.metrics[i].write({n: x if np.isfinite(x) else None for n, x in record.items()})
            if steps.shown(config, step, self.total):
                for line in steps.records(own, step + 1):
                    self.completions[i].write(line)
        return new, [own.metrics["reward"] for own in prepared]


@functools.partial(
    jax.jit,
    static_argnames=(
        "optimizers",
        *(name for name in grpo.STATIC if name not in ("loss", "optimizer")),
    ),
    compiler_options=MEMORY_FIRST,
)
def _update(
    states: grpo.TrainState,
    params: Any,
    batches: grpo.Batch,
    temperature: float,
    draw_keys: jax.Array,
    *,
    optimizers: tuple[optax.GradientTransformation, ...],
    beta: float,
    **options: Any,
) -> tuple[grpo.TrainState, dict[str, jax.Array]]:
    """`grpo.update` of each run, by its own optimizer."""

    def gradient(
        offsets: adapters.Offsets, batch: grpo.Batch, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        own = {**options, "beta": beta, "key": None if options["draw"] is None else key}
        return grpo.gradients(offsets, params, batch, temperature, **own)

    # A few runs fill a processor, and more at once only crowd its caches.
    size = 1 if jax.default_backend() == "cpu" else len(optimizers)
    runs = (states.offsets, batches, draw_keys)
    grads, metrics = jax.lax.map(lambda run: gradient(*run), runs, batch_size=size)
    parts: list[Any] = []
    order: list[int] = []
    for optimizer in dict.fromkeys(optimizers):
        rows = np.flatnonzero([each == optimizer for each in optimizers])
        own = jax.tree.map(lambda x, rows=rows: x[rows], (states, grads, metrics))
        parts.append(jax.vmap(functools.partial(grpo.apply, optimizer=optimizer, beta=beta))(*own))
        order.extend(rows.tolist())
    back = np.argsort(order)
    return jax.tree.map(lambda *x: jnp.concatenate(x)[back], *parts)


def _judge(
    policy: Policy, members: Sequence[Member], offsets: adapters.Offsets
) -> list[results.Heldout]:
    """Held-out prompts of each run before and after; the base model once for equal prompts."""
    say("held-out reward before training", sys.stderr)
    before: dict[str, evaluation.Judged] = {}
    for member in members:
        given = json.dumps([member.config.seed, member.config.data.tasks])
        if given not in before:
            before[given] = evaluation.judge(
                policy, policy.zero, member.data.heldout, member.eval_key, member.config
            )
    say("held-out reward after training", sys.stderr)
    counts = [len(member.data.heldout) for member in members]
    keys = jnp.concatenate(
        [
            evaluation.prompt_keys(member.eval_key, count)
            for member, count in zip(members, counts, strict=True)
        ]
    )
    after = evaluation.judge(
        policy,
        jax.tree.map(lambda x: jnp.repeat(x, np.array(counts), axis=0), offsets),
        [item for member in members for item in member.data.heldout],
        keys,
        members[0].config,
        own_adapters=True,
    )
    ends = np.cumsum(counts)
    return [
        results.Heldout(
            member.data.heldout,
            before[json.dumps([member.config.seed, member.config.data.tasks])],
            evaluation.Judged(
                after.rewards[end - count : end],
                after.texts[end - count : end],
                after.greedy_rewards[end - count : end],
                after.greedy_texts[end - count : end],
            ),
        )
        for member, count, end in zip(members, counts, ends, strict=True)
    ]
