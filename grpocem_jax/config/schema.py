"""The settings of a run: every field with its type, range and meaning, and how they are checked.

Configs (configs/) are Python files that return an `ml_collections.ConfigDict`; `parse_config`
turns one into the frozen record that the workflows read, or says in one sentence what is wrong.
"""

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from grpocem_jax.grpo import AGGREGATIONS, SUPERVISIONS
from grpocem_jax.search import CEM, FOLLOWED, Evosax, GradientAscent, SearchMethod
from grpocem_jax.tasks import TASKS, SourceConfig, Task, make_task
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError

LARGEST = 2**31 - 1
"""Of whole numbers: what 32 bits hold."""

MOST = 100_000
"""Of candidates, completions and generations, for which memory is taken all at once."""

TINIEST, HUGEST = 1.2e-38, 3.4e38
"""Of other numbers but zero, without their sign: what float32 holds."""

DTYPES = ("float32", "bfloat16", "float16")
TRACKERS = ("tensorboard", "wandb")

RENAMED = {"grpo.advantage": "grpo.advantages", "grpo.aggregation": "grpo.weights"}
"""Fields by their former names."""


def rename(name: str) -> str:
    """What to say of a field's former name."""
    return f"is called {RENAMED[name]} now, with the same values; rename it."


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, under the names that this one has.

    Args:
      settings: as config.json has them.
    """
    settings = dict(settings)
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(settings.get(section), Mapping) and name in settings[section]:
            fields = dict(settings[section])
            fields.setdefault(new.split(".")[1], fields.pop(name))
            settings[section] = fields
    return settings


class _Range(typing.NamedTuple):
    text: str
    holds: Callable[[Any], bool]


def _above(low: float) -> _Range:
    return _Range(f"above {low}", lambda x: x > low)


def _at_least(low: float) -> _Range:
    return _Range(f"at least {low}", lambda x: x >= low)


def _within(low: float, high: float) -> _Range:
    return _Range(f"from {low} to {high}", lambda x: low <= x <= high)


def _count(low: int) -> _Range:
    return _Range(f"at least {low} and at most {MOST}", lambda x: low <= x <= MOST)


def _share() -> _Range:
    return _Range("above 0 and at most 1", lambda x: 0 < x <= 1)


def _one_of(*values: Any) -> _Range:
    return _Range(f"one of {', '.join(map(repr, values))}", lambda x: x in values)


def _one_of_or_function(*values: str) -> _Range:
    return _Range(
        f"one of {', '.join(map(repr, values))}, or package.module:function",
        lambda x: x in values or user_code.is_reference(x),
    )


def _ascending(low: int) -> _Range:
    return _Range(
        f"at least one number, each at least {low}, ascending",
        lambda x: len(x) > 0 and x[0] >= low and list(x) == sorted(set(x)),
    )


def _distinct(*values: str) -> _Range:
    return _Range(
        f"some of {', '.join(map(repr, values))}, each once",
        lambda x: set(x) <= set(values) and len(set(x)) == len(x),
    )


_NOT_EMPTY = _Range("not empty", lambda x: len(x) > 0)
_NAMES = _Range("not empty, each name once", lambda x: 0 < len(set(x)) == len(x))


def _field(doc: str, allowed: _Range | None = None, *, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(metadata={"doc": doc, "range": allowed}, default=default)


def _options(doc: str, **default: Any) -> Any:
    """A field with keywords for a function."""
    return dataclasses.field(metadata={"doc": doc, "range": None}, hash=False, **default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    source: str = _field(
        "Hub id, local folder, `builtin`, or `random:SHAPE` for random weights.", _NOT_EMPTY
    )
    dtype: str = _field(
        "Type of matrices and of the operands of products; sums, norms, softmax and the adapter "
        "stay float32.",
        _one_of(*DTYPES),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained."""

    type: str = _field(
        "`svf`: scales of singular values; or `package.module:function`, a function of the user's "
        "own that returns an `Adapter`.",
        _one_of_or_function("svf"),
    )
    options: Mapping[str, Any] = _options("Keywords for a function of the user's own.")
    sites: tuple[str, ...] = _field("Linear maps to adapt, in every layer.", _NAMES)
    rank_ratio: float = _field(
        "`svf`: share of each site's singular values that is trained.", _share()
    )
    tail: str = _field(
        "`svf`: `keep` the other singular values, or `drop` them as the report's eq. 10 does.",
        _one_of("keep", "drop"),
    )
    min_singular_value: float = _field(
        "`svf`: smaller singular values are never trained.", _at_least(0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tasks and where their examples come from."""

    tasks: tuple[str, ...] = _field("Tasks to train on, mixed evenly.", _NAMES)
    max_samples: int = _field("Most training examples of a task.", _at_least(1))
    heldout_samples: int = _field("Most held-out examples of a task.", _at_least(2))
    validation_samples: int = _field(
        "Most examples of a task, of its held-out split and beside the held-out ones, by whose "
        "reward `train.evaluate_every_steps` compares checkpoints.",
        _at_least(1),
    )
    max_prompt_tokens: int = _field(
        "Longest prompt; longer ones are shortened or dropped, and counted.", _at_least(1)
    )
    bad_lines: str = _field(
        "What comes of a row that cannot be used, such as a line that is not JSON or a label that "
        "is none: `error` ends the run, `skip` counts such rows and passes them over. Both show "
        "the first.",
        _one_of("error", "skip"),
    )
    reward_timeout_s: float = _field(
        "Seconds that one call of a reward function may take; 0 for any time.", _at_least(0)
    )
    reward_retries: int = _field(
        "How often a reward function that raises, takes too long or returns too few values is "
        "called again, after 1, 2, 4, ... seconds, at most a minute.",
        _at_least(0),
        default=0,
    )
    reward_on_error: str = _field(
        "What then comes of it, and of a value that is no reward: `stop` ends the run, which the "
        "same command continues; `abstain` leaves the completions without this reward, counted in "
        "`reward_errors`.",
        _one_of("stop", "abstain"),
        default="stop",
    )
    find_failing_completion: bool = _field(
        "Call a reward function that raised again for each completion by itself, to name the one "
        "that it raises on.",
        default=False,
    )
    sources: Mapping[str, SourceConfig] = _field("The source of each task's examples.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling of completions, in training and in evaluation."""

    max_new_tokens: int = _field("Longest completion.", _at_least(1))
    temperature: float = _field("At the start of training, and in evaluation.", _above(0))
    final_temperature: float = _field("At the end of training; linear between.", _above(0))
    top_p: float = _field("Nucleus mass.", _share())
    top_k: int = _field(
        "Most probable tokens that are drawn from; 0 for all.", _at_least(0), default=0
    )
    min_p: float = _field(
        "Smallest probability of a token that is drawn, as a share of the most probable token's; 0 "
        "for any.",
        _within(0, 1),
        default=0.0,
    )
    repetition_penalty: float = _field("1 is none.", _at_least(1))
    stop: tuple[str, ...] = _field(
        "Strings that end a completion wherever they appear in its text, beside the end-of-text "
        "token; they are no part of it."
    )
    keep_special_tokens: bool = _field(
        "Completions keep special tokens such as `<think>`, but for the one that ends them; else "
        "those are cut out.",
        default=True,
    )
    prompt_buckets: tuple[int, ...] = _field(
        "Lengths to which prompts are padded; each is a compiled program. Longer prompts are "
        "padded to data.max_prompt_tokens.",
        _ascending(1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """The policy gradient."""

    group_size: int = _field("Completions of each prompt.", _at_least(2))
    supervision: str = _field(
        "`outcome`: one reward a completion; `process`: a reward a step, where the task has one.",
        _one_of(*SUPERVISIONS),
    )
    advantages: str = _field(
        "`group`: normalised in the group (eq. 3); `scaled`: then scaled and clipped (eq. 7); or "
        "`package.module:function`, a function of the user's own (docs/extending.md).",
        _one_of_or_function("group", "scaled"),
    )
    advantages_options: Mapping[str, Any] = _options(
        "Keywords of the advantages: `scale` and `clip` of `scaled`, or those of a function.",
        default_factory=dict,
    )
    reward_scale: float = _field("Factor of `scaled` advantages.", _above(0))
    reward_clip: float = _field("Bound of `scaled` advantages.", _above(0))
    objective: str = _field(
        "`clipped`: the clipped policy ratio (eq. 1); or `package.module:function`.",
        _one_of_or_function("clipped"),
        default="clipped",
    )
    objective_options: Mapping[str, Any] = _options(
        "Keywords of the objective: `low`, `high` (`grpo.clip` both) and `ratio` (`token` or "
        "`sequence`) of `clipped`, or those of a function.",
        default_factory=dict,
    )
    clip: float = _field("Range of the policy ratio around 1.", _above(0))
    beta: float = _field("Weight of the KL divergence from the base model.", _at_least(0))
    entropy: float = _field("Weight of the entropy bonus.", _at_least(0))
    weights: str = _field(
        "How token losses add up: `sequence` (eq. 1), `token` or `constant`; or "
        "`package.module:function`, which also says which tokens are trained.",
        _one_of_or_function(*AGGREGATIONS),
    )
    weights_options: Mapping[str, Any] = _options(
        "Keywords of a function that makes the weights.", default_factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer and the course of a run."""

    epochs: int = _field("Passes over the training examples.", _at_least(1))
    max_steps: int = _field("Optimizer steps at most; 0 for no bound.", _at_least(0))
    batch_size: int = _field("Completions processed at once (the micro-batch).", _at_least(2))
    accumulation_steps: int = _field("Micro-batches in an optimizer step.", _at_least(1))
    optimizer: str = _field(
        "`adamw`; or `package.module:function` of a learning rate, such as `optax:lion`.",
        _one_of_or_function("adamw"),
        default="adamw",
    )
    optimizer_options: Mapping[str, Any] = _options(
        "Keywords of the optimizer: `b1`, `b2`, `eps` of `adamw`, or those of a function.",
        default_factory=dict,
    )
    learning_rate: float = _field("Peak learning rate.", _above(0))
    warmup_steps: int = _field("Steps of linear warmup.", _at_least(0))
    weight_decay: float = _field(
        "`adamw`: pull of the offsets to zero, the base model.", _at_least(0)
    )
    max_grad_norm: float = _field("Global norm to which gradients are clipped.", _above(0))
    target_kl: float = _field(
        "The learning rate follows the measured KL toward this value; 0 keeps it fixed.",
        _at_least(0),
    )
    lr_scale_range: tuple[float, ...] = _field(
        "Smallest and largest factor of the adaptive learning rate.",
        _Range("two numbers above 0, ascending", lambda x: len(x) == 2 and 0 < x[0] <= 1 <= x[1]),
    )
    save_interval: int = _field("Epochs between checkpoints; the last step has one.", _at_least(1))
    checkpoint_every_steps: int = _field(
        "Checkpoints between the ends of epochs; 0 for none.", _at_least(0)
    )
    checkpoint_every_minutes: float = _field(
        "A checkpoint where the last one is so old; 0 for none.", _at_least(0)
    )
    keep_checkpoints: int = _field("Checkpoints kept, the last ones; 0 for all.", _at_least(0))
    evaluate_every_steps: int = _field(
        "Steps between evaluations on `data.validation_samples`, each at a checkpoint; the best of "
        "them is kept too. 0 for none.",
        _at_least(0),
    )
    fit_memory: bool = _field(
        "Where device memory runs out in an update, halve the micro-batch and try again: the same "
        "result up to rounding."
    )
    max_skipped_updates: int = _field(
        "Updates in a row that may be skipped because loss or gradient is not finite; then the run "
        "stops.",
        _at_least(0),
    )
    eval_batch_size: int = _field("Prompts evaluated at once.", _at_least(1))
    eval_samples: int = _field("Completions drawn per held-out prompt.", _count(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEMConfig:
    """Adaptation at inference: what is searched for, where, how, and how the result is judged."""

    method: str = _field(
        "`cem`: the Cross-Entropy Method; `gradient`: Adam, where the fitness is differentiable; "
        "`evosax:NAME`: a strategy of evosax; or `package.module:function`, a function of the "
        "user's own that returns a search method (docs/extending.md).",
        _one_of_or_function("cem", "gradient", "evosax:NAME"),
    )
    options: Mapping[str, Any] = _options(
        "Settings of an `evosax` strategy, or keywords for a function of the user's own.",
        default_factory=dict,
    )
    fitness: str = _field(
        "`likelihood` of the prompt or of the examples; `reward` of completions of the prompts; or "
        "`package.module:function`, a fitness of the user's own (docs/extending.md).",
        _one_of_or_function("likelihood", "reward"),
    )
    task: str = _field(
        "Whose reward and columns those of `--examples` are, where the fitness is `reward`."
    )
    support: int = _field(
        "Training examples of a task that `adapt.py --evaluate` adapts to; 0: every held-out "
        "prompt by itself.",
        _at_least(0),
    )
    samples: int = _field(
        "Completions of each prompt by each candidate; the gate draws 8 times as many.",
        _count(1),
    )
    space: str = _field(
        "`full`: every offset; `subspace`: principal directions of the experts and their training; "
        "`experts`: weights of the experts.",
        _one_of("full", "subspace", "experts"),
    )
    experts: str = _field("Folder of the expert library, or `builtin`; empty where none is needed.")
    rank: int = _field("Dimensions of `subspace`.", _at_least(1))
    per_site: bool = _field("Experts have a weight at every site, not one for all.")
    population_size: int = _field("`cem`, `evosax`: candidates of a generation.", _count(2))
    elite_ratio: float = _field("`cem`: share of the candidates that are elites.", _share())
    noise_std: float = _field(
        "`cem`, `evosax`: standard deviation of the first generation.", _above(0)
    )
    generations: int = _field("Generations, or steps of the gradient, at most.", _count(1))
    threshold: float = _field("`cem`: converged when the mean moves by less.", _at_least(0))
    momentum: float = _field("`cem`: weight of the old mean.", _within(0, 1))
    std_momentum: float = _field("`cem`: weight of the old standard deviation.", _within(0, 1))
    min_std: float = _field("`cem`: the standard deviation falls no lower.", _at_least(0))
    learning_rate: float = _field("`gradient`: learning rate of Adam.", _above(0))
    returned: str = _field("Which point: `mean` or `best` ever seen.", _one_of(*FOLLOWED))
    gate: bool = _field(
        "Return the start unless another point is better on a part of the text that is held back."
    )
    gate_z: float = _field("Standard errors by which it must be better.", _at_least(0))
    held_back: float = _field("Share of the text that the gate holds back.", _within(0.05, 0.95))
    budget_s: float | None = _field("Seconds for the search, or None for no bound.", _above(0))
    population_chunk: int = _field(
        "Candidates scored at a time; 0 for as many as run fastest on the device, of a likelihood, "
        "and for all of them, of a reward.",
        _at_least(0),
    )
    fit_memory: bool = _field(
        "Where device memory runs out, halve `population_chunk` and try again: the same result up "
        "to rounding."
    )
    buckets: tuple[int, ...] = _field(
        "Lengths to which texts are padded, each a compiled program; the last is the limit.",
        _ascending(2),
    )

    @property
    def search_method(self) -> SearchMethod:
        """The search method; the same object for equal settings, so that programs are shared.

        Raises:
          InputError: settings that do not fit each other, a strategy that evosax lacks, or a
            function of the user's own that cannot be imported or fails.
        """
        with section("cem", CEMConfig):
            if self.method == "gradient":
                return GradientAscent(learning_rate=self.learning_rate)
            if self.method == "cem":
                names = [field.name for field in dataclasses.fields(CEM)]
                return CEM(**{name: getattr(self, name) for name in names})
            if self.method.startswith("evosax:"):
                return self._evosax
        return _own_method(self.method, json.dumps(dict(self.options), sort_keys=True))

    @property
    def _evosax(self) -> SearchMethod:
        try:
            return Evosax(
                name=self.method.removeprefix("evosax:"),
                population_size=self.population_size,
                noise_std=self.noise_std,
                options=self.options,
            )
        except InputError as error:
            # The name is part of another field here.
            name = self.method.removeprefix("evosax:")
            message = str(error).replace(f"name={name!r}", f"method={self.method!r}", 1)
            raise InputError(message) from error


@functools.lru_cache(maxsize=32)
def _own_method(name: str, options: str) -> Any:
    """The search method that a function of the user's own returns."""
    field = "config.cem.method"
    function = user_code.load_function(name, field=field)
    keywords = json.loads(options)
    try:
        return function(**keywords)
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(
            f"{field}={name!r} with options {keywords} raised {kind} "
            f"({message.splitlines()[0]}); it must return a search method "
            "(grpocem_jax.search.SearchMethod)."
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run shows, and where."""

    interval: int = _field("Steps between shown and stored completions.", _at_least(1))
    report_to: tuple[str, ...] = _field(
        "Where metrics go beside metrics.jsonl: any of `tensorboard` and `wandb`.",
        _distinct(*TRACKERS),
    )
    project: str = _field("Project at Weights & Biases.", _NOT_EMPTY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; see the sections."""

    seed: int = _field("Fixes data order, sampling and initialisation.", _within(0, LARGEST))
    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    generation: GenerationConfig
    grpo: GRPOConfig
    train: TrainConfig
    cem: CEMConfig
    logging: LoggingConfig

    def task(self, name: str) -> Task:
        """The task of this name with the rewards of its source."""
        task = make_task(name, self.data.sources.get(name, SourceConfig()))
        names = (
            "reward_timeout_s",
            "reward_retries",
            "reward_on_error",
            "find_failing_completion",
        )
        return dataclasses.replace(task, **{name: getattr(self.data, name) for name in names})

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimizer step: completions of a step over the group size."""
        return self.train.batch_size * self.train.accumulation_steps // self.grpo.group_size


def lay_defaults(
    config: ml_collections.ConfigDict, flags: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Adds to a config, in place, every field of the schema that it leaves out.

    ml_collections knows as flags the fields that are there, by the type of their values.  A field
    gets its default; where it has none, a placeholder of its type, which `parse_config` calls
    missing unless a flag gives it a value.  Sections of tasks get the fields of `SourceConfig`.
    Values of types that only stand for a field's own (a list for a tuple, an integer for a float,
    None) are made of that type.

    Args:
      config: what a config file returns.
      flags: what the command line gives, by names with dots.  Sections of tasks, columns and
        adapter options that only flags speak of are added too.
    """
    with config.unlocked():
        _lay(config, Config)
        data = config.data
        if not isinstance(data, ml_collections.ConfigDict):
            return
        names = [name.split(".") for name in flags]
        flagged = {name[1] for name in names if len(name) > 2 and name[0] == "data"}
        tasks = {*TASKS, *(data.tasks if isinstance(data.tasks, tuple) else ())}
        tasks |= set(re.findall(r"[\w-]+", flags.get("data.tasks", "")))
        for name in flagged & tasks - set(data):
            data[name] = ml_collections.ConfigDict()
        for name, section in data.items():
            if isinstance(section, ml_collections.ConfigDict) and (
                name in tasks or "rewards" in section
            ):
                _lay(section, SourceConfig)
        for *path, key in names:
            kind = _mapping(path)
            if kind is None:
                continue
            section = config
            for part in path:
                section = section.get(part) if isinstance(section, type(config)) else None
            if isinstance(section, ml_collections.ConfigDict) and key not in section:
                kind = object if kind is Any else kind
                section[key] = config_dict.FieldReference(None, field_type=kind)


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of a config that has every field of the schema, see `lay_defaults`."""
    config = ml_collections.ConfigDict(config.copy_and_resolve_references())
    lay_defaults(config)
    return config


def _lay(section: ml_collections.ConfigDict, kind: Any) -> None:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = field.name, hints[field.name]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint) or origin is collections.abc.Mapping:
            if args and dataclasses.is_dataclass(args[-1]):
                continue  # the sections of tasks
            if name not in section:
                section[name] = ml_collections.ConfigDict(_default(field) or {})
            if dataclasses.is_dataclass(hint) and isinstance(
                section[name], ml_collections.ConfigDict
            ):
                _lay(section[name], hint)
            continue
        plain = args[0] if origin is types.UnionType else origin or hint
        if name not in section:
            value = _default(field)
        elif section.get_type(name) is plain:
            continue
        else:
            value = section[name]
        if plain is tuple and isinstance(value, list):
            value = tuple(value)
        if plain is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        if value is None or type(value) is plain:
            with section.ignore_type():
                section[name] = config_dict.FieldReference(value, field_type=plain)


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _mapping(path: Sequence[str]) -> Any:
    """The type of the values of a section with free keys; None where the path is of another."""
    kind: Any = Config
    for name in path:
        if not dataclasses.is_dataclass(kind):
            return None
        hints = typing.get_type_hints(kind)
        kind = SourceConfig if kind is DataConfig and name not in hints else hints.get(name)
    is_mapping = typing.get_origin(kind) is collections.abc.Mapping
    return typing.get_args(kind)[1] if is_mapping else None


def parse_config(config: ml_collections.ConfigDict) -> Config:
    """Checks a config and returns it as a frozen record.

    Raises:
      InputError: the first field that is unknown, missing, of a wrong type or out of range, or two
        that do not fit each other.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"a config must be a ConfigDict of ml_collections, not {type(config).__name__}; make "
            "one with load_config, or with ConfigDict(...)."
        )
    parsed = _parse(config.to_dict(), Config, "")
    train, group = parsed.train, parsed.grpo.group_size
    if train.batch_size % group:
        raise InputError(
            f"grpo.group_size={group} does not divide train.batch_size={train.batch_size}: a "
            "micro-batch holds whole groups; make the batch size a multiple of the group size."
        )
    if train.target_kl and not parsed.grpo.beta:
        raise InputError(
            f"config.train.target_kl={train.target_kl} follows the KL divergence, which "
            "config.grpo.beta=0.0 leaves out; set one of them otherwise."
        )
    for field, options in {
        "adapter.options": parsed.adapter.options,
        "cem.options": parsed.cem.options,
        "grpo.advantages_options": parsed.grpo.advantages_options,
        "grpo.objective_options": parsed.grpo.objective_options,
        "grpo.weights_options": parsed.grpo.weights_options,
        "train.optimizer_options": parsed.train.optimizer_options,
    }.items():
        try:
            json.dumps(options, allow_nan=False)
        except (RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"config.{field}: must be what JSON can hold ({error}); give numbers, strings, "
                "lists and sections."
            ) from None
    if parsed.adapter.options and parsed.adapter.type == "svf":
        raise InputError(
            "config.adapter.options are keywords for an adapter of your own; leave them empty with "
            "config.adapter.type='svf'."
        )
    functions = {
        "adapter.type": parsed.adapter.type,
        "cem.fitness": parsed.cem.fitness,
        "grpo.advantages": parsed.grpo.advantages,
        "grpo.objective": parsed.grpo.objective,
        "grpo.weights": parsed.grpo.weights,
        "train.optimizer": train.optimizer,
    }
    for field, name in functions.items():
        if user_code.is_reference(name):
            user_code.load_function(name, field=f"config.{field}")
    _check_cem(parsed.cem, parsed.data.sources)
    return parsed


def _check_cem(cem: CEMConfig, tasks: Mapping[str, Any]) -> None:
    method = cem.search_method
    if cem.options and cem.method in ("cem", "gradient"):
        raise InputError(
            "config.cem.options are settings of an evosax strategy, or keywords for a method of "
            f"your own; leave them empty with config.cem.method={cem.method!r}."
        )
    if cem.space != "full" and not cem.experts:
        raise InputError(
            f"config.cem.space={cem.space!r} needs a library of experts in config.cem.experts; "
            "make one with python -m grpocem_jax.experts."
        )
    check_fits_reward(cem, method)
    known = [*TASKS, *(name for name in tasks if name not in TASKS)]
    if cem.task and cem.task not in known:
        raise InputError(
            f"config.cem.task={cem.task!r}: there is no such task{_nearest(cem.task, known)}"
        )


def check_fits_reward(cem: CEMConfig, method: SearchMethod) -> None:
    """Refuses a method that needs the gradient of a reward.

    Raises:
      InputError: it does.
    """
    if cem.fitness == "reward" and "gradient" in getattr(method, "needs", ()):
        raise InputError(
            f"config.cem.method={cem.method!r}: a reward has no gradient; use a method that needs "
            "none, such as 'cem'."
        )


@contextlib.contextmanager
def section(name: str, record: type) -> Iterator[None]:
    """Names the section of the config in errors that name an argument: ``config.cem.rank=0``.

    Args:
      name: of the section.
      record: whose fields the arguments are.

    Raises:
      InputError: one of the library, from inside the block.
    """
    try:
        yield
    except InputError as error:
        names = "|".join(field.name for field in dataclasses.fields(record))
        message = re.sub(
            rf"(?<![\w./'\"])((?:{names})(?==)|options(?=\.\w))", rf"config.{name}.\1", str(error)
        )
        raise InputError(message) from error


def _parse(value: Any, kind: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _parse_record(value, kind, path)
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_parse(x, args[0], f"{path}[{i}]") for i, x in enumerate(value))
    if origin is collections.abc.Mapping and isinstance(value, Mapping):
        parsed = {name: _parse(x, args[1], f"{path}.{name}") for name, x in value.items()}
        # dataclasses.asdict cannot copy a proxy.
        return parsed if args[1] is Any else types.MappingProxyType(parsed)
    if origin is types.UnionType and type(None) in args:
        return None if value is None else _parse(value, args[0], path)
    if kind in (int, float) and type(value) in (int, kind):
        return _number(value, kind, path)
    if origin is None and type(value) is kind:
        if kind is str:
            _check_text(value, path)
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise InputError(f"config.{path}={value!r}: must be of type {expected}.")


def _number(value: Any, kind: Any, path: str) -> Any:
    """A number that the device can hold."""
    if kind is int and abs(value) <= LARGEST:
        return value
    # In float32, larger ones are infinite and smaller ones zero.
    if kind is float and (value == 0 or TINIEST <= abs(value) <= HUGEST):
        return float(value)
    # Python prints no integer of thousands of digits.
    shown = value if type(value) is float or value.bit_length() < 99 else "a huge integer"
    limits = (
        f"an integer of at most {LARGEST}"
        if kind is int
        else f"a finite number that float32 holds (0, or {TINIEST:g} to {HUGEST:g} in size)"
    )
    raise InputError(f"config.{path}={shown}: must be {limits}.")


def _check_text(value: str, path: str) -> None:
    """Refuses what can be neither written to a file nor the name of one."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"config.{path}={value!r}: must be UTF-8 text; correct character {error.start}."
        ) from None
    if "\0" in value:
        raise InputError(f"config.{path}={value!r}: must not have a NUL character; remove it.")


def _parse_record(value: Any, kind: Any, path: str) -> Any:
    prefix = f"{path}." if path else ""
    if not isinstance(value, Mapping):
        raise InputError(f"config.{path}={value!r}: must be a section with fields of its own.")
    hints = typing.get_type_hints(kind)
    if kind is DataConfig:
        value = _gather_sources(value)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            if f"{prefix}{name}" in RENAMED:
                raise InputError(f"config.{prefix}{name}: {rename(f'{prefix}{name}')}")
            if f"{prefix}{name}" in REMOVED:
                _check_removed(f"{prefix}{name}", value[name])
                continue
            raise InputError(
                f"config.{prefix}{name}: there is no such field{_nearest(name, fields)}"
            )
    parsed = {}
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        optional = type(None) in typing.get_args(hints[name])
        # A config file that leaves a field out has a placeholder for flags there.
        if name in value and not (value[name] is None and required and not optional):
            # The sections of the sources stand beside the other fields of `data`, see below.
            where = path if name == "sources" else f"{prefix}{name}"
            parsed[name] = _parse(value[name], hints[name], where)
            allowed = field.metadata.get("range")
            if allowed is not None and parsed[name] is not None and not allowed.holds(parsed[name]):
                raise InputError(f"config.{where}={value[name]!r}: must be {allowed.text}.")
        elif required:
            raise InputError(
                f"config.{prefix}{name} is missing; add it to the config file (configs/gpt2.py "
                f"has every field), or give --config.{prefix}{name}."
            )
    return kind(**parsed)


REMOVED = {
    "cem.warm_start": False,
    "cem.mirrored": False,
    "cem.evaluate_mean": False,
    "cem.anchor": 0.0,
    "cem.common_random_numbers": True,
}
"""Settings of earlier versions, with the value that is what happens now: configs of theirs, such as
those stored in run directories, still load."""


def _check_removed(path: str, value: Any) -> None:
    if value != REMOVED[path]:
        raise InputError(
            f"config.{path}={value!r}: this setting was removed, as it was measured to bring "
            "nothing (docs/adaptation.md); leave it out, or start from a config without it."
        )


def _gather_sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the sections named after tasks (``data.qa``) below ``sources``, one for each task.

    A section with ``rewards``, or of a name in ``tasks``, is a task of the user's own.
    """
    own = {field.name for field in dataclasses.fields(DataConfig)} - {"sources"}
    tasks = data.get("tasks")
    tasks = () if tasks is None else _parse(tasks, tuple[str, ...], "data.tasks")
    sources = {
        name: section
        for name, section in data.items()
        if name in TASKS
        or (isinstance(section, Mapping) and ("rewards" in section or name in tasks))
    }
    for name in tasks:
        if name in sources:
            continue
        if name in TASKS:
            raise InputError(f"config.data.{name} is missing: the task {name!r} needs a source.")
        raise InputError(
            f"config.data.tasks names {name!r}, which needs a section config.data.{name} with "
            f"source and rewards, as a task of your own{_nearest(name, TASKS)}"
        )
    for name in data:
        if name not in own and name not in sources:
            raise InputError(
                f"config.data.{name}: there is no such field{_nearest(name, [*own, *TASKS])}"
            )
    return {**{name: data[name] for name in data if name in own}, "sources": sources}


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose from {', '.join(known)}."
