"""Parts of screens and cards that training, adapting and exporting have in common."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import jax

from grpocem_jax import adapters
from grpocem_jax.config import AdapterConfig, Config
from grpocem_jax.models import hub
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.utils import devices


def setting(config: Config, policy: Policy) -> list[str]:
    """Device, model and adapter, a line each."""
    pretrained, trainable = policy.pretrained, adapters.num_params(policy.zero)
    total = pretrained.num_params()
    device, processes = jax.local_devices()[0], policy.processes
    used, there = policy.num_devices // processes.count, jax.local_device_count()
    count = f"{used} of {there} x " if used < there else f"{used} x " if used > 1 else ""
    several = f"{processes.count} processes x " if processes.count > 1 else ""
    shards = config.model.weight_shards
    parts = f", weights in {shards} parts" if shards > 1 else ""
    asked = ", by model.dtype=auto" if config.model.dtype == "auto" else ""
    taken = devices.float32_products(device) if policy.dtype == "float32" else policy.dtype
    products = "" if taken == policy.dtype else f", products in {taken}"
    packaged = hub.PACKAGED.get(pretrained.source)
    source = {
        "builtin": "the built-in tiny model",
        "random": f"{pretrained.source}: RANDOM WEIGHTS, for plumbing and benchmarks only",
        "folder": f"folder {pretrained.source}",
        "gguf": f"{pretrained.source}, from {packaged[1]}"
        if packaged
        else f"file {pretrained.source}",
        "hub": f"{pretrained.source} from the Hub",
    }[pretrained.kind]
    return [
        f"device    {several}{count}{device.platform} ({device.device_kind}), "
        f"{policy.dtype}{products}{asked}{parts}",
        f"model     {source}, {total:,} parameters, frozen",
        f"adapter   {trainable:,} {trained(config.adapter)} ({100 * trainable / total:.3f}%)",
    ]


def divided(policy: Policy, what: str, count: int, *, alike: bool = False) -> list[str]:
    """What each of several processes does, a line; none of a single one.

    Args:
      policy: which knows the processes.
      what: is divided, in the plural.
      count: how many of these there are.
      alike: whether they are not divided after all.
    """
    processes = policy.processes.count
    if processes == 1:
        return []
    if alike:
        return ["divided   nothing: a gradient is computed alike in every process"]
    share = f"{count // processes}" if count % processes == 0 else f"about {count / processes:.1f}"
    each = f"{share} in each process"
    return [f"divided   {count} {what}: {each}; process 0 writes"]


def trained(settings: AdapterConfig) -> str:
    """What the trained numbers are."""
    what = "scales of singular values" if settings.type == "svf" else f"numbers of {settings.type}"
    return f"{what} ({', '.join(settings.sites)})"


def scales(config: Config, summary: dict[str, Any]) -> str:
    """How many numbers were trained on which model."""
    return f"{summary['trainable_parameters']:,} {trained(config.adapter)} of {summary['model']}"


def caveats(summary: dict[str, Any]) -> list[str]:
    """What must not be read into the results, a paragraph each."""
    templates = [name for name, builtin in summary["builtin_data"].items() if builtin]
    lines = []
    if summary["random_weights"]:
        lines.append("**The base model's weights are random; this shows plumbing, nothing else.**")
    if summary["builtin_model"]:
        lines.append(
            "**The base model is the tiny one that comes with grpocem_jax; it shows the method, "
            "and is of no use by itself.**"
        )
    if templates:
        lines.append(
            f"**The data of {', '.join(templates)} are templates that come with grpocem_jax: they "
            "show that the method works, not how good the model is at reading.**"
        )
    return [part for line in lines for part in (line, "")]


def reward_tables(config: Config, summary: dict[str, Any]) -> list[str]:
    """Held-out reward as Markdown, sampled and greedy."""
    lines = []
    for key, how in (
        ("heldout", f"sampled at temperature {config.generation.temperature:g}"),
        ("heldout_greedy", "greedy"),
    ):
        rows = [
            f"| {name} | {g['before']:.3f} | {g['after']:.3f} | {g['gain']:+.3f} "
            f"[{g['gain_ci95'][0]:+.3f}, {g['gain_ci95'][1]:+.3f}] | {g['n']} |"
            for name, g in summary[key].items()
        ]
        lines += [
            f"Held-out reward, {how}:",
            "",
            "| task | before | after | gain, 95% interval | n |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    right = right_answers(summary)
    return lines + ([f"Right under greedy decoding: {right}.", ""] if right else [])


def right_answers(summary: dict[str, Any]) -> str:
    """Greedy accuracies before and after, of the tasks that have one; "" where none has."""
    return ", ".join(
        f"{name} {gain['before']:.0%} before, {gain['after']:.0%} after"
        for name, gain in summary.get("heldout_greedy_accuracy", {}).items()
    )


def installed(name: str) -> str:
    """A command of the package as the shell finds it: by name, or by its path where the environment
    that runs now is not the active one."""
    found, own = shutil.which(name), Path(sys.executable).with_name(name)
    if not own.is_file() or (found is not None and Path(found) == own):
        return name
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))


def unit(fitness: str) -> str:
    """The unit of what a search maximises, by ``search.fitness``: a fitness of the user's own is
    named after itself."""
    return {"likelihood": "nats/token", "reward": "reward"}.get(fitness, fitness)


def measured(of: str) -> str:
    """What numbers in a `unit` are, to stand behind them."""
    if of == "nats/token":
        return "log-likelihood, nats per token"
    return "mean reward" if of == "reward" else f"value of {of}"
