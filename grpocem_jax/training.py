"""Training: the course of a run from its config to its summary."""

import dataclasses
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from grpocem_jax import (
    checkpoints,
    evaluation,
    grpo,
    metrics,
    report,
    rollouts,
    sampling,
    screens,
    trackers,
)
from grpocem_jax.adapters import base as adapters
from grpocem_jax.adapters import svf
from grpocem_jax.config import Config, parse_config
from grpocem_jax.errors import InputError
from grpocem_jax.files import write_json, write_safetensors
from grpocem_jax.policy import Policy, load_policy
from grpocem_jax.tasks import Loaded, load_examples


def train(settings: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains an adapter and measures what it did to held-out reward.

    Args:
      settings: a config, such as those in configs/.
      workdir: the run directory; must not hold a run.

    Returns:
      the contents of summary.json.

    Raises:
      InputError: settings, model, data or run directory that cannot be used; before compilation.
    """
    started = time.perf_counter()
    config, workdir = parse_config(settings), Path(workdir)
    if (workdir / "config.json").exists():
        raise InputError(
            f"--workdir={workdir}: holds a run already; give another folder, or delete this one."
        )
    trackers.check(config.logging)
    policy = load_policy(
        config.model, config.adapter, stop=config.generation.stop, seed=config.seed
    )
    _check_length(config, policy)
    train_items, heldout_items, data_lines = load_data(config, policy)
    if len(train_items) < config.prompts_per_step:
        raise InputError(
            f"{len(train_items)} training prompts in all, but a step takes "
            f"{config.prompts_per_step} (train.batch_size * train.accumulation_steps / "
            "grpo.group_size); give more data or a smaller step."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", settings.to_dict())
    logs = trackers.start(config.logging, workdir, settings.to_dict())
    first = screens.first(config, policy, data_lines, workdir, [log.where for log in logs])
    print(first, flush=True)

    clock = metrics.CompileClock.start()
    key, eval_key = jax.random.split(jax.random.key(config.seed))
    config_hash = checkpoints.config_hash(settings.to_dict())
    run = Run(config, policy, train_items, key, workdir, config_hash, logs)
    train_started = time.perf_counter()
    state = run.train()
    train_seconds = time.perf_counter() - train_started
    # The base model is measured here too and not at first: it does not change, and one who starts
    # a run sees its first steps at once.
    print("held-out reward before training", file=sys.stderr, flush=True)
    before = evaluation.judge(policy, policy.zero, heldout_items, eval_key, config)
    print("held-out reward after training", file=sys.stderr, flush=True)
    after = evaluation.judge(policy, state.adapter, heldout_items, eval_key, config)
    clock.stop()

    tasks = [item.task.name for item in heldout_items]
    heldout, greedy = (
        evaluation.compare(config.data.tasks, tasks, b, a)
        for b, a in (
            (before.rewards, after.rewards),
            (before.greedy_rewards, after.greedy_rewards),
        )
    )
    offsets = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.adapter)])
    pretrained = policy.pretrained
    summary = {
        "heldout": {name: dataclasses.asdict(gain) for name, gain in heldout.items()},
        "heldout_greedy": {name: dataclasses.asdict(gain) for name, gain in greedy.items()},
        "steps": int(state.step),
        "trainable_parameters": adapters.num_params(policy.zero),
        "total_parameters": pretrained.num_params(),
        "offsets": {
            "max_abs": float(np.abs(offsets).max()),
            "rms": float(np.sqrt(np.mean(offsets**2))),
        },
        "model": pretrained.source,
        "builtin_model": pretrained.kind == "builtin",
        "random_weights": pretrained.kind == "random",
        "builtin_data": {
            name: config.data.sources[name].source == "builtin" for name in config.data.tasks
        },
        "data": {
            name: {
                "source": config.data.sources[name].source,
                "train": sum(item.task.name == name for item in train_items),
                "heldout": tasks.count(name),
            }
            for name in config.data.tasks
        },
        "seconds": time.perf_counter() - started,
        "train_seconds": train_seconds,
        "compile_seconds": clock.seconds,
        **metrics.environment(),
    }
    checkpoints.save_adapter(
        workdir / "adapter",
        state.adapter,
        policy.adapter_config(config.adapter),
        screens.model_card(config, summary),
    )
    judged = metrics.JsonLines(workdir / "heldout.jsonl")
    for line in evaluation.records(heldout_items, before, after):
        judged.write(line)
    judged.close()
    spectrum = svf.singular_values(policy.params, policy.sites)
    if spectrum:
        write_safetensors(workdir / "spectrum.safetensors", spectrum)
    write_json(workdir / "summary.json", summary)
    named = {
        "eval/reward" if name == "overall" else f"eval/rewards/{name}/mean": gain.after
        for name, gain in heldout.items()
    }
    for log in logs:
        log.log(named, int(state.step))
        log.close()
    print(screens.closing(heldout, greedy, summary, config, workdir), flush=True)
    print(f"report    {report.write(workdir)}", flush=True)
    return summary


def _check_length(config: Config, policy: Policy) -> None:
    longest = config.data.max_prompt_tokens + config.generation.max_new_tokens
    if longest > policy.model.context_length:
        raise InputError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and "
            f"generation.max_new_tokens={config.generation.max_new_tokens} make {longest} tokens, "
            f"but the model's context is {policy.model.context_length}; lower one of them."
        )


def load_data(
    config: Config, policy: Policy
) -> tuple[list[rollouts.Item], list[rollouts.Item], list[str]]:
    """Training and held-out prompts of all tasks, and lines that say where they are from."""
    tokenizer = policy.tokenizer
    tasks = {name: config.task(name) for name in config.data.tasks}

    def draw(
        name: str, split: Literal["train", "heldout"], limit: int, exclude: Container[str]
    ) -> Loaded:
        return load_examples(
            tasks[name],
            config.data.sources[name],
            split=split,
            count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_samples=limit,
            seed=config.seed,
            exclude=exclude,
        )

    train: list[rollouts.Item] = []
    heldout: list[rollouts.Item] = []
    lines = []
    for name in config.data.tasks:
        judged = draw(name, "heldout", config.data.heldout_samples, ())
        # Published splits share rows now and then; what judges must not have been trained on.
        prompts = {example.prompt for example in judged.examples}
        trained = draw(name, "train", config.data.max_samples, prompts)
        train += rollouts.encode(policy, tasks[name], trained.examples)
        heldout += rollouts.encode(policy, tasks[name], judged.examples)
        lines += [trained.description, judged.description]
    return train, heldout, lines


class Run:
    """The training loop of one run directory."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        items: Sequence[rollouts.Item],
        key: jax.Array,
        workdir: Path,
        config_hash: str,
        logs: Sequence[trackers.Tracker] = (),
    ):
        self.config, self.policy, self.items, self.key = config, policy, items, key
        self.config_hash, self.logs = config_hash, logs
        self.steps_per_epoch = len(items) // config.prompts_per_step
        steps = self.steps_per_epoch * config.train.epochs
        self.total_steps = min(steps, config.train.max_steps or steps)
        self.num_tokens = 0
        self.metrics = metrics.JsonLines(workdir / "metrics.jsonl")
        self.completions = metrics.JsonLines(workdir / "completions.jsonl")
        self.checkpoints = checkpoints.Checkpoints(workdir)

    def train(self) -> grpo.TrainState:
        """Runs all steps and returns the last state."""
        config, hp = self.config, self.config.hyperparameters
        state = grpo.init_state(self.policy.zero, hp)
        every = config.train.checkpoint_every_steps
        progress = screens.Progress(self.total_steps)
        try:
            for step in range(self.total_steps):
                started = time.perf_counter()
                state, record = self.step(state, step)
                record["step_time"] = time.perf_counter() - started
                memory = metrics.peak_memory_bytes()
                if memory is not None:
                    record["device_memory_peak_bytes"] = memory
                self.metrics.write(record)
                numbers = {f"train/{name}": x for name, x in record.items() if name != "step"}
                for log in self.logs:
                    log.log(numbers, step + 1)
                done = step + 1
                progress.update(
                    done,
                    reward=f"{record['reward']:.3f}",
                    kl=f"{record['kl']:.4f}",
                    tokens_per_s=f"{self.step_tokens / record['step_time']:.0f}",
                )
                if (
                    done % self.steps_per_epoch == 0
                    or done == self.total_steps
                    or (every and done % every == 0)
                ):
                    position = {"step": done, "config_hash": self.config_hash}
                    self.checkpoints.save(state, self.key, position)
        finally:
            progress.close()
            self.metrics.close()
            self.completions.close()
            self.checkpoints.close()
        return state

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
        state, update = grpo.update(
            state,
            self.policy.params,
            batch,
            temperature,
            model=self.policy.model,
            hp=config.hyperparameters,
        )
        self.step_tokens = int(mask.sum() + prompts.mask.sum() * config.grpo.group_size)
        self.num_tokens += self.step_tokens
        record: dict[str, Any] = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps_per_epoch,
            **{name: float(value) for name, value in jax.device_get(update).items()},
            **reward_metrics(items, scores),
            **length_metrics(mask.sum(-1), self._unended(tokens, mask)),
            "temperature": temperature,
            "num_tokens": self.num_tokens,
        }
        if not np.isfinite(record["loss"]) or not np.isfinite(record["grad_norm"]):
            raise InputError(
                f"train.learning_rate={config.train.learning_rate}: the loss or its gradient is no "
                f"longer finite at step {step + 1}; lower it."
            )
        if step % config.logging.interval == 0 or step + 1 == self.total_steps:
            self.show(step + 1, items, texts, rewards, np.asarray(advantages))
        return state, record

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
                reward = float(rewards[row, sample])
                self.completions.write(
                    {
                        "step": step,
                        "task": item.task.name,
                        "prompt": item.example.prompt,
                        "completion": text,
                        "reward": None if np.isnan(reward) else reward,
                        "advantage": float(advantages[row, sample, 0]),
                    }
                )
        screens.Progress.write(screens.completions(step, items, texts, rewards))


