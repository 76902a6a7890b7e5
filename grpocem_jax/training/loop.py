"""Training: the course of a run from its config to its summary."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from grpocem_jax import grpo, report
from grpocem_jax.config import Config, parse_config, with_defaults
from grpocem_jax.rollouts.policy import Policy, load_policy
from grpocem_jax.runs import checkpoints, metrics, rundir, trackers
from grpocem_jax.training import results, screens, stages
from grpocem_jax.training import step as steps
from grpocem_jax.training.algorithm import Algorithm, make_algorithm
from grpocem_jax.training.data import Data, check_length, load_data
from grpocem_jax.training.run import Run
from grpocem_jax.utils import cluster, devices, user_code
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_file, read_object, writing
from grpocem_jax.utils.terminal import say


def train(
    settings: ml_collections.ConfigDict, workdir: str | Path, *, held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains an adapter and measures what it did to held-out reward.

    A run directory that holds a run of the same settings continues it from its last checkpoint; the
    result is bit for bit that of a run that was never interrupted. A finished run goes on where
    ``train.max_steps`` or ``train.epochs`` are larger than before.

    Args:
      settings: a config, such as those in configs/.
      workdir: the run directory.
      held_out: as in `grpocem_jax.training.data.load_data`.

    Returns:
      the contents of summary.json.

    Raises:
      InputError: settings, model, data or run directory that cannot be used; before compilation.
      Interrupted: SIGTERM or SIGINT came; the run was saved.
    """
    started, processes = time.perf_counter(), cluster.here()
    config, workdir = parse_config(settings), expand(workdir, "--workdir")
    settings = with_defaults(settings)
    workdir = Path(processes.first(lambda: str(workdir)))
    processes.require_same(started_with(settings.to_dict()))
    stages.check_processes(config, processes)
    for name in config.data.tasks:
        config.task(name)  # the user's own rewards are imported before a model is loaded
    algorithm = make_algorithm(config)
    complete, done = processes.first(lambda: _found(workdir, settings.to_dict()))
    trackers.check(config.logging)
    shards = config.model.weight_shards
    mesh = devices.sharing(stages.prompts_at_once(config, processes), weight_shards=shards)
    policy = processes.ahead(lambda: load_policy(config, mesh=mesh, processes=processes))
    check_length(config, policy)
    if user_code.is_reference(config.train.optimizer):
        _check_optimizer(config, algorithm, policy)
    data = processes.ahead(lambda: load_data(config, policy, held_out=held_out))
    train_items = data.train
    if len(train_items) < config.prompts_drawn_per_step:
        factor = " * grpo.dynamic_sampling" if config.grpo.dynamic_sampling > 1 else ""
        raise InputError(
            f"{len(train_items)} training prompts in all, but a step takes "
            f"{config.prompts_drawn_per_step} (train.batch_size * train.accumulation_steps / "
            f"grpo.group_size{factor}); give more data or a smaller step."
        )
    identity = {"model": policy.pretrained.sha256, "data": data.sha256}
    if config.model.dtype == "auto":
        identity["model.dtype"] = policy.dtype
    processes.require_same({f"the {name}": value for name, value in identity.items()})
    total = steps.total_steps(config, len(train_items))
    if config.train.final_lr_scale < 1:
        algorithm = make_algorithm(config, total_steps=total)
    finished = None if complete is None else complete.get("steps")
    trained = max(done, finished) if isinstance(finished, int) else done
    if total < trained:
        raise InputError(
            f"--workdir={workdir}: the run there has done {trained} steps, but "
            f"train.max_steps={config.train.max_steps} and train.epochs={config.train.epochs} give "
            f"{total}; give as many or more, or another folder."
        )
    if complete is not None:
        processes.first(lambda: rundir.check_identity(workdir, identity))
    if total > trained > done:
        raise InputError(
            f"--workdir={workdir}: the run there ended after {trained} steps, but its checkpoint "
            "of that step is not there to go on from; give another folder."
        )
    if complete is not None and finished in (total, None):
        page = processes.first(lambda: _page(workdir))
        say(f"the run in {workdir} is complete; its page is {page}")
        return complete
    with (
        writing(f"--workdir={workdir}", "make room; the same command continues the run"),
        contextlib.ExitStack() as held,
        rundir.Signals() as signals,
        contextlib.ExitStack() as at_last,
    ):
        claim = rundir.claim(workdir, settings.to_dict(), identity)
        claimed = processes.first(lambda: held.enter_context(claim))
        config_hash = checkpoints.config_hash(rundir.trained_settings(settings.to_dict()))
        key, eval_key = jax.random.split(jax.random.key(config.seed))
        run = Run(config, policy, algorithm, train_items, key, workdir, config_hash, signals)
        run.validation_items = data.validation
        # The numbers before it are those of the held-out prompts.
        run.validation_key = jax.random.fold_in(eval_key, len(data.heldout))
        if processes.writes:
            run.logs = trackers.start(
                config.logging,
                workdir,
                settings.to_dict(),
                run_id=claimed["id"],
                first_step=run.first_step + 1,
            )
        for log in run.logs:
            at_last.callback(log.close)
        first = screens.first(config, policy, data.lines, workdir, [x.where for x in run.logs])
        say(first)
        if run.first_step:
            say(f"resumed   after step {run.first_step}")
        for difference in run.differences:
            say(f"differs   {difference}")
        return _finish(run, data, eval_key, started)


