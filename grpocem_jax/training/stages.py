"""The two stages of a step, rollouts and update: what each does, and which processes do it when.

With ``train.staleness=0`` a step completes its prompts with the adapter that it then updates, and
all processes do both.  With 1 the prompts of a step are completed with the adapter as it was before
the step before, so that the rollouts of a step do not wait for the update of the one before:
``train.rollout_processes`` of the processes make them meanwhile.  Which processes do what changes
nothing but rounding.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax import grpo, rollouts
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.training import step as steps
from grpocem_jax.training.algorithm import Algorithm
from grpocem_jax.training.update import (
    find_trouble,
    micro_batch,
    over,
    repeat,
    shorter_completions,
    update_program,
)
from grpocem_jax.utils import devices, memory
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import Processes


class Updated(NamedTuple):
    """What comes of an update.

    Attributes:
      state: after it. In a process that only samples, the state of its optimizer is an old one.
      metrics: of the update, and of rollouts apart the seconds that each stage took.
      trouble: why it was skipped, and what to do; empty strings where it was not.
    """

    state: grpo.TrainState
    metrics: dict[str, float]
    trouble: tuple[str, str]


def check_processes(config: Config, processes: Processes) -> None:
    """Refuses processes among which the stages of a step cannot be divided.

    Raises:
      InputError: how many there are, and what would fit.
    """
    apart, count = config.train.rollout_processes, processes.count
    if apart >= count and apart:
        fix = (
            "start several (docs/clusters.md), or set it to 0"
            if count == 1
            else f"give at most {count - 1}"
        )
        there = "there is one process" if count == 1 else f"there are {count} processes"
        raise InputError(
            f"config.train.rollout_processes={apart}: {there}, of which at least one must update; "
            f"{fix}."
        )
    size, group = config.train.batch_size, config.grpo.group_size
    updating = Processes(0, count - apart)
    updating.divide_evenly(
        size // group,
        f"train.batch_size={size} / grpo.group_size={group} makes {size // group} prompts, which",
        f"start as many processes as divide them, or give a train.batch_size that is a multiple of "
        f"{group * updating.count}",
    )


def prompts_at_once(config: Config, processes: Processes) -> int:
    """How many prompts this process has at once, which its devices share."""
    apart = config.train.rollout_processes
    updating = processes.count - apart
    if processes.index < updating:
        return config.train.batch_size // config.grpo.group_size // updating
    return math.ceil(config.prompts_drawn_per_step / apart)


def checkpointed(config: Config, state: grpo.TrainState, behind: Offsets) -> grpo.TrainState:
    """A state as checkpoints have it.

    Args:
      config: the settings.
      state: the state after a step.
      behind: the offsets before that step, which the prompts of the next one are completed with
        where ``train.staleness`` is 1. Only then are they part of a checkpoint.
    """
    if not config.train.staleness:
        return state
    return state._replace(opt_state={"optimizer": state.opt_state, "behind": behind})


def from_checkpoint(config: Config, saved: grpo.TrainState) -> tuple[grpo.TrainState, Offsets]:
    """The state and the offsets that `checkpointed` was given."""
    if not config.train.staleness:
        return saved, saved.offsets
    behind = saved.opt_state["behind"]
    return saved._replace(opt_state=saved.opt_state["optimizer"]), behind


class Stages:
    """The stages of the steps of a run, each in the processes that do it.

    Attributes:
      processes: those on this one's side, which do what it does.
      micro_batch: completions of an update processed at once.

    Args:
      config: the settings.
      policy: the policy, which knows all processes.
      algorithm: the parts of GRPO.
      items: all training prompts.
      key: the run's base PRNG key.
      total: optimizer steps of the run.
      size: completions of an update to process at once, at first.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        algorithm: Algorithm,
        items: Sequence[rollouts.Item],
        key: jax.Array,
        *,
        total: int,
        size: int,
    ):
        self.config, self.algorithm, self.items, self.key = config, algorithm, items, key
        self._all, self._total = policy.processes, total
        apart = config.train.rollout_processes
        self._updating = self._all.count - apart if apart else 0
        self.processes = self._all.side(self._updating) if apart else self._all
        self.policy = dataclasses.replace(policy, processes=self.processes)
        self.micro_batch = micro_batch(config, size, self.processes)
        self._ahead: steps.Prepared | None = None

    def run(
        self, state: grpo.TrainState, behind: Offsets, step: int
    ) -> tuple[steps.Prepared, Updated]:
        """One step.

        Args:
          state: before it.
          behind: the offsets before the step before.
          step: its number, from 0; those of one object are one after the other.
        """
        if self._updating:
            return self._run_apart(state, behind, step)
        prepared = self.sample(behind if self.config.train.staleness else state.offsets, step)
        return prepared, self.update(state, prepared, step)

    def sample(self, offsets: Offsets, step: int) -> steps.Prepared:
        """Completes and judges the prompts of a step.

        Raises:
          InputError: whatever a reward function or a part of the algorithm does wrong; device
            memory that runs out.
        """
        config, policy = self.config, self.policy
        items = steps.prompts(config, self.items, step)
        keys = steps.keys(self.key, step, len(items))
        draw = policy.adapter.draw
        with memory.advise("a step's rollouts", self._rollouts_advice()):
            out = rollouts.complete(
                policy,
                offsets if draw is None else draw(keys.draw, offsets),
                [item.tokens for item in items],
                keys.prompts,
                config.generation,
                num_samples=config.grpo.group_size,
                temperature=steps.temperature(config, step, self._total),
                buckets=(*config.generation.prompt_buckets, config.data.max_prompt_tokens),
                shared=self._shared(step),
            )
            out = steps.with_likelihoods(config, policy, items, out, step)
        return steps.prepare(config, policy, self.algorithm, items, out, keys.weights)

    def update(self, state: grpo.TrainState, prepared: steps.Prepared, step: int) -> Updated:
        """Updates a state by a step's completions.

        Raises:
          InputError: device memory that runs out.
        """
        config, policy = self.config, self.policy
        temperature = steps.temperature(config, step, self._total)
        batch = devices.divide(policy.mesh, self.processes.part(prepared.batch))
        update = over(self.processes, update_program)
        draw, key = policy.adapter.draw, None
        if draw is not None:
            key = steps.keys(self.key, step, config.prompts_drawn_per_step).draw

        def once(state: grpo.TrainState, size: int) -> tuple[grpo.TrainState, dict[str, jax.Array]]:
            updated = update(
                state,
                policy.params,
                batch,
                temperature,
                model=policy.model,
                objective=self.algorithm.objective,
                optimizer=self.algorithm.optimizer,
                beta=config.grpo.beta,
                entropy=config.grpo.entropy,
                micro_batch=size,
                draw=draw,
                key=key,
            )
            return jax.block_until_ready(updated)

        def attempt(size: int) -> tuple[grpo.TrainState, dict[str, jax.Array]]:
            return repeat(functools.partial(once, size=size), state, config.grpo.updates)

        new, found = self.micro_batch.run(attempt)
        metrics = {name: float(value) for name, value in jax.device_get(found).items()}
        record = {"step": step + 1, **metrics}
        trouble = find_trouble(config, policy, record, prepared.finite, state, batch, temperature)
        return Updated(new, metrics, trouble)

    def _run_apart(
        self, state: grpo.TrainState, behind: Offsets, step: int
    ) -> tuple[steps.Prepared, Updated]:
        """`run`, and the rollouts of the next step, each in its own processes."""
        own: list[grpo.TrainState] = []

        def sample(offsets: Offsets, step: int) -> dict[str, Any]:
            return _prepared_told(self.sample(offsets, step)) if step < self._total else {}

        def update(prepared: steps.Prepared) -> dict[str, Any]:
            updated = self.update(state, prepared, step)
            own.append(updated.state)
            return {
                "offsets": jax.tree.leaves(updated.state.offsets),
                "metrics": updated.metrics,
                "trouble": updated.trouble,
            }

        if self._ahead is None:  # the first step, or the first one after a checkpoint
            _, rolled = self._both(dict, lambda: sample(behind, step))
            self._ahead = self._heard(rolled, step)
        prepared = self._ahead
        told, rolled = self._both(lambda: update(prepared), lambda: sample(state.offsets, step + 1))
        self._ahead = self._heard(rolled, step + 1) if step + 1 < self._total else None
        if own:
            new = own[0]
        else:
            leaves = devices.replicate(self.policy.mesh, [jnp.asarray(x) for x in told["offsets"]])
            offsets = jax.tree.unflatten(jax.tree.structure(state.offsets), leaves)
            new = state._replace(offsets=offsets, step=state.step + 1)
        seconds = {"rollout_time": rolled["seconds"], "update_time": told["seconds"]}
        what, fix = told["trouble"]
        return prepared, Updated(new, {**told["metrics"], **seconds}, (what, fix))

    def _both(
        self, update: Callable[[], dict[str, Any]], sample: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the first process of each side makes, and the seconds that it took."""
        updates = self._all.index < self._updating

        def own() -> dict[str, Any]:
            began = time.perf_counter()
            told = update() if updates else sample()
            told["seconds"] = time.perf_counter() - began
            return told if self.processes.index == 0 else {}

        # A reward function is heard wherever it is called.
        found = self._all.each(own, speaks=not updates)
        return found[0], found[self._updating]

    def _heard(self, told: dict[str, Any], step: int) -> steps.Prepared:
        """What `_prepared_told` was given, in another process."""
        items = steps.prompts(self.config, self.items, step)
        arrays: dict[str, Any] = {
            name: None if x is None else jnp.asarray(x) for name, x in told["batch"].items()
        }
        return steps.Prepared(
            items=[items[row] for row in told["rows"]],
            texts=told["texts"],
            rewards=told["rewards"],
            batch=grpo.Batch(**arrays),
            metrics=told["metrics"],
            tokens=told["tokens"],
            finite=told["finite"],
            rows=told["rows"],
        )

    def _shared(self, step: int) -> Collection[str]:
        """What of a step's completions all processes of this side must have."""
        if self._updating:  # the first of them tells those that update
            return rollouts.SHARED
        shown = steps.shown(self.config, step, self._total)
        return steps.shared(self.config, self.algorithm, shown=shown)

    def _rollouts_advice(self) -> str:
        """What to lower where the rollouts of a step take too much memory."""
        drawn = self.config.grpo.dynamic_sampling
        if drawn > 1:
            return f"lower grpo.dynamic_sampling={drawn} to {drawn // 2}"
        count, length = self.config.train.accumulation_steps, self.config.generation.max_new_tokens
        if count > 1:
            return f"lower train.accumulation_steps={count} to {count // 2}"
        return shorter_completions(length)


def _prepared_told(prepared: steps.Prepared) -> dict[str, Any]:
    """A step's completions as the other processes need them, which have the prompts."""
    told = prepared._asdict()
    del told["items"]
    return {**told, "batch": prepared.batch._asdict()}