def length_metrics(lengths: np.ndarray, unended: np.ndarray) -> dict[str, float]:
    """TRL's length metrics, in tokens, of all completions and of those that ended by themselves.

    Args:
      lengths: int ``[P, G]``, with the end token.
      unended: bool ``[P, G]``, those cut at the largest length.
    """
    record = {"completions/clipped_ratio": float(unended.mean())}
    # Without a completion that ended TRL gives 0.
    ended = lengths[~unended] if not unended.all() else np.zeros(1)
    for kind, values in (("length", lengths), ("terminated_length", ended)):
        record |= {
            f"completions/mean_{kind}": float(values.mean()),
            f"completions/min_{kind}": float(values.min()),
            f"completions/max_{kind}": float(values.max()),
        }
    return record


def reward_metrics(items: Sequence[rollouts.Item], scores: rollouts.Scores) -> dict[str, float]:
    """TRL's reward metrics: mean over completions, mean of group standard deviations; mean and
    standard deviation by task, and by reward function where a task has several."""
    rewards = scores.total
    present = ~np.isnan(rewards)
    flat = np.asarray(grpo.equal_rewards(jnp.asarray(rewards), jnp.asarray(present)))
    groups = rewards[present.any(-1)]
    record = {
        "reward": float(np.nanmean(rewards)) if present.any() else 0.0,
        "reward_std": float(np.nanstd(groups, axis=-1).mean()) if len(groups) else 0.0,
        "frac_reward_zero_std": float(flat.mean()),
    }
    tasks = np.array([item.task.name for item in items])
    parts = {name: rewards[tasks == name] for name in dict.fromkeys(tasks.tolist())}
    if any(len(item.task.rewards) > 1 for item in items):
        parts |= {name: values for name, values in scores.functions.items() if name not in parts}
    for name, values in parts.items():
        if not np.isnan(values).all():
            record[f"rewards/{name}/mean"] = float(np.nanmean(values))
            record[f"rewards/{name}/std"] = float(np.nanstd(values))
    return record
