"""What a person reads: the first screen, completions on the way, the closing table, the card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpocem_jax import evaluation, rollouts
from grpocem_jax.adaptation import TrainedRun
from grpocem_jax.adapters import base as adapters
from grpocem_jax.config import Config
from grpocem_jax.policy import Policy


def first(config: Config, policy: Policy, data_lines: Sequence[str], workdir: Path) -> str:
    """What a training runs on what, with what: shown before anything is compiled."""
    return "\n".join(
        [
            *_setting(config, policy),
            *(f"data      {line}" for line in data_lines),
            f"step      {config.prompts_per_step} prompts x {config.grpo.group_size} completions",
            f"run       {workdir}",
        ]
    )


def adapting(run: TrainedRun, workdir: str) -> str:
    """What an adaptation runs on what: shown before anything is compiled."""
    cem = run.config.cem
    space = {"subspace": f"subspace of {cem.rank} directions", "full": "all offsets"}
    where = space.get(cem.space, f"weights of experts ({cem.experts})")
    how = (
        f"gradient, Adam {cem.learning_rate:g} x {cem.generations} steps"
        if cem.method == "gradient"
        else f"CEM, {cem.generations} generations of {cem.population_size} candidates"
    )
    gate = f"gate at {cem.gate_z:g} standard errors" if cem.gate else "no gate"
    budget = "" if cem.budget_s is None else f", at most {cem.budget_s:g} s"
    return "\n".join(
        [
            *_setting(run.config, run.policy),
            f"run       {workdir}",
            f"search    {how}{budget}, on the {cem.fitness}, in {where}, {gate}",
        ]
    )


def adapted(record: dict[str, Any]) -> str:
    """One adapted prompt: fitness and text before and after."""
    verdict = {
        "start": "not adapted: " + (record["note"] or "nothing did better on held-back text"),
    }.get(record["returned"], f"adapted: the {record['returned']} of the search")
    gain = record["held_back_gain"]
    held = f", held-back {gain:+.3f}" if gain else ""
    before, after = record["fitness_before"], record["fitness_after"]
    lines = ["", f"fitness   {before:.3f} before, {after:.3f} after{held}"]
    if "heldout_before" in record:
        lines.append(
            f"held out  {record['heldout_before']:.3f} before, {record['heldout_after']:.3f} after"
        )
    lines += [
        f"search    {record['generations']} generations, {record['candidates']} candidates in "
        f"{record['seconds']:.2f} s, and {record['compile_seconds']:.1f} s to compile"
        + (", converged" if record["converged"] else ""),
        f"result    {verdict}",
    ]
    if record["prompt"]:
        lines += [
            f"prompt    {one_line(record['prompt'])}",
            f"before   >{one_line(record['text_before'])}",
            f"after    >{one_line(record['text_after'])}",
        ]
    return "\n".join(lines)


def adapted_card(run: TrainedRun, record: dict[str, Any]) -> str:
    """README.md of a folder that holds an adapted adapter."""
    return "\n".join(
        [
            f"# Adapted singular value adapter of {run.policy.pretrained.source}",
            "",
            f"{adapters.num_params(run.policy.zero):,} offsets of singular values "
            f"({', '.join(run.config.adapter.sites)}), found at inference by grpocem_jax: "
            f"{record['candidates']} candidates in {record['generations']} generations; fitness "
            f"{record['fitness_before']:.3f} before, {record['fitness_after']:.3f} after.",
            "",
        ]
    )


def _setting(config: Config, policy: Policy) -> list[str]:
    pretrained, trainable = policy.pretrained, adapters.num_params(policy.zero)
    total = pretrained.num_params()
    device = jax.devices()[0]
    source = {
        "builtin": "the built-in tiny model",
        "random": f"{pretrained.source}: RANDOM WEIGHTS, for plumbing and benchmarks only",
        "folder": f"folder {pretrained.source}",
        "hub": f"{pretrained.source} from the Hub",
    }[pretrained.kind]
    return [
        f"device    {device.platform} ({device.device_kind}), {config.model.dtype}",
        f"model     {source}, {total:,} parameters, frozen",
        f"adapter   {trainable:,} singular value scales of {', '.join(config.adapter.sites)} "
        f"({100 * trainable / total:.3f}%)",
    ]


def closing(
    heldout: dict[str, evaluation.Gain],
    greedy: dict[str, evaluation.Gain],
    summary: dict[str, Any],
    config: Config,
    workdir: Path,
) -> str:
    """Held-out reward before and after, and what the run took."""
    sampled = f"sampled at T={config.generation.temperature:g}"
    return "\n".join(
        [
            "",
            "held-out reward",
            table(heldout, sampled),
            "",
            table(greedy, "greedy"),
            "",
            f"{summary['steps']} steps in {summary['train_seconds']:.0f} s, "
            f"{summary['seconds']:.0f} s in all, {summary['compile_seconds']:.0f} s of them "
            f"compiling; largest offset {summary['offsets']['max_abs']:.3f}",
            f"adapter and logs are in {workdir}; to adapt it further: "
            f"python adapt.py --config CONFIG --workdir {workdir} --prompt TEXT",
        ]
    )


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of the adapter folder."""
    rows = [
        f"| {name} | {g['before']:.3f} | {g['after']:.3f} | {g['gain']:+.3f} "
        f"[{g['gain_ci95'][0]:+.3f}, {g['gain_ci95'][1]:+.3f}] | {g['n']} |"
        for name, g in summary["heldout"].items()
    ]
    return "\n".join(
        [
            f"# Singular value adapter of {summary['model']}",
            "",
            f"{summary['trainable_parameters']:,} offsets of singular values "
            f"({', '.join(config.adapter.sites)}), trained with GRPO for {summary['steps']} steps "
            "by grpocem_jax. `adapter_model.safetensors` holds one vector a site; zeros are the "
            "base model.",
            "",
            f"Held-out reward, sampled at temperature {config.generation.temperature:g}:",
            "",
            "| task | before | after | gain, 95% interval | n |",
            "|---|---|---|---|---|",
            *rows,
            "",
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


def one_line(text: str) -> str:
    """Text with control characters as escapes, so that it takes one line and moves no cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
