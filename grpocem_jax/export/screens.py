"""What a person reads of an export: the first screen, what came of it, the card."""

from pathlib import Path
from typing import Any

from grpocem_jax.config import Config
from grpocem_jax.runs.screens import caveats, reward_tables, scales, setting
from grpocem_jax.runs.trained import TrainedRun


def exporting(run: TrainedRun, adapter: Path, *, lora: bool = False) -> str:
    """What is merged into what: shown before anything is compiled."""
    stop = () if lora else run.config.generation.stop
    several = [repr(text) for text in stop if len(run.policy.encode_completion(text)) != 1]
    return "\n".join(
        [
            *setting(run.config, run.policy),
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
            f"{scales(config, summary)}{trained}, {what}",
            "",
            *caveats(summary),
            code,
            "",
            *(reward_tables(config, summary) if own_adapter else [other, ""]),
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
