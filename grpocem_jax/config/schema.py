"""The settings of a run, one record a section: each field with its type, range, default, meaning.

The sections of a search method are the method's own records (`CEM`, `GradientAscent`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpocem_jax.adapters import ADAPTERS
from grpocem_jax.grpo import AGGREGATIONS, SUPERVISIONS, variants
from grpocem_jax.search import CEM, FOLLOWED, METHODS, GradientAscent
from grpocem_jax.tasks import SourceConfig, Task, make_task
from grpocem_jax.utils.settings import (
    NAMES,
    NOT_EMPTY,
    Range,
    above,
    ascending,
    at_least,
    count,
    distinct,
    one_of,
    one_of_or_function,
    options,
    setting,
    share,
    within,
)

LARGEST = 2**31 - 1
"""Of whole numbers: what 32 bits hold."""

TINIEST, HUGEST = 1.2e-38, 3.4e38
"""Of other numbers but zero, without their sign: what float32 holds."""

DTYPES = ("float32", "bfloat16", "float16")
TRACKERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    source: str = setting(
        "Hub id, local folder, GGUF file, `builtin`, `smollm2` from the package index, or "
        "`random:SHAPE` for random weights.",
        NOT_EMPTY,
        default="openai-community/gpt2",
        alters="nothing",
    )
    dtype: str = setting(
        "Type of matrices and of the operands of products; sums, norms, softmax and the adapter "
        "stay float32. `auto`: the one in which the device multiplies fastest.",
        one_of("auto", *DTYPES),
        default="float32",
    )
    weight_shards: int = setting(
        "Devices of a process that hold the weights together, each a part of every matrix, where "
        "one has no room for them; they compute the same prompts and candidates together. Must "
        "divide the number of devices.",
        at_least(1),
        default=1,
        alters="nothing",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained."""

    type: str = setting(
        "`svf`: scales of singular values; `lora`: a change of low rank; a method of "
        "docs/methods.md; or `package.module:function`, a function of the user's own that returns "
        "an `Adapter`.",
        one_of_or_function(*ADAPTERS),
        default="svf",
    )
    options: Mapping[str, Any] = options(
        "Keywords of the adapter, but for `svf`, whose settings follow."
    )
    sites: tuple[str, ...] = setting(
        "Linear maps to adapt, in every layer.", NAMES, default=("attn.c_proj",)
    )
    rank_ratio: float = setting(
        "`svf`: share of each site's singular values that is trained.", share(), default=0.8
    )
    tail: str = setting(
        "`svf`: `keep` the other singular values, or `drop` them as the report's eq. 10 does.",
        one_of("keep", "drop"),
        default="keep",
    )
    min_singular_value: float = setting(
        "`svf`: smaller singular values are never trained.", at_least(0), default=1e-5
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tasks and where their examples come from."""

    tasks: tuple[str, ...] = setting(
        "Tasks to train on, mixed evenly.",
        NAMES,
        default=("qa", "sentiment", "summarization", "classification", "general"),
    )
    max_samples: int = setting("Most training examples of a task.", at_least(1), default=500)
    heldout_samples: int = setting("Most held-out examples of a task.", at_least(2), default=100)
    validation_samples: int = setting(
        "Most examples of a task, of its held-out split and beside the held-out ones, by whose "
        "reward `train.evaluate_every_steps` compares checkpoints.",
        at_least(1),
        default=20,
    )
    max_prompt_tokens: int = setting(
        "Longest prompt; longer ones are shortened or dropped, and counted.",
        at_least(1),
        default=192,
    )
    chat: bool = setting(
        "Prompts are messages of the user, written by the tokenizer's chat template up to where "
        "the answer begins; for models that were trained to chat. Prompts that are lists of "
        "messages are written so in any case.",
        default=False,
    )
    system: str = setting(
        "The system's message at the beginning of a chat; empty for what the template has.",
        default="",
    )
    bad_lines: str = setting(
        "What to do with a row that cannot be used, such as a line that is not JSON or a label "
        "that is none: `error` ends the run, `skip` counts such rows and passes them over. Both "
        "show the first.",
        one_of("error", "skip"),
        default="error",
    )
    reward_timeout_s: float = setting(
        "Seconds that one call of a reward function may take; 0 for any time.",
        at_least(0),
        default=600.0,
        alters="nothing",
    )
    reward_retries: int = setting(
        "How often a reward function that raises, takes too long or returns too few values is "
        "called again, after 1, 2, 4, ... seconds, at most a minute.",
        at_least(0),
        default=0,
        alters="nothing",
    )
    reward_on_error: str = setting(
        "What to do where it still fails, and with a value that is no reward: `stop` ends the run, "
        "which the same command continues; `abstain` leaves the completions without this reward, "
        "counted in `reward_errors`.",
        one_of("stop", "abstain"),
        default="stop",
        alters="nothing",
    )
    find_failing_completion: bool = setting(
        "Call a reward function that raised again for each completion by itself, to name the one "
        "that it raises on.",
        default=False,
        alters="nothing",
    )
    sources: Mapping[str, SourceConfig] = setting(
        "The source of each task's examples.", default_factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling of completions, in training and in evaluation."""

    max_new_tokens: int = setting("Longest completion.", at_least(1), default=64)
    temperature: float = setting(
        "At the start of training, and in evaluation.", above(0), default=1.0
    )
    final_temperature: float = setting(
        "At the end of training; linear between.", above(0), default=1.0
    )
    top_p: float = setting("Nucleus mass.", share(), default=1.0)
    top_k: int = setting(
        "Most probable tokens that are drawn from; 0 for all.", at_least(0), default=0
    )
    min_p: float = setting(
        "Smallest probability of a token that is drawn, as a share of the most probable token's; 0 "
        "for any.",
        within(0, 1),
        default=0.0,
    )
    repetition_penalty: float = setting("1 is none.", at_least(1), default=1.0)
    stop: tuple[str, ...] = setting(
        "Strings that end a completion wherever they appear in its text, beside the end-of-text "
        "token; they are no part of it.",
        default=(),
    )
    keep_special_tokens: bool = setting(
        "Completions keep special tokens such as `<think>`, but for the one that ends them; else "
        "those are cut out.",
        default=True,
    )
    prompt_buckets: tuple[int, ...] = setting(
        "Lengths to which prompts are padded; each is a compiled program. Longer prompts are "
        "padded to data.max_prompt_tokens.",
        ascending(1),
        default=(64, 128),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """The policy gradient."""

    group_size: int = setting("Completions of each prompt.", at_least(2), default=8)
    dynamic_sampling: int = setting(
        "Groups drawn for each one trained on; those whose rewards differ are taken first, as in "
        "DAPO.",
        at_least(1),
        default=1,
    )
    updates: int = setting(
        "Updates on the completions of a step; the ratio of the later ones is not 1.",
        at_least(1),
        default=1,
    )
    supervision: str = setting(
        "`outcome`: one reward a completion; `process`: a reward a step, where the task has one.",
        one_of(*SUPERVISIONS),
        default="outcome",
    )
    shaping: str = setting(
        "Changes rewards before they become advantages: a method of docs/methods.md, `none`, or "
        "`package.module:function`.",
        one_of_or_function("none", *variants.SHAPINGS),
        default="none",
    )
    shaping_options: Mapping[str, Any] = options("Keywords of the shaping.")
    advantages: str = setting(
        "`group`: normalised in the group (eq. 3); `scaled`: then scaled and clipped (eq. 7); a "
        "method of docs/methods.md; or `package.module:function`, a function of the user's own "
        "(docs/extending.md).",
        one_of_or_function("group", "scaled", *variants.ADVANTAGES),
        default="group",
    )
    advantages_options: Mapping[str, Any] = options(
        "Keywords of the advantages, such as `scale` and `clip` of `scaled`."
    )
    reward_scale: float = setting("Factor of `scaled` advantages.", above(0), default=0.1)
    reward_clip: float = setting("Bound of `scaled` advantages.", above(0), default=3.0)
    objective: str = setting(
        "`clipped`: the clipped policy ratio (eq. 1); a method of docs/methods.md; or "
        "`package.module:function`.",
        one_of_or_function("clipped", *variants.OBJECTIVES),
        default="clipped",
    )
    objective_options: Mapping[str, Any] = options(
        "Keywords of the objective: `low`, `high` (`grpo.clip` both) and `ratio` (`token` or "
        "`sequence`) of `clipped`, or those of a function."
    )
    clip: float = setting("Range of the policy ratio around 1.", above(0), default=0.2)
    beta: float = setting(
        "Weight of the KL divergence from the base model.", at_least(0), default=0.01
    )
    entropy: float = setting("Weight of the entropy bonus.", at_least(0), default=0.0)
    weights: str = setting(
        "How token losses add up: `sequence` (eq. 1), `token` or `constant`; a method of "
        "docs/methods.md; or `package.module:function`, which also says which tokens are trained.",
        one_of_or_function(*AGGREGATIONS, *variants.WEIGHTS),
        default="sequence",
    )
    weights_options: Mapping[str, Any] = options("Keywords of what makes the weights.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer and the course of a run."""

    epochs: int = setting(
        "Passes over the training examples.", at_least(1), default=1, alters="length"
    )
    max_steps: int = setting(
        "Optimizer steps at most; 0 for no bound.", at_least(0), default=0, alters="length"
    )
    batch_size: int = setting(
        "Completions processed at once (the micro-batch).", at_least(2), default=16
    )
    accumulation_steps: int = setting("Micro-batches in an optimizer step.", at_least(1), default=4)
    optimizer: str = setting(
        "`adamw`; a method of docs/methods.md; or `package.module:function` of a learning rate, "
        "such as `optax:lion`.",
        one_of_or_function("adamw", *variants.OPTIMIZERS),
        default="adamw",
    )
    optimizer_options: Mapping[str, Any] = options(
        "Keywords of the optimizer: `b1`, `b2`, `eps` of `adamw`, or those of a function."
    )
    learning_rate: float = setting("Peak learning rate.", above(0), default=1e-2)
    warmup_steps: int = setting(
        "Updates of linear warmup; a step makes `grpo.updates` of them.", at_least(0), default=10
    )
    final_lr_scale: float = setting(
        "Factor of the learning rate at the last step; linear after the warmup.",
        within(0, 1),
        default=1.0,
    )
    weight_decay: float = setting(
        "`adamw`: pull of the offsets to zero, the base model.", at_least(0), default=0.01
    )
    max_grad_norm: float = setting(
        "Global norm to which gradients are clipped.", above(0), default=0.5
    )
    target_kl: float = setting(
        "The learning rate follows the measured KL toward this value; 0 keeps it fixed.",
        at_least(0),
        default=0.0,
    )
    lr_scale_range: tuple[float, ...] = setting(
        "Smallest and largest factor of the adaptive learning rate.",
        Range("two numbers above 0, ascending", lambda x: len(x) == 2 and 0 < x[0] <= 1 <= x[1]),
        default=(0.1, 10.0),
    )
    save_interval: int = setting(
        "Epochs between checkpoints; the last step has one.",
        at_least(1),
        default=1,
        alters="nothing",
    )
    checkpoint_every_steps: int = setting(
        "Steps between checkpoints, besides those at the ends of epochs; 0 for none.",
        at_least(0),
        default=0,
        alters="nothing",
    )
    checkpoint_every_minutes: float = setting(
        "Minutes after which a checkpoint is written; 0 for none.",
        at_least(0),
        default=0.0,
        alters="nothing",
    )
    keep_checkpoints: int = setting(
        "Checkpoints kept, the last ones; 0 for all.", at_least(0), default=3, alters="nothing"
    )
    evaluate_every_steps: int = setting(
        "Steps between evaluations on `data.validation_samples`, each at a checkpoint; the best of "
        "them is kept too. 0 for none.",
        at_least(0),
        default=0,
    )
    fit_memory: bool = setting(
        "Where device memory runs out in an update, halve the micro-batch and try again: the same "
        "result up to rounding.",
        default=False,
        alters="nothing",
    )
    max_skipped_updates: int = setting(
        "Updates in a row that may be skipped because loss or gradient is not finite; then the run "
        "stops.",
        at_least(0),
        default=5,
    )
    eval_batch_size: int = setting(
        "Prompts evaluated at once.", at_least(1), default=16, alters="nothing"
    )
    eval_samples: int = setting("Completions drawn per held-out prompt.", count(1), default=1)
    staleness: int = setting(
        "Steps by which the adapter that completes a step's prompts is behind the one that is "
        "updated, 0 or 1; the objective's ratio makes up for it (docs/clusters.md).",
        within(0, 1),
        default=0,
    )
    rollout_processes: int = setting(
        "How many of several processes complete and judge the prompts of the next step while the "
        "others update; with `train.staleness=1`. 0: all do both.",
        at_least(0),
        default=0,
        alters="nothing",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Adaptation at inference: what is searched for, where, how, and how the result is judged."""

    method: str = setting(
        "`cem`: the Cross-Entropy Method; `gradient`: Adam, where the fitness is differentiable; "
        "a method of docs/methods.md; `evosax:NAME`: a strategy of evosax; or "
        "`package.module:function`, a function of the user's own that returns a search method "
        "(docs/extending.md).",
        one_of_or_function("cem", "gradient", *METHODS, "evosax:NAME"),
        default="cem",
    )
    options: Mapping[str, Any] = options(
        "Settings of a method without a section of its own, or keywords for a function of the "
        "user's own."
    )
    fitness: str = setting(
        "`likelihood` of the prompt or of the examples; `reward` of completions of the prompts; or "
        "`package.module:function`, a fitness of the user's own (docs/extending.md).",
        one_of_or_function("likelihood", "reward"),
        default="likelihood",
    )
    task: str = setting(
        "The task whose columns the rows of `--examples` and `--heldout` have and whose reward "
        "judges completions where the fitness is `reward`.",
        default="",
    )
    support: int = setting(
        "Training examples of a task that `adapt.py --evaluate` adapts to; 0: every held-out "
        "prompt by itself.",
        at_least(0),
        default=0,
    )
    samples: int = setting(
        "Completions of each prompt by each candidate; the gate draws 8 times as many.",
        count(1),
        default=1,
    )
    space: str = setting(
        "`full`: every offset; `subspace`: principal directions of the experts and their training; "
        "`experts`: weights of the experts.",
        one_of("full", "subspace", "experts"),
        default="full",
    )
    experts: str = setting(
        "Folder of the expert library, or `builtin`; empty where none is needed.", default=""
    )
    rank: int = setting("Dimensions of `subspace`.", at_least(1), default=32)
    per_site: bool = setting("Experts have a weight at every site, not one for all.", default=False)
    generations: int = setting(
        "Generations, or steps of the gradient, at most.", count(1), default=50
    )
    returned: str = setting(
        "Which point: `mean` or `best` ever seen.", one_of(*FOLLOWED), default="mean"
    )
    gate: bool = setting(
        "Search by each half of the texts, and by all of them if what was found is better on the "
        "other half; if not, return the start.",
        default=True,
    )
    gate_z: float = setting("Standard errors by which it must be better.", at_least(0), default=2.0)
    budget_s: float | None = setting(
        "Seconds for the search, or None for no bound.", above(0), default=None
    )
    population_chunk: int = setting(
        "Candidates scored at a time; 0 for as many as run fastest on the device, of a likelihood, "
        "and for all of them, of a reward.",
        at_least(0),
        default=0,
    )
    fit_memory: bool = setting(
        "Where device memory runs out, halve `population_chunk` and try again: the same result up "
        "to rounding.",
        default=False,
    )
    buckets: tuple[int, ...] = setting(
        "Lengths to which texts are padded, without what several begin with alike; each is a "
        "compiled program, and the last is the limit.",
        ascending(2),
        default=(16, 32, 64, 128, 256, 512, 1024),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run shows, and where."""

    interval: int = setting("Steps between shown and stored completions.", at_least(1), default=10)
    report_to: tuple[str, ...] = setting(
        "Where metrics go beside metrics.jsonl: any of `tensorboard` and `wandb`.",
        distinct(*TRACKERS),
        default=(),
    )
    project: str = setting(
        "Project at Weights & Biases.", NOT_EMPTY, default="enhanced-grpo-cem-gpt2"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; see the sections."""

    seed: int = setting(
        "Fixes data order, sampling and initialisation.", within(0, LARGEST), default=0
    )
    model: ModelConfig = setting(default_factory=ModelConfig)
    adapter: AdapterConfig = setting(default_factory=AdapterConfig)
    data: DataConfig = setting(default_factory=DataConfig)
    generation: GenerationConfig = setting(default_factory=GenerationConfig)
    grpo: GRPOConfig = setting(default_factory=GRPOConfig)
    train: TrainConfig = setting(default_factory=TrainConfig)
    search: SearchConfig = setting(default_factory=SearchConfig, alters="nothing")
    cem: CEM = setting(default_factory=CEM, alters="nothing")
    gradient: GradientAscent = setting(default_factory=GradientAscent, alters="nothing")
    logging: LoggingConfig = setting(default_factory=LoggingConfig, alters="nothing")

    def task(self, name: str) -> Task:
        """The task of this name with the rewards and the template of its source."""
        task = make_task(name, self.data.sources.get(name, SourceConfig()))
        names = (
            "reward_timeout_s",
            "reward_retries",
            "reward_on_error",
            "find_failing_completion",
        )
        # An answer in a chat begins without the space that separates words.
        lead = "" if self.data.chat else task.lead
        settings = {name: getattr(self.data, name) for name in names}
        return dataclasses.replace(task, lead=lead, **settings)

    @property
    def prompts_per_step(self) -> int:
        """Prompts that an optimizer step trains on: its completions over the group size."""
        return self.train.batch_size * self.train.accumulation_steps // self.grpo.group_size

    @property
    def prompts_drawn_per_step(self) -> int:
        """Prompts that a step completes, to train on those whose rewards differ."""
        return self.prompts_per_step * self.grpo.dynamic_sampling


def altering(what: str) -> tuple[str, ...]:
    """Names with dots of the settings, or whole sections, whose `setting` alters ``what``."""
    found = []
    for section in dataclasses.fields(Config):
        inner = section.default_factory
        if section.metadata["alters"] == what:
            found.append(section.name)
        elif dataclasses.is_dataclass(inner):
            found += [
                f"{section.name}.{field.name}"
                for field in dataclasses.fields(inner)
                if field.metadata["alters"] == what
            ]
    return tuple(found)
