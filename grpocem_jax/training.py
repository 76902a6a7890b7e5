"""Training: the course of a run from its config to its summary."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from grpocem_jax import (
    checkpoints,
    devices,
    evaluation,
    grpo,
    memory,
    metrics,
    report,
    results,
    rollouts,
    rundir,
    sampling,
    screens,
    step_metrics,
    trackers,
)
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.clock import CompileClock
from grpocem_jax.config import Config, parse_config
from grpocem_jax.data import Data, load_data
from grpocem_jax.errors import InputError
from grpocem_jax.files import is_file, read_object, writing
from grpocem_jax.policy import Policy, load_policy
from grpocem_jax.terminal import say


def train(settings: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains an adapter and measures what it did to held-out reward.

    A run directory that holds a run of the same settings continues it from its last checkpoint; the
    result is bit for bit that of a run that was never interrupted.

    Args:
      settings: a config, such as those in configs/.
      workdir: the run directory.

    Returns:
      the contents of summary.json.

    Raises:
      InputError: settings, model, data or run directory that cannot be used; before compilation.
      Interrupted: SIGTERM or SIGINT came; the run was saved.
    """
    started = time.perf_counter()
    config, workdir = parse_config(settings), Path(workdir)
    for name in config.data.tasks:
        config.task(name)  # the user's own rewards are imported before a model is loaded
    complete = None
    if rundir.check_settings(workdir, settings.to_dict()):
        complete = _complete_summary(workdir)
    trackers.check(config.logging)
    policy = load_policy(
        config.model,
        config.adapter,
        stop=config.generation.stop,
        seed=config.seed,
        mesh=devices.sharing(config.train.batch_size // config.grpo.group_size),
    )
    _check_length(config, policy)
    data = load_data(config, policy)
    train_items = data.train
    if len(train_items) < config.prompts_per_step:
        raise InputError(
            f"{len(train_items)} training prompts in all, but a step takes "
            f"{config.prompts_per_step} (train.batch_size * train.accumulation_steps / "
            "grpo.group_size); give more data or a smaller step."
        )
    identity = {"model": policy.pretrained.sha256, "data": data.sha256}
    if complete is not None:
        rundir.check_identity(workdir, identity)
        page = workdir / "report" / "index.html"
        if not is_file(page):  # the run was cut off before it was drawn
            page = report.write(workdir)
        say(f"the run in {workdir} is complete; its page is {page}")
        return complete
    with (
        writing(f"--workdir={workdir}", "make room; the same command continues the run"),
        rundir.claim(workdir, settings.to_dict(), identity) as claimed,
        rundir.Signals() as signals,
    ):
        config_hash = checkpoints.config_hash(rundir.trained_settings(settings.to_dict()))
        key, eval_key = jax.random.split(jax.random.key(config.seed))
        run = Run(config, policy, train_items, key, workdir, config_hash, signals)
        run.validation_items = data.validation
        # The numbers before it are those of the held-out prompts.
        run.validation_key = jax.random.fold_in(eval_key, len(data.heldout))
        run.logs = trackers.start(
            config.logging,
            workdir,
            settings.to_dict(),
            run_id=claimed["id"],
            first_step=run.first_step + 1,
        )
        first = screens.first(config, policy, data.lines, workdir, [x.where for x in run.logs])
        say(first)
        if run.first_step:
            say(f"resumed   after step {run.first_step}")
        return _finish(run, data, eval_key, started)


def _finish(run: "Run", data: Data, eval_key: jax.Array, started: float) -> dict[str, Any]:
    """Trains what is left to train, judges, and writes what a run leaves behind."""
    config, policy, workdir = run.config, run.policy, run.workdir
    clock = CompileClock.start()
    train_started = time.perf_counter()
    state = run.train()
    train_seconds = time.perf_counter() - train_started
    heldout = results.judge(policy, state.adapter, data.heldout, eval_key, config)
    best = run.best_adapter()
    clock.stop()
    summary = results.summarize(
        config,
        policy,
        state.adapter,
        run.items,
        data.bad_lines,
        heldout,
        {
            "steps": int(state.step),
            "adapter": "last",
            "best_adapter": None if best is None else run.best,
            "resumed_after_step": run.first_step,
            "skipped_updates": run.skipped,
            "micro_batch": run.micro_batch.size,
            "seconds": time.perf_counter() - started,
            "train_seconds": train_seconds,
            "compile_seconds": clock.seconds,
        },
    )
    results.write(workdir, config, policy, state.adapter, best, heldout, summary)
    sampled, greedy = heldout.gains(config.data.tasks)
    named = {
        "eval/reward" if name == "overall" else f"eval/rewards/{name}/mean": gain.after
        for name, gain in sampled.items()
    }
    for log in run.logs:
        log.log(named, int(state.step))
        log.close()
    say(screens.closing(sampled, greedy, summary, config, workdir))
    say(f"report    {report.write(workdir)}")
    return summary


def _complete_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that is complete; None of one that is not."""
    path = workdir / "summary.json"
    if not is_file(path) or not is_file(workdir / "adapter" / "adapter_model.safetensors"):
        return None
    return read_object(path, fix="delete it to have it made again")


def _check_length(config: Config, policy: Policy) -> None:
    longest = config.data.max_prompt_tokens + config.generation.max_new_tokens
    if longest > policy.model.context_length:
        raise InputError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and "
            f"generation.max_new_tokens={config.generation.max_new_tokens} make {longest} tokens, "
            f"but the model's context is {policy.model.context_length}; lower one of them."
        )


class Run:
    """The training loop of one run directory, from its last checkpoint on.

    Attributes:
      first_step: optimizer steps that were done before.
      skipped: updates skipped because loss or gradient was not finite.
      logs: where metrics go beside metrics.jsonl.
      micro_batch: completions of an update processed at once.
      validation_items: prompts to compare checkpoints by; none are compared where it is empty.
      validation_key: PRNG key of their completions, the same each time.
      best: step and ``eval_reward`` of the best checkpoint so far, or None.
    """

    validation_items: Sequence[rollouts.Item] = ()
    validation_key: jax.Array

    def __init__(
        self,
        config: Config,
        policy: Policy,
        items: Sequence[rollouts.Item],
        key: jax.Array,
        workdir: Path,
        config_hash: str,
        signals: rundir.Signals,
    ):
        self.signals = signals
        self.config, self.policy, self.items, self.key = config, policy, items, key
        self.workdir, self.config_hash = workdir, config_hash
        self.steps_per_epoch = len(items) // config.prompts_per_step
        steps = self.steps_per_epoch * config.train.epochs
        self.total_steps = min(steps, config.train.max_steps or steps)
        self.logs: Sequence[trackers.Tracker] = ()
        self.checkpoints = checkpoints.Checkpoints(workdir, keep=config.train.keep_checkpoints)
        self.state = grpo.init_state(policy.zero, config.hyperparameters)
        found, damaged = self.checkpoints.restore_latest(self.state)
        for sentence in damaged:
            say(f"passed over: {sentence}", sys.stderr)
        position: dict[str, Any] = {}
        if found is not None:
            self.state, self.key, position = found
            if position.get("config_hash") != config_hash:
                raise InputError(
                    f"--workdir={workdir}: its checkpoints are of other settings than its "
                    "config.json; give another folder."
                )
        self.state = devices.replicate(policy.mesh, self.state)
        self.first_step = int(self.state.step)
        self.num_tokens = position.get("num_tokens", 0)
        self.skipped = position.get("skipped", 0)
        self.skipped_in_a_row = position.get("skipped_in_a_row", 0)
        self.best: dict[str, Any] | None = position.get("best")
        self.micro_batch = micro_batch(config, position.get("micro_batch", config.train.batch_size))
        # What was written after the checkpoint is written again.
        self.metrics = metrics.JsonLines(
            workdir / "metrics.jsonl", position.get("metrics_bytes", 0)
        )
        self.completions = metrics.JsonLines(
            workdir / "completions.jsonl", position.get("completions_bytes", 0)
        )
        self.nonfinite = metrics.JsonLines(
            workdir / "nonfinite.jsonl", position.get("nonfinite_bytes", 0)
        )

    def train(self) -> grpo.TrainState:
        """Runs the steps that are left and returns the last state.

        Raises:
          Interrupted: a signal came; the step under way and its checkpoint were finished.
          InputError: too many updates in a row were skipped.
        """
        state, saved = self.state, time.monotonic()
        progress = screens.Progress(self.total_steps)
        signals = self.signals
        signals.at_once = False
        with contextlib.ExitStack() as last:
            # All of them, also where one fails because the disk is full.
            logs = (self.completions, self.metrics, self.nonfinite)
            for close in (self.checkpoints, *logs, progress):
                last.callback(close.close)
            last.callback(setattr, signals, "at_once", True)
            for step in range(self.first_step, self.total_steps):
                started = time.perf_counter()
                state, record = self.step(state, step)
                record["step_time"] = time.perf_counter() - started
                if self.evaluation_due(step + 1):
                    record["eval_reward"] = self.evaluate(state)
                self.log(record)
                self.check_finite(step, bool(record["skipped"]))
                progress.update(
                    step + 1,
                    reward=f"{record['reward']:.3f}",
                    kl=f"{record['kl']:.4f}",
                    tokens_per_s=f"{self.step_tokens / record['step_time']:.0f}",
                )
                if signals.received or self.checkpoint_due(step + 1, saved):
                    for log in logs:
                        log.sync()
                    self.checkpoints.save(state, self.key, self.position(step + 1))
                    saved = time.monotonic()
                if signals.received:
                    break
        if signals.received:
            say(
                f"stopped after step {int(state.step)} of {self.total_steps}; the same command "
                "continues the run",
                sys.stderr,
            )
            raise rundir.Interrupted(128 + signals.received)
        return state

    def checkpoint_due(self, done: int, saved: float) -> bool:
        """Whether a checkpoint belongs after ``done`` steps, the last one being of ``saved``."""
        settings = self.config.train
        every, minutes = settings.checkpoint_every_steps, settings.checkpoint_every_minutes
        return (
            done % (settings.save_interval * self.steps_per_epoch) == 0
            or done == self.total_steps
            or self.evaluation_due(done)
            or bool(every and done % every == 0)
            or bool(minutes and time.monotonic() - saved >= 60 * minutes)
        )

    def evaluation_due(self, done: int) -> bool:
        """Whether the adapter after ``done`` steps is judged by the validation prompts."""
        every = self.config.train.evaluate_every_steps
        return bool(every) and (done % every == 0 or done == self.total_steps)

    def evaluate(self, state: grpo.TrainState) -> float:
        """Mean reward of the validation prompts, NaN where all abstained; keeps the best."""
        items = self.validation_items
        rewards, _ = evaluation.evaluate(
            self.policy, state.adapter, items, self.validation_key, self.config, greedy=False
        )
        reward = evaluation.mean_reward([item.task.name for item in items], rewards)
        if reward > (-math.inf if self.best is None else self.best["eval_reward"]):
            self.best = {"step": int(state.step), "eval_reward": reward}
        return reward

    def best_adapter(self) -> Offsets | None:
        """The adapter of the best checkpoint; None, after saying so, where it cannot be read."""
        if self.best is None:
            return None
        stored = checkpoints.Checkpoints(self.workdir)
        try:
            return stored.restore(self.state, self.best["step"])[0].adapter
        except InputError as error:
            say(f"no best adapter: {error}", sys.stderr)
            return None
        finally:
            stored.close()

    def position(self, done: int) -> dict[str, Any]:
        """Where the run stands, for the checkpoint after ``done`` steps."""
        return {
            "step": done,
            "config_hash": self.config_hash,
            "num_tokens": self.num_tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best": self.best,
            "micro_batch": self.micro_batch.size,
            "metrics_bytes": self.metrics.size,
            "completions_bytes": self.completions.size,
            "nonfinite_bytes": self.nonfinite.size,
        }

    def log(self, record: dict[str, Any]) -> None:
        """Writes a step's record wherever it goes; what is not finite as null."""
        memory = metrics.peak_memory_bytes()
        if memory is not None:
            record["device_memory_peak_bytes"] = memory
        finite = {name: x for name, x in record.items() if np.isfinite(x)}
        self.metrics.write({name: finite.get(name) for name in record})
        for log in self.logs:
            numbers = {f"train/{name}": x for name, x in finite.items() if name != "step"}
            log.log(numbers, record["step"])

    def batch(self, step: int) -> list[rollouts.Item]:
        """The prompts of a step: a shuffle per epoch, drawn from the seed and the epoch alone."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.items))
        size = self.config.prompts_per_step
        return [self.items[i] for i in order[position * size : (position + 1) * size]]

    def step(self, state: grpo.TrainState, step: int) -> tuple[grpo.TrainState, dict[str, Any]]:
        """One optimizer step: rollouts, rewards, advantages, update."""
        config = self.config
        items = self.batch(step)
        temperature = sampling.anneal(
            config.generation.temperature,
            config.generation.final_temperature,
            step / max(self.total_steps - 1, 1),
        )
        length = rollouts.bucket_length(
            max(len(item.tokens) for item in items),
            config.generation.prompt_buckets,
            config.data.max_prompt_tokens,
        )
        prompts = rollouts.pad([item.tokens for item in items], length)
        with memory.advise("a step's rollouts", self.rollouts_advice()):
            out = rollouts.generate(
                self.policy,
                state.adapter,
                prompts,
                jax.random.split(jax.random.fold_in(self.key, step), len(items)),
                config.generation,
                num_samples=config.grpo.group_size,
                temperature=temperature,
            )
            tokens, mask = jax.device_get((out.tokens, out.mask))
        texts = rollouts.decode(self.policy, tokens, mask)
        scores = rollouts.score(items, texts)
        rewards = scores.total
        advantages = self.advantages(items, texts, tokens, mask, rewards)
        batch = grpo.Batch(
            jnp.asarray(prompts.tokens),
            jnp.asarray(prompts.mask),
            out.tokens,
            out.mask,
            out.logps,
            advantages,
        )
        batch = devices.divide(self.policy.mesh, batch)

        def attempt(size: int) -> tuple[grpo.TrainState, dict[str, jax.Array]]:
            updated = grpo.update_alone(
                state,
                self.policy.params,
                batch,
                temperature,
                model=self.policy.model,
                hp=dataclasses.replace(config.hyperparameters, micro_batch=size),
            )
            return jax.block_until_ready(updated)

        state, update = self.micro_batch.run(attempt)
        self.step_tokens = int(mask.sum() + prompts.mask.sum() * config.grpo.group_size)
        self.num_tokens += self.step_tokens
        record: dict[str, Any] = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps_per_epoch,
            **{name: float(value) for name, value in jax.device_get(update).items()},
            **step_metrics.rewards(items, scores),
            **step_metrics.lengths(mask.sum(-1), self._unended(tokens, mask)),
            "temperature": temperature,
            "num_tokens": self.num_tokens,
        }
        if step % config.logging.interval == 0 or step + 1 == self.total_steps:
            self.show(step + 1, items, texts, rewards, np.asarray(advantages))
        return state, record

    def rollouts_advice(self) -> str:
        """What to lower where the rollouts of a step take too much memory."""
        count, length = self.config.train.accumulation_steps, self.config.generation.max_new_tokens
        if count > 1:
            return f"lower train.accumulation_steps={count} to {count // 2}"
        return f"lower generation.max_new_tokens={length} to {length // 2}"

    def check_finite(self, step: int, skipped: bool) -> None:
        """Counts a skipped update; stops after too many in a row, with the prompts on disk."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
        say(f"step {step + 1}: loss or gradient is not finite; update skipped", sys.stderr)
        for item in self.batch(step):
            prompt = {"step": step + 1, "task": item.task.name, "prompt": item.example.prompt}
            self.nonfinite.write(prompt)
        if self.skipped_in_a_row > self.config.train.max_skipped_updates:
            raise InputError(
                f"train.max_skipped_updates={self.config.train.max_skipped_updates}: loss or "
                f"gradient was not finite {self.skipped_in_a_row} times in a row, at last in step "
                f"{step + 1}; lower train.learning_rate={self.config.train.learning_rate} in a new "
                f"run, or look at the prompts in {self.workdir / 'nonfinite.jsonl'}."
            )

    def advantages(
        self,
        items: Sequence[rollouts.Item],
        texts: Sequence[Sequence[str]],
        tokens: np.ndarray,
        mask: np.ndarray,
        rewards: np.ndarray,
    ) -> jax.Array:
        """Advantages float32 ``[P, G, N]`` by the config's supervision and rule."""
        settings = self.config.grpo
        if settings.supervision == "process":
            steps = rollouts.score_steps(self.policy, items, texts, tokens, mask, rewards)
            advantages = grpo.process_advantages(*steps, mask)
        else:
            advantages = grpo.outcome_advantages(rewards, mask)
        if settings.advantage == "scaled":
            advantages = grpo.scale_and_clip(
                advantages, scale=settings.reward_scale, clip=settings.reward_clip
            )
        return advantages

    def _unended(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Which completions were cut at the largest length; bool ``[P, G]``."""
        ended = np.isin(tokens[..., -1], np.asarray(self.policy.end_ids))
        return mask[..., -1] & ~ended

    def show(
        self,
        step: int,
        items: Sequence[rollouts.Item],
        texts: Sequence[Sequence[str]],
        rewards: np.ndarray,
        advantages: np.ndarray,
    ) -> None:
        """Stores a step's completions, and shows the first of each task."""
        for row, item in enumerate(items):
            for sample, text in enumerate(texts[row]):
                numbers = {
                    "reward": float(rewards[row, sample]),
                    "advantage": float(advantages[row, sample, 0]),
                }
                self.completions.write(
                    {
                        "step": step,
                        "task": item.task.name,
                        "prompt": item.example.prompt,
                        "completion": text,
                        **{n: x if np.isfinite(x) else None for n, x in numbers.items()},
                    }
                )
        screens.Progress.write(screens.completions(step, items, texts, rewards))


def micro_batch(config: Config, size: int) -> memory.Chunk:
    """The completions of an update that are processed at once: whole groups, at first ``size``."""
    group, length = config.grpo.group_size, config.generation.max_new_tokens

    def smaller(size: int) -> int | None:
        sizes = range(group, size // 2 + 1, group)
        return max((each for each in sizes if size % each == 0), default=None)

    def advice(size: int, smaller: int | None) -> str:
        if smaller is None:
            return f"lower generation.max_new_tokens={length} to {length // 2}"
        batch, count = config.train.batch_size, config.train.accumulation_steps
        return (
            f"continue with train.fit_memory=True, or lower train.batch_size={batch} to {smaller} "
            f"and raise train.accumulation_steps={count} to {count * batch // smaller} in a new "
            "run; neither changes a result but by rounding"
        )

    return memory.Chunk(
        "the micro-batch, train.batch_size",
        size,
        "a step's update",
        lower=config.train.fit_memory,
        smaller=smaller,
        advice=advice,
    )
