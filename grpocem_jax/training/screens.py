"""What a person reads: the first screen, completions on the way, the closing table, the card."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpocem_jax import rollouts
from grpocem_jax.config import Config
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.runs.screens import (
    caveats,
    divided,
    installed,
    reward_tables,
    right_answers,
    scales,
    setting,
)
from grpocem_jax.training import evaluation
from grpocem_jax.utils.terminal import one_line


def first(
    config: Config,
    policy: Policy,
    data_lines: Sequence[str],
    workdir: Path,
    logs: Sequence[str] = (),
) -> str:
    """What a training runs on what, with what: shown before anything is compiled."""
    drawn = ""
    if config.grpo.dynamic_sampling > 1:
        drawn = f", of {config.prompts_drawn_per_step} prompts those whose rewards differ first"
    if config.train.staleness:
        drawn += ", drawn by the adapter of the step before"
    return "\n".join(
        [
            *setting(config, policy),
            *(f"data      {line}" for line in data_lines),
            f"step      {config.prompts_per_step} prompts x {config.grpo.group_size} completions"
            + drawn,
            *_divided(config, policy),
            f"run       {workdir}",
            *(f"metrics   {log}" for log in logs),
        ]
    )


def _divided(config: Config, policy: Policy) -> list[str]:
    """What each of several processes does, a line; none of a single one."""
    apart, drawn = config.train.rollout_processes, config.prompts_drawn_per_step
    if not apart:
        return divided(policy, "prompts of a step", drawn)
    updating = policy.processes.count - apart
    return [
        f"divided   {updating} {'process updates' if updating == 1 else 'processes update'}, "
        f"{apart} {'completes' if apart == 1 else 'complete'} the {drawn} prompts of the next step "
        "meanwhile; process 0 writes"
    ]


def closing(
    heldout: dict[str, evaluation.Gain],
    greedy: dict[str, evaluation.Gain],
    summary: dict[str, Any],
    config: Config,
    workdir: Path,
    remarks: Sequence[str] = (),
) -> str:
    """Held-out reward before and after, what the run took, and remarks on it."""
    sampled = f"sampled at T={config.generation.temperature:g}"
    right = right_answers(summary)
    return "\n".join(
        [
            "",
            "held-out reward",
            table(heldout, sampled),
            "",
            table(greedy, "greedy"),
            "",
            *([f"right under greedy decoding: {right}"] if right else []),
            f"{summary['steps']} steps in {summary['train_seconds']:.0f} s, "
            f"{summary['seconds']:.0f} s in all, {summary['compile_seconds']:.0f} s of them "
            f"compiling; largest offset {summary['offsets']['max_abs']:.3f}",
            *_best(summary),
            *remarks,
            f"adapter and logs are in {workdir}; adapt it to a prompt, measure adaptation on the "
            "held-out prompts, or export the model:",
            *(f"    {command}" for command in _next_commands(workdir)),
        ]
    )


def _next_commands(workdir: Path) -> list[str]:
    """What can be done with a run that has ended, as commands to paste."""
    run = shlex.quote(str(workdir))
    adapt, export = map(installed, ("grpocem-adapt", "grpocem-export"))
    return [
        f"{adapt} --workdir {run} --prompt 'Once upon a time, there was a little dog.'",
        f"{adapt} --workdir {run} --evaluate --config.search.support=8",
        f"{export} --workdir {run} --out {shlex.quote(str(workdir / 'exported'))}",
    ]


def _best(summary: dict[str, Any]) -> list[str]:
    best = summary["best_adapter"]
    if best is None:
        return []
    return [
        f"best of the validation prompts: {best['eval_reward']:.3f} after step {best['step']}, in "
        "best_adapter; the adapter of this table is the last"
    ]


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of the adapter folder."""
    return "\n".join(
        [
            f"# Adapter of {summary['model']}",
            "",
            f"{scales(config, summary)}, trained with GRPO for {summary['steps']} steps by "
            "grpocem_jax. `adapter_model.safetensors` holds the offsets of each site; zeros "
            "are the base model. `adapter_config.json` has a hash of the base model's weights: "
            "grpocem_jax refuses the adapter on others.",
            "",
            *caveats(summary),
            *reward_tables(config, summary),
        ]
    )


def best_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of the folder that holds the adapter of the best checkpoint."""
    best = summary["best_adapter"]
    return "\n".join(
        [
            f"# Adapter of {summary['model']}, the best of its checkpoints",
            "",
            f"{scales(config, summary)}, trained with GRPO by grpocem_jax: the checkpoint after "
            f"step {best['step']} of {summary['steps']}, whose reward on the validation prompts, "
            f"{best['eval_reward']:.3f}, was the largest. As the largest of several it is too high "
            "an estimate, and held-out reward was measured for the last adapter only.",
            "",
            *caveats(summary),
        ]
    )


def completions(
    step: int, items: Sequence[rollouts.Item], texts: Sequence[Sequence[str]], rewards: np.ndarray
) -> str:
    """The first completion of each task of a step, with its reward and the end of its prompt."""
    lines, shown = [f"step {step}"], set()
    for row, item in enumerate(items):
        if item.task.name not in shown:
            shown.add(item.task.name)
            prompt, text = (one_line(x) for x in (item.example.prompt, texts[row][0]))
            prompt = prompt if len(prompt) <= 64 else f"…{prompt[-63:]}"
            text = text if len(text) <= 70 else f"{text[:69]}…"
            lines.append(f"  {item.task.name:<14} {rewards[row, 0]:+.2f}  {prompt}")
            lines.append(f"  {'':<21} >{text}")
    return "\n".join(lines)


def table(gains: dict[str, evaluation.Gain], title: str) -> str:
    """The gains as text, one task a line."""
    lines = [f"{title:<24}{'before':>8}{'after':>8}{'gain':>8}   95% interval       n"]
    for name, g in gains.items():
        low, high = g.gain_ci95
        lines.append(
            f"  {name:<22}{g.before:8.3f}{g.after:8.3f}{g.gain:+8.3f}   [{low:+.3f}, {high:+.3f}]"
            f"{g.n:6d}"
        )
    return "\n".join(lines)
