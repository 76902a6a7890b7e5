"""Writes docs/config.md from the settings' records and the configs: ``make docs``."""

import collections.abc
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpocem_jax.config import Config, parse_config
from grpocem_jax.config.files import load_config

TARGET = Path(__file__).with_name("config.md")
CONFIGS = ("tiny", "gpt2", "gpt2:tuned")
INTRODUCTION = """\
# Settings

Made by `make docs` from `grpocem_jax/config/schema.py` and `configs/`; do not edit.

A config is a Python file whose `get_config()` returns an `ml_collections.ConfigDict` with the
sections below. `--config` takes such a file, or the name of one that comes with the package:
`tiny` (built-in model and data), `gpt2` (GPT-2 124M with the report's values), `gpt2:tuned` (ours),
`smollm2` (SmolLM2-135M from the Python package index on real reviews and news; `smollm2:FOLDER`
with data from a folder) or `llama` (a Llama, Qwen2, Qwen3 or Mistral on the built-in data). Every
field is a flag as well, whether the config file has it or not, and all are checked before any work
starts:

    python train.py --config configs/tiny.py --config.train.learning_rate=1e-2 \\
        --config.data.tasks="('qa','sentiment')" --config.search.gate=False

The last columns of a table are the values in `tiny`, `gpt2` and `gpt2:tuned`; `llama` is `tiny`
with another model and its sites, longer prompts and completions, and no experts; for `smollm2` see
[configs/smollm2.py](../configs/smollm2.py).
"""


def reference() -> str:
    """The text of docs/config.md."""
    parsed = [parse_config(load_config(name)) for name in CONFIGS]
    return "\n".join([INTRODUCTION, *_section(Config, parsed, "")])


def _section(kind: Any, values: Sequence[Any], path: str) -> Iterator[str]:
    """A heading, a table of the section's own fields, and the sections inside it."""
    hints = typing.get_type_hints(kind)
    rows, inner = [], []
    for field in dataclasses.fields(kind):
        hint, own = hints[field.name], [getattr(value, field.name) for value in values]
        items = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            inner.append(_section(hint, own, f"{path}.{field.name}".lstrip(".")))
        elif items and dataclasses.is_dataclass(items[-1]):
            inner.append(_sources(items[-1], own, path))
        else:
            rows.append([_code(field.name), *_about(kind, field, hint), *map(_value, own)])
    if path:
        yield f"## {path}\n\n{inspect.cleandoc(kind.__doc__).splitlines()[0]}\n"
    yield _table(["field", "type", "range", "meaning", *map(_code, CONFIGS)], rows)
    for section in inner:
        yield from section


def _sources(kind: Any, values: Sequence[Mapping[str, Any]], path: str) -> Iterator[str]:
    """The sections of single tasks: their fields, and what the configs have in them."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    yield f"## {path}.TASK\n\n{inspect.cleandoc(kind.__doc__).splitlines()[0]}\n"
    yield _table(
        ["field", "type", "range", "meaning", "default"],
        [
            [_code(name), *_about(kind, field, hints[name]), _value(_default(field))]
            for name, field in fields.items()
        ],
    )

    def cell(source: Any) -> str:
        own = {name: getattr(source, name) for name in fields}
        given = {n: x for n, x in own.items() if n == "source" or x != _default(fields[n])}
        return "<br>".join(f"{name} {_value(value)}" for name, value in given.items())

    columns = [tuple(cell(source) for source in sources.values()) for sources in values]
    names: dict[tuple[str, ...], list[str]] = {}
    for name, column in zip(CONFIGS, columns, strict=True):
        names.setdefault(column, []).append(_code(name))
    rows = zip(map(_code, values[0]), *names, strict=True)
    yield _table(["task", *map(", ".join, names.values())], rows)


def _about(kind: Any, field: dataclasses.Field[Any], hint: Any) -> tuple[str, str, str]:
    """Type, range and meaning of a field."""
    allowed = field.metadata.get("range")
    doc = field.metadata.get("doc") or _attributes(kind)[field.name]
    return _type(hint), allowed.text if allowed else "", doc


def _attributes(kind: Any) -> dict[str, str]:
    """What a docstring's section Attributes says of each."""
    text = inspect.cleandoc(kind.__doc__).split("Attributes:\n")[-1]
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE)
    plain = {name: " ".join(doc.replace("``", "`").split()) for name, doc in entries}
    return {name: doc[0].upper() + doc[1:] for name, doc in plain.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"tuple of {_type(args[0])}"
    if origin is collections.abc.Mapping:
        return f"section of {_type(args[1])}"
    if origin is types.UnionType:
        return " or ".join(map(_type, args))
    return "None" if hint is types.NoneType else hint.__name__


def _value(value: Any) -> str:
    return _code(repr(dict(value) if isinstance(value, Mapping) else value))


def _code(text: Any) -> str:
    return f"`{text}`"


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
