"""The training loop of one run directory: steps, checkpoints, and what is written on the way."""

import collections
import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpocem_jax import grpo, rollouts
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.runs import checkpoints, metrics, rundir, trackers
from grpocem_jax.runs.shared import SharedCheckpoints
from grpocem_jax.training import evaluation, screens, stages
from grpocem_jax.training import step as steps
from grpocem_jax.training.algorithm import Algorithm
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes
from grpocem_jax.utils.progress import Progress
from grpocem_jax.utils.terminal import say


class LastStep:
    """The last completed step of a training, which has a checkpoint whatever ends the training.

    Where its ``with`` block ends in an error, the step is saved before the error goes on, unless it
    is already.

    Args:
      save: saves a checkpoint after that step, in the background.
      wait: waits until it is saved.
      done: steps that were done before.
      total: steps of the whole training.
      what: what the same command continues, as messages name it.

    Attributes:
      completed: steps that are done.
      saved: steps that the last checkpoint has.
      saved_at: when it was made, by `time.monotonic`.
    """

    def __init__(
        self,
        save: Callable[[], None],
        wait: Callable[[], None],
        *,
        done: int,
        total: int,
        what: str,
    ):
        self._save, self._wait = save, wait
        self._total, self._what = total, what
        self.completed = self.saved = done
        self.saved_at = time.monotonic()

    def __enter__(self) -> "LastStep":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and self.completed > self.saved:
            self.rescue()

    def save(self) -> None:
        """Saves a checkpoint."""
        self._save()
        self.saved, self.saved_at = self.completed, time.monotonic()

    def rescue(self) -> None:
        """Saves where something else went wrong; what goes wrong here is said and not raised."""
        try:
            self._save()
            self._wait()
        except Exception as error:  # Orbax and what lies below it raise errors of many families
            failure = f"{type(error).__name__}: {error}"
            say(f"step {self.completed} could not be saved ({failure})", sys.stderr)
        else:
            say(
                f"saved after step {self.completed} of {self._total}; the same command continues "
                f"the {self._what} from there",
                sys.stderr,
            )


