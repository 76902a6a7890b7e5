"""What a person reads of an adaptation: the first screen, one prompt, all prompts, the card."""

from typing import Any

from grpocem_jax import adapters
from grpocem_jax.config import make_method
from grpocem_jax.runs.screens import divided, measured, setting, trained
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search.base import describe, needs
from grpocem_jax.utils.terminal import one_line


def adapting(run: TrainedRun, workdir: str | None) -> str:
    """What an adaptation runs on what: shown before anything is compiled."""
    search = run.config.search
    space = {"subspace": f"subspace of {search.rank} directions", "full": "all offsets"}
    where = space.get(search.space, f"weights of experts ({search.experts})")
    method = make_method(run.config)
    alike = "gradient" in needs(method)
    how = describe(method, search.generations)
    errors = f"{search.gate_z:g} standard error{'' if search.gate_z == 1 else 's'}"
    gate = f"gate at {errors}" if search.gate else "no gate"
    budget = "" if search.budget_s is None else f", at most {search.budget_s:g} s"
    return "\n".join(
        [
            *setting(run.config, run.policy),
            f"run       {workdir or 'none; adapting starts from the base model'}",
            *divided(run.policy, "candidates", method.population_size, alike=alike),
            f"search    {how}{budget}, on the {search.fitness}, in {where}, {gate}",
        ]
    )


def adapted(record: dict[str, Any], *, search: bool = True) -> str:
    """One adapted prompt: fitness and text before and after, each number with its unit.

    Args:
      record: as ``adapt.py --json`` prints it.
      search: whether the search is described; else only the prompt and its completions, as of a
        further prompt after one search for all.
    """
    lines = ["", *(_found(record) if search else [])]
    if record["prompt"]:
        prompt = record["prompt"]
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines.append(f"prompt    {one_line(shown)}")
    before, after = record["text_before"], record["text_after"]
    if before is not None:
        lines.append(f"before   >{one_line(before)}")
        lines.append(
            "after     the same completion, unchanged"
            if before == after
            else f"after    >{one_line(after)}"
        )
    elif record["prompt"]:
        lines.append("          fills the context, so there is no room for a completion")
    return "\n".join(lines)


def _found(record: dict[str, Any]) -> list[str]:
    """What a search found, in lines."""
    verdict = {
        "start": "not adapted: " + (record["note"] or "nothing did better on held-back text"),
    }.get(record["returned"], f"adapted: the {record['returned']} of the search")
    what, gain, lines = measured(record["fitness_unit"]), record["held_back_gain"], []
    before, after = record["fitness_before"], record["fitness_after"]
    if before is not None:
        lines.append(f"fitness   {before:.3f} before, {after:.3f} after ({what})")
    if gain:
        lines.append(
            f"judged    {gain:+.3f} on the half that each of two searches had not seen ({what})"
        )
    if record.get("heldout_reward_before") is not None:
        low, high = record["heldout_reward_gain_ci95"]
        lines.append(
            f"held out  {record['heldout_reward_before']:.3f} before, "
            f"{record['heldout_reward_after']:.3f} after, 95% interval of the gain "
            f"[{low:+.3f}, {high:+.3f}] (mean reward)"
        )
    if "heldout_accuracy_before" in record:
        low, high = record["heldout_accuracy_gain_ci95"]
        lines.append(
            f"held out  {record['heldout_accuracy_before']:.1%} right before, "
            f"{record['heldout_accuracy_after']:.1%} after, 95% interval of the gain "
            f"[{low:+.1%}, {high:+.1%}] (greedy decoding)"
        )
    if "heldout_before" in record:
        lines.append(
            f"held out  {record['heldout_before']:.3f} before, {record['heldout_after']:.3f} after "
            f"({measured('nats/token')})"
        )
    return [
        *lines,
        f"search    {record['generations']} generations, {record['candidates']} candidates in "
        f"{record['seconds']:.2f} s, and {record['compile_seconds']:.1f} s to compile"
        + (", converged" if record["converged"] else ""),
        f"result    {verdict}",
    ]


def adapted_many(summary: dict[str, Any]) -> str:
    """The searches of several prompts together, from ``summary`` of the command's JSON."""
    mean = summary["mean_gain"]
    gain = "" if mean is None else f", mean gain {mean:+.3f} ({measured(summary['fitness_unit'])})"
    return (
        f"\nin all    {summary['adapted']} of {summary['prompts']} prompts adapted{gain}, "
        f"{summary['changed']} completions changed; {summary['seconds']:.1f} s of search and "
        f"{summary['compile_seconds']:.1f} s to compile"
    )


def adapted_card(run: TrainedRun, record: dict[str, Any]) -> str:
    """README.md of a folder that holds an adapted adapter."""
    before, after = record["fitness_before"], record["fitness_after"]
    change = ""
    if before is not None:
        what = measured(record["fitness_unit"])
        change = f"; {what}: {before:.3f} before, {after:.3f} after"
    return "\n".join(
        [
            f"# Adapter of {run.policy.pretrained.source}, adapted further",
            "",
            f"{adapters.num_params(run.policy.zero):,} {trained(run.config.adapter)}, found at "
            f"inference by grpocem_jax: {record['candidates']} candidates in "
            f"{record['generations']} generations{change}.",
            "",
        ]
    )
