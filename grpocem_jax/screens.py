"""What a person reads: the first screen, completions on the way, the closing table, the card."""

import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from grpocem_jax import evaluation, rollouts
from grpocem_jax.adaptation import TrainedRun
from grpocem_jax.adapters import base as adapters
from grpocem_jax.config import AdapterConfig, Config
from grpocem_jax.policy import Policy
from grpocem_jax.search.base import describe
from grpocem_jax.terminal import encodable, in_notebook, messages, one_line, say, unread


class Progress:
    """Progress on stderr: a bar on a terminal, one of its own in a notebook; in a file a line at
    first, every half minute, and at last, without control characters."""

    interval_s = 30.0

    def __init__(self, total: int):
        shown = sys.stderr.isatty() or in_notebook()
        self._bar = tqdm(
            total=total, unit="step", dynamic_ncols=True, disable=not shown, file=messages()
        )
        self._total, self._shown = total, -math.inf
        self._first: tuple[int, float] | None = None

    def update(self, done: int, **values: str) -> None:
        """Shows that ``done`` steps are done, with some values by name."""
        with unread(sys.stderr):
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(done - self._bar.n)
        now = time.monotonic()
        # The time of the first update is mostly compilation, and says nothing of those to come.
        first, started = self._first = self._first or (done, now)
        if self._bar.disable and (now - self._shown >= self.interval_s or done == self._total):
            self._shown = now
            pairs = [f"{name} {value}" for name, value in values.items()]
            if first < done < self._total:
                left = (now - started) / (done - first) * (self._total - done)
                pairs.append(f"about {left:.0f} s left")
            say("  ".join([f"step {done}/{self._total}", *pairs]), sys.stderr)

    @staticmethod
    def write(text: str) -> None:
        """Writes text above the bar."""
        with unread(sys.stderr):
            tqdm.write(encodable(text, messages()), file=messages())

    def close(self) -> None:
        """Ends the line of the bar."""
        with unread(sys.stderr):
            self._bar.close()


def first(
    config: Config,
    policy: Policy,
    data_lines: Sequence[str],
    workdir: Path,
    logs: Sequence[str] = (),
) -> str:
    """What a training runs on what, with what: shown before anything is compiled."""
    return "\n".join(
        [
            *_setting(config, policy),
            *(f"data      {line}" for line in data_lines),
            f"step      {config.prompts_per_step} prompts x {config.grpo.group_size} completions",
            f"run       {workdir}",
            *(f"metrics   {log}" for log in logs),
        ]
    )


def adapting(run: TrainedRun, workdir: str) -> str:
    """What an adaptation runs on what: shown before anything is compiled."""
    cem = run.config.cem
    space = {"subspace": f"subspace of {cem.rank} directions", "full": "all offsets"}
    where = space.get(cem.space, f"weights of experts ({cem.experts})")
    how = describe(cem.search_method, cem.generations)
    gate = f"gate at {cem.gate_z:g} standard errors" if cem.gate else "no gate"
    budget = "" if cem.budget_s is None else f", at most {cem.budget_s:g} s"
    return "\n".join(
        [
            *_setting(run.config, run.policy),
            f"run       {workdir}",
            f"search    {how}{budget}, on the {cem.fitness}, in {where}, {gate}",
        ]
    )


def exporting(run: TrainedRun, adapter: Path, *, lora: bool = False) -> str:
    """What is merged into what: shown before anything is compiled."""
    stop = () if lora else run.config.generation.stop
    several = [repr(text) for text in stop if len(run.policy.encode_completion(text)) != 1]
    return "\n".join(
        [
            *_setting(run.config, run.policy),
            *(
                f"stop      {text} is several tokens and not in generation_config.json; "
                "pass it to generate as stop_strings"
                for text in several
            ),
            f"merging   {adapter}",
        ]
    )