class Run:
    """The training loop of one run directory, from its last checkpoint on.

    Attributes:
      first_step: optimizer steps that were done before.
      skipped: updates skipped because loss or gradient was not finite.
      logs: where metrics go beside metrics.jsonl.
      stages: what a step does, and which process does it.
      behind: the offsets before the step before.
      processes: those that train together.
      validation_items: prompts to compare checkpoints by; none are compared where it is empty.
      validation_key: PRNG key of their completions, the same each time.
      best: step and ``eval_reward`` of the best checkpoint so far, or None.
      recent: the last lines of metrics.jsonl.
      differences: what makes the result of a run that went on beyond its first end another one
        than that of a run as long from the start, in sentences; none as a rule.
    """

    processes: Processes = ALONE
    validation_items: Sequence[rollouts.Item] = ()
    validation_key: jax.Array

    def __init__(
        self,
        config: Config,
        policy: Policy,
        algorithm: Algorithm,
        items: Sequence[rollouts.Item],
        key: jax.Array,
        workdir: Path,
        config_hash: str,
        signals: rundir.Signals,
    ):
        self.signals = signals
        self.config, self.policy, self.items, self.key = config, policy, items, key
        self.algorithm = algorithm
        self.workdir, self.config_hash = workdir, config_hash
        self.steps_per_epoch = len(items) // config.prompts_drawn_per_step
        self.total_steps = steps.total_steps(config, len(items))
        self.logs: Sequence[trackers.Tracker] = ()
        self.processes = policy.processes
        self.state = grpo.init_state(policy.zero, algorithm.optimizer)
        self.checkpoints = SharedCheckpoints(
            workdir, keep=config.train.keep_checkpoints, processes=self.processes
        )
        # As a checkpoint has it, and what is read from one.
        self.template = stages.checkpointed(config, self.state, self.state.offsets)
        # Before arrays are read: those of another run would pass for damaged ones.
        last = self.processes.first(lambda: checkpoints.last_position(workdir))
        if last is not None and last.get("config_hash") != config_hash:
            raise InputError(
                f"--workdir={workdir}: its checkpoints are of other settings than its "
                "config.json; give another folder."
            )
        found, damaged = self.checkpoints.restore_latest(self.template)
        for sentence in damaged:
            say(f"passed over: {sentence}", sys.stderr)
        position: dict[str, Any] = {}
        restored = self.template
        if found is not None:
            restored, self.key, position = found
        self.state, self.behind = stages.from_checkpoint(
            config, devices.replicate(policy.mesh, restored)
        )
        self.first_step = int(self.state.step)
        self.num_tokens = position.get("num_tokens", 0)
        self.skipped = position.get("skipped", 0)
        self.skipped_in_a_row = position.get("skipped_in_a_row", 0)
        self.best: dict[str, Any] | None = position.get("best")
        size = position.get("micro_batch", config.train.batch_size)
        self.stages = stages.Stages(
            config, policy, algorithm, items, self.key, total=self.total_steps, size=size
        )

        # What was written after the checkpoint is written again.
        def log(name: str, size: int) -> metrics.JsonLines:
            return metrics.JsonLines(workdir / name, size, written=self.processes.writes)

        self.metrics = log("metrics.jsonl", position.get("metrics_bytes", 0))
        shown = position.get("completions_bytes", 0)
        if self.first_step < self.total_steps:
            shown = position.get("completions_bytes_but_of_the_end", shown)
        self.completions = log("completions.jsonl", shown)
        self.shown_before = shown
        self.nonfinite = log("nonfinite.jsonl", position.get("nonfinite_bytes", 0))
        lines = self.processes.first(
            lambda: metrics.last_lines(workdir / "metrics.jsonl", metrics.WINDOW)
        )
        self.recent = collections.deque(lines, maxlen=metrics.WINDOW)
        self.without_signal: set[str] = set()
        self.differences: list[str] = list(position.get("differences", []))
        planned = position.get("total_steps", self.total_steps)
        if planned != self.total_steps:
            self.differences += steps.differences(
                config, planned, self.total_steps, self.first_step
            )

    def train(self) -> grpo.TrainState:
        """Runs the steps that are left and returns the last state.

        Raises:
          Interrupted: a signal came; the step under way and its checkpoint were finished.
          InputError: too many updates in a row were skipped; whatever a reward function raises.
            Whatever ends it, the last step that was completed has a checkpoint first.
        """
        state, received = self.state, 0
        position = self.position(self.first_step)
        progress = Progress(self.total_steps)
        signals = self.signals
        signals.at_once = False
        with contextlib.ExitStack() as stack:
            # All of them, also where one fails because the disk is full.
            logs = (self.completions, self.metrics, self.nonfinite)
            for close in (self.checkpoints, *logs, progress):
                stack.callback(close.close)
            stack.callback(setattr, signals, "at_once", True)

            def save() -> None:
                for log in logs:
                    log.sync()
                whole = stages.checkpointed(self.config, state, self.behind)
                self.checkpoints.save(whole, self.key, position)

            last = stack.enter_context(
                LastStep(
                    save,
                    self.checkpoints.wait,
                    done=self.first_step,
                    total=self.total_steps,
                    what="run",
                )
            )
            for step in range(self.first_step, self.total_steps):
                started, before = time.perf_counter(), self.processes.traffic[1]
                new, record = self.step(state, step)
                record["step_time"] = time.perf_counter() - started
                if self.processes.count > 1:
                    record["received_bytes"] = self.processes.traffic[1] - before
                if self.evaluation_due(step + 1):
                    record["eval_reward"] = self.evaluate(new)
                self.log(record)
                self.check_finite(step, bool(record["skipped"]))
                behind, place = state.offsets, self.position(step + 1)
                # At once, for what a signal may break off: a checkpoint has all of them.
                self.behind, state, last.completed, position = behind, new, step + 1, place
                progress.update(
                    step + 1,
                    reward=f"{record['reward']:.3f}",
                    kl=f"{record['kl']:.4f}",
                    tokens_per_s=f"{self.step_tokens / record['step_time']:.0f}",
                )
                received, due = self.agree(state, self.checkpoint_due(step + 1, last.saved_at))
                if received or due:
                    last.save()
                if received:
                    break
        received = received or self.agree(state, False)[0]
        if received:
            say(
                f"stopped after step {int(state.step)} of {self.total_steps}; the same command "
                "continues the run",
                sys.stderr,
            )
            raise rundir.Interrupted(128 + received)
        return state

    def agree(self, state: grpo.TrainState, due: bool) -> tuple[int, bool]:
        """What all processes do after a step: the signal to stop at, or 0, and whether to save.

        A signal to one is one to all; the clock by which checkpoints are due is that of process 0.

        Raises:
          InputError: the processes have come to different adapters.
        """
        if self.processes.count == 1:  # nobody to differ from, so the adapter stays on the device
            return int(self.signals.received or 0), due
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(jax.device_get(state.offsets)):
            digest.update(leaf.tobytes())
        own: dict[str, Any] = {
            "signal": int(self.signals.received or 0),
            "due": due,
            "at": digest.hexdigest(),
        }
        agreed = self.processes.each(lambda: own)
        apart = [i for i, each in enumerate(agreed) if each["at"] != agreed[0]["at"]]
        if apart:
            raise InputError(
                f"step {int(state.step)}: the adapters of process 0 and process {apart[0]} differ, "
                "which compute the same; give them the same kind of device and the same libraries."
            )
        return next((each["signal"] for each in agreed if each["signal"]), 0), agreed[0]["due"]

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
            self.policy, state.offsets, items, self.validation_key, self.config, greedy=False
        )
        reward = evaluation.mean_reward([item.task.name for item in items], rewards)
        if reward > (-math.inf if self.best is None else self.best["eval_reward"]):
            self.best = {"step": int(state.step), "eval_reward": reward}
        return reward

    def best_adapter(self) -> Offsets | None:
        """The adapter of the best checkpoint; None, after saying so, where it cannot be read."""
        if self.best is None:
            return None
        stored = SharedCheckpoints(self.workdir, processes=self.processes)
        try:
            return stored.restore(self.template, self.best["step"])[0].offsets
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
            "micro_batch": self.stages.micro_batch.size,
            "metrics_bytes": self.metrics.size,
            "completions_bytes": self.completions.size,
            # Without what was shown because it was the end, which a longer run does not show.
            "completions_bytes_but_of_the_end": self.shown_before
            if steps.shown_at_the_end_only(self.config, done - 1, self.total_steps)
            else self.completions.size,
            "total_steps": self.total_steps,
            "differences": self.differences,
            "nonfinite_bytes": self.nonfinite.size,
        }

    def log(self, record: dict[str, Any]) -> None:
        """Writes a step's record wherever it goes; what is not finite as null."""
        memory = metrics.peak_memory_bytes()
        if memory is not None:
            record["device_memory_peak_bytes"] = memory
        finite = {name: x for name, x in record.items() if np.isfinite(x)}
        line = {name: finite.get(name) for name in record}
        self.metrics.write(line)
        self.recent.append(line)
        if len(self.recent) == metrics.WINDOW:
            flat = set(metrics.without_signal(self.recent))
            setting = self.config.generation.temperature
            for text in metrics.signal_lines(self.recent, setting):
                if text.split(":")[0] in flat - self.without_signal:
                    say(f"step {record['step']}: {text}", sys.stderr)
            self.without_signal = flat
        for log in self.logs:
            numbers = {f"train/{name}": x for name, x in finite.items() if name != "step"}
            log.log(numbers, record["step"])

    def step(self, state: grpo.TrainState, step: int) -> tuple[grpo.TrainState, dict[str, Any]]:
        """One optimizer step: rollouts, rewards, advantages, update."""
        prepared, updated = self.stages.run(state, self.behind, step)
        self.step_tokens = prepared.tokens
        self.num_tokens += self.step_tokens
        record: dict[str, Any] = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps_per_epoch,
            **updated.metrics,
            **prepared.metrics,
            "temperature": steps.temperature(self.config, step, self.total_steps),
            "num_tokens": self.num_tokens,
        }
        self.trouble = updated.trouble
        self.shown_before = self.completions.size
        if steps.shown(self.config, step, self.total_steps):
            self.show(step + 1, prepared)
        return updated.state, record

    def show(self, step: int, prepared: steps.Prepared) -> None:
        """Stores a step's completions, and shows the first of each task."""
        for line in steps.records(prepared, step):
            self.completions.write(line)
        Progress.write(screens.completions(step, prepared.items, prepared.texts, prepared.rewards))

    def check_finite(self, step: int, skipped: bool) -> None:
        """Counts a skipped update; stops after too many in a row, with the prompts on disk."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
        what, fix = self.trouble
        say(f"step {step + 1}: {what}; update skipped", sys.stderr)
        for item in steps.prompts(self.config, self.items, step):
            prompt = {"step": step + 1, "task": item.task.name, "prompt": item.example.prompt}
            self.nonfinite.write(prompt)
        if self.skipped_in_a_row > self.config.train.max_skipped_updates:
            raise InputError(
                f"train.max_skipped_updates={self.config.train.max_skipped_updates}: updates were "
                f"not finite {self.skipped_in_a_row} times in a row, at last in step {step + 1} "
                f"({what}); {fix} in a new run, or look at the prompts in "
                f"{self.workdir / 'nonfinite.jsonl'}."
            )