def _finish(run: Run, data: Data, eval_key: jax.Array, started: float) -> dict[str, Any]:
    """Trains what is left to train, judges, and writes what a run leaves behind."""
    config, policy, workdir = run.config, run.policy, run.workdir
    clock = CompileClock.start()
    train_started = time.perf_counter()
    state = run.train()
    train_seconds = time.perf_counter() - train_started
    heldout = results.judge(policy, state.offsets, data.heldout, eval_key, config)
    best = run.best_adapter()
    clock.stop()
    summary = results.summarize(
        config,
        policy,
        state.offsets,
        run.items,
        data.bad_lines,
        heldout,
        {
            "steps": int(state.step),
            "adapter": "last",
            "best_adapter": None if best is None else run.best,
            "resumed_after_step": run.first_step,
            "skipped_updates": run.skipped,
            "continued": run.differences,
            "micro_batch": run.stages.micro_batch.size,
            "received_bytes": policy.processes.traffic[1],
            "seconds": time.perf_counter() - started,
            "train_seconds": train_seconds,
            "compile_seconds": clock.seconds,
        },
    )
    sampled, greedy = heldout.gains(config.data.tasks)
    unchanged = [name for name, gain in sampled.items() if gain.gain_ci95 == (0.0, 0.0)]
    remarks = metrics.signal_lines(run.recent, config.generation.temperature, unchanged)
    written = (workdir, config, policy, state.offsets, best, heldout, summary)
    try:  # saved first, and shown also where it cannot be saved
        policy.processes.first(lambda: results.write(*written))
    finally:
        say(screens.closing(sampled, greedy, summary, config, workdir, remarks))
    named = {
        "eval/reward" if name == "overall" else f"eval/rewards/{name}/mean": gain.after
        for name, gain in sampled.items()
    }
    for log in run.logs:
        log.log(named, int(state.step))
    say(f"report    {policy.processes.first(lambda: str(report.write(workdir)))}")
    return summary


def _found(
    workdir: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, int] | list[Any]:
    """The summary of a run that is complete, and the step of a run's last checkpoint."""
    if not rundir.check_settings(workdir, settings):
        return None, 0
    return _complete_summary(workdir), checkpoints.last_step(workdir)


def _page(workdir: Path) -> str:
    """The report of a complete run, drawn where it was cut off before it was."""
    page = workdir / "report" / "index.html"
    return str(page if is_file(page) else report.write(workdir))


def started_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all processes before any of them loads a model, by name."""
    versions = metrics.environment()
    flat = {f"config.{name}": value for name, value in rundir.flat(settings).items()}
    return {**flat, **{f"the version of {x}": v for x, v in versions["versions"].items()}}


def _complete_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that is complete; None of one that is not."""
    path = workdir / "summary.json"
    if not is_file(path) or not is_file(workdir / "adapter" / "adapter_model.safetensors"):
        return None
    return read_object(path, fix="delete it to have it made again")


def _check_optimizer(config: Config, algorithm: Algorithm, policy: Policy) -> None:
    """Refuses an optimizer that cannot train the policy's own offsets."""
    try:
        grpo.check_optimizer(algorithm.optimizer, policy.zero)
    except InputError as error:
        raise InputError(f"config.train.optimizer={config.train.optimizer!r}: {error}") from error
