"""From a config to the frozen record that the workflows read, or what is wrong in one sentence."""

import collections.abc
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from grpocem_jax.config.method import make_method
from grpocem_jax.config.names import REMOVED, RENAMED, check_removed, rename, section
from grpocem_jax.config.schema import HUGEST, LARGEST, TINIEST, Config, DataConfig, SearchConfig
from grpocem_jax.grpo import variants
from grpocem_jax.search import SearchMethod
from grpocem_jax.tasks import TASKS
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError


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
    if train.rollout_processes and not train.staleness:
        raise InputError(
            f"config.train.rollout_processes={train.rollout_processes}: these processes sample "
            "while the others update, so they have the adapter of the step before; set "
            "config.train.staleness=1, or leave it 0."
        )
    if parsed.data.system and not parsed.data.chat:
        raise InputError(
            f"config.data.system={parsed.data.system!r} is the first message of a chat; set "
            "config.data.chat=True, or leave it empty."
        )
    if parsed.grpo.supervision == "process":
        whole = {
            "advantages": parsed.grpo.advantages in variants.ADVANTAGES,
            "shaping": parsed.grpo.shaping != "none",
        }
        for field, of_outcomes in whole.items():
            name = getattr(parsed.grpo, field)
            if of_outcomes:
                raise InputError(
                    f"config.grpo.{field}={name!r} is for rewards of whole completions; set "
                    "config.grpo.supervision='outcome', or take another method."
                )
    for field, options in {
        "adapter.options": parsed.adapter.options,
        "search.options": parsed.search.options,
        "grpo.advantages_options": parsed.grpo.advantages_options,
        "grpo.objective_options": parsed.grpo.objective_options,
        "grpo.shaping_options": parsed.grpo.shaping_options,
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
            "config.adapter.options are keywords of other adapters; leave them empty with "
            "config.adapter.type='svf', whose settings are config.adapter.rank_ratio and its like."
        )
    functions = {
        "adapter.type": parsed.adapter.type,
        "search.fitness": parsed.search.fitness,
        "grpo.advantages": parsed.grpo.advantages,
        "grpo.objective": parsed.grpo.objective,
        "grpo.shaping": parsed.grpo.shaping,
        "grpo.weights": parsed.grpo.weights,
        "train.optimizer": train.optimizer,
    }
    for field, name in functions.items():
        if user_code.is_reference(name):
            user_code.load_function(name, field=f"config.{field}")
    _check_search(parsed)
    return parsed


def _check_search(config: Config) -> None:
    search, tasks = config.search, config.data.sources
    method = make_method(config)
    if search.options and search.method in ("cem", "gradient"):
        raise InputError(
            "config.search.options are settings of other methods, or keywords for one of your own; "
            f"leave them empty with config.search.method={search.method!r}."
        )
    if search.space != "full" and not search.experts:
        raise InputError(
            f"config.search.space={search.space!r} needs a library of experts in "
            "config.search.experts; make one with python -m grpocem_jax.experts."
        )
    check_fits_reward(search, method)
    known = [*TASKS, *(name for name in tasks if name not in TASKS)]
    if search.task and search.task not in known:
        raise InputError(
            f"config.search.task={search.task!r}: there is no such task"
            f"{_nearest(search.task, known)}"
        )


def check_fits_reward(search: SearchConfig, method: SearchMethod) -> None:
    """Refuses a method that needs the gradient of a reward.

    Raises:
      InputError: it does.
    """
    if search.fitness == "reward" and "gradient" in getattr(method, "needs", ()):
        raise InputError(
            f"config.search.method={search.method!r}: a reward has no gradient; use a method that "
            "needs none, such as 'cem'."
        )


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
                check_removed(f"{prefix}{name}", value[name])
                continue
            raise InputError(
                f"config.{prefix}{name}: there is no such field{_nearest(name, fields)}"
            )
    parsed = {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(hints[name]):
            value = {name: {}, **value}
        if name not in value:
            continue
        # The sections of the sources stand beside the other fields of `data`, see below.
        where = path if name == "sources" else f"{prefix}{name}"
        parsed[name] = _parse(value[name], hints[name], where)
        allowed = field.metadata.get("range")
        if allowed is not None and parsed[name] is not None and not allowed.holds(parsed[name]):
            raise InputError(f"config.{where}={value[name]!r}: must be {allowed.text}.")
    with section(path, kind):
        return kind(**parsed)


def _gather_sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the sections named after tasks (``data.qa``) below ``sources``, one for each task.

    A section with ``rewards``, or of a name in ``tasks``, is a task of the user's own.
    """
    own = {field.name for field in dataclasses.fields(DataConfig)} - {"sources"}
    tasks = _parse(data.get("tasks", DataConfig.tasks), tuple[str, ...], "data.tasks")
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
