"""Training: the course of a run from its config to its summary."""

import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    rundir,
    sampling,
    screens,
    trackers,
)
from grpocem_jax.adapters import base as adapters
from grpocem_jax.adapters import svf
from grpocem_jax.config import Config, parse_config
from grpocem_jax.errors import InputError
from grpocem_jax.files import read_object, write_json, write_safetensors
from grpocem_jax.policy import Policy, load_policy
from grpocem_jax.tasks import Loaded, load_examples
from grpocem_jax.terminal import visible


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
    if rundir.check_settings(workdir, settings.to_dict()) and (workdir / "summary.json").exists():
        summary = read_object(workdir / "summary.json", fix="delete it to have it made again")
        page = workdir / "report/index.html"
        print(visible(f"the run in {workdir} is complete; its page is {page}"))
        return summary
    trackers.check(config.logging)
    policy = load_policy(
        config.model, config.adapter, stop=config.generation.stop, seed=config.seed
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
    identity = {"model": policy.pretrained.sha256, "data": _data_hash(train_items)}
    with (
        rundir.claim(workdir, settings.to_dict(), identity) as claimed,
        rundir.Signals() as signals,
    ):
        config_hash = checkpoints.config_hash(settings.to_dict())
        key, eval_key = jax.random.split(jax.random.key(config.seed))
        run = Run(config, policy, train_items, key, workdir, config_hash, signals)
        run.logs = trackers.start(
            config.logging,
            workdir,
            settings.to_dict(),
            run_id=claimed["id"],
            first_step=run.first_step + 1,
        )
        first = screens.first(config, policy, data.lines, workdir, [x.where for x in run.logs])
        print(visible(first), flush=True)
        if run.first_step:
            print(f"resumed   after step {run.first_step}", flush=True)
        return _finish(run, data, eval_key, started)


def _data_hash(items: Sequence[rollouts.Item]) -> str:
    """SHA-256 of the training prompts, their order and their columns."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.task.name, *item.example)).encode())
    return digest.hexdigest()


def _finish(run: "Run", data: "Data", eval_key: jax.Array, started: float) -> dict[str, Any]:
    """Trains what is left to train, judges, and writes what a run leaves behind."""
    config, policy, workdir = run.config, run.policy, run.workdir
    heldout_items = data.heldout
    clock = metrics.CompileClock.start()
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
                "train": sum(item.task.name == name for item in run.items),
                "heldout": tasks.count(name),
                "bad_lines": data.bad_lines[name],
            }
            for name in config.data.tasks
        },
        "resumed_after_step": run.first_step,
        "skipped_updates": run.skipped,
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
    judged = metrics.JsonLines(workdir / "heldout.jsonl", size=0)
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
    for log in run.logs:
        log.log(named, int(state.step))
        log.close()
    print(visible(screens.closing(heldout, greedy, summary, config, workdir)), flush=True)
    print(visible(f"report    {report.write(workdir)}"), flush=True)
    return summary


def _check_length(config: Config, policy: Policy) -> None:
    longest = config.data.max_prompt_tokens + config.generation.max_new_tokens
    if longest > policy.model.context_length:
        raise InputError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and "
            f"generation.max_new_tokens={config.generation.max_new_tokens} make {longest} tokens, "
            f"but the model's context is {policy.model.context_length}; lower one of them."
        )


class Data(NamedTuple):
    """The prompts of a run.

    Attributes:
      train: training prompts of all tasks.
      heldout: held-out prompts of all tasks.
      lines: where they are from, for the first screen.
      bad_lines: for each task, how many rows were passed over because they cannot be used.
    """

    train: list[rollouts.Item]
    heldout: list[rollouts.Item]
    lines: list[str]
    bad_lines: dict[str, int]


def load_data(config: Config, policy: Policy) -> Data:
    """Training and held-out prompts of all tasks.

    Raises:
      InputError: as `grpocem_jax.tasks.load_examples`.
    """
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
            bad_lines=config.data.bad_lines,
        )

    train: list[rollouts.Item] = []
    heldout: list[rollouts.Item] = []
    lines = []
    bad_lines = {}
    for name in config.data.tasks:
        judged = draw(name, "heldout", config.data.heldout_samples, ())
        # Published splits share rows now and then; what judges must not have been trained on.
        prompts = {example.prompt for example in judged.examples}
        trained = draw(name, "train", config.data.max_samples, prompts)
        train += rollouts.encode(policy, tasks[name], trained.examples)
        heldout += rollouts.encode(policy, tasks[name], judged.examples)
        lines += [trained.description, judged.description]
        bad_lines[name] = trained.bad_lines + judged.bad_lines
    return Data(train, heldout, lines, bad_lines)


class Run:
    """The training loop of one run directory, from its last checkpoint on.

    Attributes:
      first_step: optimizer steps that were done before.
      skipped: updates skipped because loss or gradient was not finite.
      logs: where metrics go beside metrics.jsonl.
    """

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
            print(visible(f"passed over: {sentence}"), file=sys.stderr, flush=True)
        position: dict[str, Any] = {}
        if found is not None:
            self.state, self.key, position = found
        self.first_step = int(self.state.step)
        self.num_tokens = position.get("num_tokens", 0)
        self.skipped = position.get("skipped", 0)
        self.skipped_in_a_row = position.get("skipped_in_a_row", 0)
        # What was written after the checkpoint is written again.
        self.metrics = metrics.JsonLines(
            workdir / "metrics.jsonl", position.get("metrics_bytes", 0)
        )
        self.completions = metrics.JsonLines(
            workdir / "completions.jsonl", position.get("completions_bytes", 0)
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
        try:
            for step in range(self.first_step, self.total_steps):
                started = time.perf_counter()
                state, record = self.step(state, step)
                record["step_time"] = time.perf_counter() - started
                self.log(record)
                progress.update(
                    step + 1,
                    reward=f"{record['reward']:.3f}",
                    kl=f"{record['kl']:.4f}",
                    tokens_per_s=f"{self.step_tokens / record['step_time']:.0f}",
                )
                if signals.received or self.checkpoint_due(step + 1, saved):
                    self.checkpoints.save(state, self.key, self.position(step + 1))
                    saved = time.monotonic()
                if signals.received:
                    break
        finally:
            signals.at_once = True
            progress.close()
            self.metrics.close()
            self.completions.close()
            self.checkpoints.close()
        if signals.received:
            print(
                f"stopped after step {int(state.step)} of {self.total_steps}; the same command "
                "continues the run",
                file=sys.stderr,
            )
            raise rundir.Interrupted(128 + signals.received)
        return state

    def checkpoint_due(self, done: int, saved: float) -> bool:
        """Whether a checkpoint belongs after ``done`` steps, the last one being of ``saved``."""
        settings = self.config.train
        every, minutes = settings.checkpoint_every_steps, settings.checkpoint_every_minutes
        return (
            done % self.steps_per_epoch == 0
            or done == self.total_steps
            or bool(every and done % every == 0)
            or bool(minutes and time.monotonic() - saved >= 60 * minutes)
        )

    def position(self, done: int) -> dict[str, Any]:
        """Where the run stands, for the checkpoint after ``done`` steps."""
        return {
            "step": done,
            "config_hash": self.config_hash,
            "num_tokens": self.num_tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "metrics_bytes": self.metrics.size,
            "completions_bytes": self.completions.size,
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
        with self.memory("rollouts"):
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
        with self.memory("update"):
            state, update = jax.block_until_ready(
                grpo.update(
                    state,
                    self.policy.params,
                    batch,
                    temperature,
                    model=self.policy.model,
                    hp=config.hyperparameters,
                )
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
        self.check_finite(step + 1, bool(record["skipped"]), items)
        if step % config.logging.interval == 0 or step + 1 == self.total_steps:
            self.show(step + 1, items, texts, rewards, np.asarray(advantages))
        return state, record

    @contextlib.contextmanager
    def memory(self, what: str) -> Iterator[None]:
        """Says which setting to lower where the device's memory does not suffice."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            settings, group = self.config.train, self.config.grpo.group_size
            batch, count = settings.batch_size, settings.accumulation_steps
            if what == "rollouts" and count > 1:
                advice = f"lower train.accumulation_steps={count} to {count // 2}"
            elif what == "update" and batch > group:
                sizes = range(group, batch // 2 + 1, group)
                smaller = max(size for size in sizes if batch % size == 0)
                advice = (
                    f"lower train.batch_size={batch} to {smaller} and raise "
                    f"train.accumulation_steps={count} to {count * batch // smaller}, which "
                    "changes no result"
                )
            else:
                length = self.config.generation.max_new_tokens
                advice = f"lower generation.max_new_tokens={length} to {length // 2}"
            raise InputError(f"out of device memory in a step's {what}: {advice}.") from error

    def check_finite(self, step: int, skipped: bool, items: Sequence[rollouts.Item]) -> None:
        """Counts a skipped update; stops after too many in a row, with the prompts on disk."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
        print(f"step {step}: loss or gradient is not finite; update skipped", file=sys.stderr)
        file = self.workdir / "nonfinite.jsonl"
        prompts = metrics.JsonLines(file)
        for item in items:
            prompts.write({"step": step, "task": item.task.name, "prompt": item.example.prompt})
        prompts.close()
        if self.skipped_in_a_row > self.config.train.max_skipped_updates:
            raise InputError(
                f"train.max_skipped_updates={self.config.train.max_skipped_updates}: loss or "
                f"gradient was not finite {self.skipped_in_a_row} times in a row, at last in step "
                f"{step}; lower train.learning_rate={self.config.train.learning_rate}, or look at "
                f"the prompts in {file}."
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
    """TRL's reward metrics: mean and sample standard deviation over completions, of all of them, by
    task, and by reward function where a task has several."""
    rewards = scores.total
    present = ~np.isnan(rewards)
    flat = np.asarray(grpo.equal_rewards(jnp.asarray(rewards), jnp.asarray(present)))
    record = {
        "reward": float(np.nanmean(rewards)) if present.any() else 0.0,
        "reward_std": _std(rewards),
        "frac_reward_zero_std": float(flat.mean()),
    }
    tasks = np.array([item.task.name for item in items])
    parts = {name: rewards[tasks == name] for name in dict.fromkeys(tasks.tolist())}
    if any(len(item.task.rewards) > 1 for item in items):
        parts |= {name: values for name, values in scores.functions.items() if name not in parts}
    for name, values in parts.items():
        if not np.isnan(values).all():
            record[f"rewards/{name}/mean"] = float(np.nanmean(values))
            record[f"rewards/{name}/std"] = _std(values)
    return record


def _std(values: np.ndarray) -> float:
    """Sample standard deviation of those that are not NaN, 0 of fewer than two."""
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if len(present) > 1 else 0.0
