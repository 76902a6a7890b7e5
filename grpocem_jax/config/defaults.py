"""Fills a config with the fields that its file leaves out, each with its type for flags."""

import collections.abc
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from grpocem_jax.config.schema import LARGEST, Config, DataConfig
from grpocem_jax.tasks import TASKS, SourceConfig


def lay_defaults(
    config: ml_collections.ConfigDict, flags: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Adds to a config, in place, every field of the schema that it leaves out.

    ml_collections knows as flags the fields that are there, by the type of their values.  A field
    gets its default; sections of tasks get the fields of `SourceConfig`.
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
                given = {} if dataclasses.is_dataclass(hint) else _default(field)
                section[name] = ml_collections.ConfigDict(given or {})
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
            if name in section:
                del section[name]  # and its type; ignore_type() walks through all that is there
            section[name] = config_dict.FieldReference(value, field_type=plain)


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


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