def exported(result: Any) -> str:
    """What came of an export; ``result`` is an `export.Exported`."""
    lora = result.rank is not None
    if lora:
        how = f"rank {result.rank}, {result.kept:.2%} of the change of the weights"
    else:
        how = f"{result.dtype}; the adapter was merged in float32"
        how += " and the result rounded" if result.rounding else ""
    lines = [
        f"{'lora' if lora else 'weights':<10}{how}",
        f"logits    differ by at most {result.difference:.1e} from those of base model and adapter",
    ]
    if result.rounding:
        lines.append(f"          of which rounding to {result.dtype} makes {result.rounding:.1e}")
    if result.transformers_difference is not None:
        lines.append(
            f"          and by at most {result.transformers_difference:.1e} in transformers"
        )
    elif not lora:
        lines.append("          PyTorch is not installed: only grpocem_jax read the folder back")
    lines.append(f"          the adapter moves them by at most {result.effect:.1e}")
    if result.rounding > result.effect / 10:
        lines.append("          rounding is more than a tenth of that; --dtype=float32 has none")
    load = (
        f"PEFT loads it with AutoPeftModelForCausalLM.from_pretrained({str(result.folder)!r})"
        if lora
        else "transformers loads it with "
        f"AutoModelForCausalLM.from_pretrained({str(result.folder)!r})"
    )
    lines.append(f"exported  {result.folder}; {load}")
    return "\n".join(lines)


def unit(fitness: str) -> str:
    """The unit of what a search maximises, by ``cem.fitness``: a fitness of the user's own is named
    after itself."""
    return {"likelihood": "nats/token", "reward": "reward"}.get(fitness, fitness)


def _measured(of: str) -> str:
    """What numbers in a `unit` are, to stand behind them."""
    if of == "nats/token":
        return "log-likelihood, nats per token"
    return "mean reward" if of == "reward" else f"value of {of}"


def adapted(record: dict[str, Any], *, search: bool = True) -> str:
    """One adapted prompt: fitness and text before and after, each number with its unit.

    Args:
      record: as ``adapt.py --json`` prints it.
      search: whether the search is described; else only the prompt and its completions, as of a
        further prompt after one search for all.
    """
    lines = ["", *(_found(record) if search else [])]
    if record["prompt"]:
        lines.append(f"prompt    {one_line(record['prompt'])}")
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
    what, gain, lines = _measured(record["fitness_unit"]), record["held_back_gain"], []
    before, after = record["fitness_before"], record["fitness_after"]
    if before is not None:
        lines.append(f"fitness   {before:.3f} before, {after:.3f} after ({what})")
    if gain:
        lines.append(f"held back {gain:+.3f} on the part that judged the search ({what})")
    if record.get("heldout_reward_before") is not None:
        low, high = record["heldout_reward_gain_ci95"]
        lines.append(
            f"held out  {record['heldout_reward_before']:.3f} before, "
            f"{record['heldout_reward_after']:.3f} after, 95% interval of the gain "
            f"[{low:+.3f}, {high:+.3f}] (mean reward)"
        )
    if "heldout_before" in record:
        lines.append(
            f"held out  {record['heldout_before']:.3f} before, {record['heldout_after']:.3f} after "
            f"({_measured('nats/token')})"
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
    gain = "" if mean is None else f", mean gain {mean:+.3f} ({_measured(summary['fitness_unit'])})"
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
        what = _measured(record["fitness_unit"])
        change = f"; {what}: {before:.3f} before, {after:.3f} after"
    return "\n".join(
        [
            f"# Adapter of {run.policy.pretrained.source}, adapted further",
            "",
            f"{adapters.num_params(run.policy.zero):,} {_trained(run.config.adapter)}, found at "
            f"inference by grpocem_jax: {record['candidates']} candidates in "
            f"{record['generations']} generations{change}.",
            "",
        ]
    )


def _setting(config: Config, policy: Policy) -> list[str]:
    pretrained, trainable = policy.pretrained, adapters.num_params(policy.zero)
    total = pretrained.num_params()
    device, used, there = jax.devices()[0], policy.num_devices, jax.device_count()
    count = f"{used} of {there} x " if used < there else f"{used} x " if used > 1 else ""
    source = {
        "builtin": "the built-in tiny model",
        "random": f"{pretrained.source}: RANDOM WEIGHTS, for plumbing and benchmarks only",
        "folder": f"folder {pretrained.source}",
        "hub": f"{pretrained.source} from the Hub",
    }[pretrained.kind]
    return [
        f"device    {count}{device.platform} ({device.device_kind}), {config.model.dtype}",
        f"model     {source}, {total:,} parameters, frozen",
        f"adapter   {trainable:,} {_trained(config.adapter)} ({100 * trainable / total:.3f}%)",
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
        f"{adapt} --workdir {run} --evaluate --config.cem.support=8",
        f"{export} --workdir {run} --out {shlex.quote(str(workdir / 'exported'))}",
    ]


def installed(name: str) -> str:
    """A command of the package as the shell finds it: by name, or by its path where the environment
    that runs now is not the active one."""
    found, own = shutil.which(name), Path(sys.executable).with_name(name)
    if not own.is_file() or (found is not None and Path(found) == own):
        return name
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))


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
            f"{_scales(config, summary)}, trained with GRPO for {summary['steps']} steps by "
            "grpocem_jax. `adapter_model.safetensors` holds the offsets of each site; zeros "
            "are the base model. `adapter_config.json` has a hash of the base model's weights: "
            "grpocem_jax refuses the adapter on others.",
            "",
            *_caveats(summary),
            *_reward_tables(config, summary),
        ]
    )


def best_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of the folder that holds the adapter of the best checkpoint."""
    best = summary["best_adapter"]
    return "\n".join(
        [
            f"# Adapter of {summary['model']}, the best of its checkpoints",
            "",
            f"{_scales(config, summary)}, trained with GRPO by grpocem_jax: the checkpoint after "
            f"step {best['step']} of {summary['steps']}, whose reward on the validation prompts, "
            f"{best['eval_reward']:.3f}, was the largest. As the largest of several it is too high "
            "an estimate, and held-out reward was measured for the last adapter only.",
            "",
            *_caveats(summary),
        ]
    )


def exported_card(
    config: Config,
    summary: dict[str, Any],
    *,
    metadata: str,
    own_adapter: bool,
    base: str | None,
) -> str:
    """The beginning of README.md of an exported model, to which `measured` is added.

    Args:
      config: the run's.
      summary: the contents of its summary.json.
      metadata: the Hub's YAML.
      own_adapter: whether the adapter is the one that the run ended with, whose held-out reward the
        summary has.
      base: of a LoRA, Hub id or folder of the base model; None for a merged model.
    """
    trained = f", trained with GRPO for {summary['steps']} steps" if own_adapter else ""
    other = (
        "The adapter is not the one that a training ended with, so no held-out reward was measured "
        "for it here" + ("." if base else "; `adapter/README.md` says where it is from.")
    )
    if base is None:
        title, what = "with a merged adapter", "merged into its weights in float32 by grpocem_jax."
        code = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`adapter/` holds the scales by themselves, for `grpocem_jax.load_adapter`."""
    else:
        title, what = "as a LoRA", "written as a LoRA by grpocem_jax."
        code = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, FOLDER)
tokenizer = AutoTokenizer.from_pretrained({base!r})
```"""
    return "\n".join(
        [
            f"---\n{metadata}\n---",
            "",
            f"# {summary['model']} {title}",
            "",
            f"{_scales(config, summary)}{trained}, {what}",
            "",
            *_caveats(summary),
            code,
            "",
            *(_reward_tables(config, summary) if own_adapter else [other, ""]),
        ]
    )


def measured(result: Any) -> str:
    """The end of README.md of an exported model; ``result`` is an `export.Exported`."""
    what = (
        f"The weights are stored in {result.dtype}."
        if result.rank is None
        else f"The LoRA has rank {result.rank} and holds {result.kept:.2%} of the change of the "
        "weights (Frobenius norm)."
    )
    rounding = (
        f", of which rounding to {result.dtype} makes {result.rounding:.2g}"
        if result.rounding
        else ""
    )
    return (
        f"{what} On arbitrary tokens its logits differ by at most {result.difference:.2g} from "
        f"those of base model and adapter{rounding}; the adapter itself moves them by at most "
        f"{result.effect:.2g}.\n"
    )


def _scales(config: Config, summary: dict[str, Any]) -> str:
    return f"{summary['trainable_parameters']:,} {_trained(config.adapter)} of {summary['model']}"


def _trained(settings: AdapterConfig) -> str:
    """What the trained numbers are."""
    what = "scales of singular values" if settings.type == "svf" else f"numbers of {settings.type}"
    return f"{what} ({', '.join(settings.sites)})"


def _caveats(summary: dict[str, Any]) -> list[str]:
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


def _reward_tables(config: Config, summary: dict[str, Any]) -> list[str]:
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
    return lines


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
