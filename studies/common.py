"""What the studies share: intervals, tables in a document, and their command."""

import argparse
import dataclasses
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from grpocem_jax.config import Config, commands
from grpocem_jax.training.evaluation import Gain


def searching(config: Config, **changes: Any) -> Config:
    """A config with changes of its sections search, cem and gradient, by the fields' names."""
    sections = {name: getattr(config, name) for name in ("search", "cem", "gradient")}
    for field, value in changes.items():
        (section,) = [name for name, record in sections.items() if field in vars(record)]
        sections[section] = dataclasses.replace(sections[section], **{field: value})
    return dataclasses.replace(config, **sections)


def mean_ci(values: Any) -> tuple[float, float]:
    """Mean of some numbers and half of the 95% interval, by Student's t."""
    x = np.asarray(values, float)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(half)


def gain_interval(gains: Sequence[Gain]) -> tuple[float, float]:
    """Mean of gains and half of the 95% interval, by Student's t over them, or of the one."""
    if len(gains) > 1:
        return mean_ci([gain.gain for gain in gains])
    low, high = gains[0].gain_ci95
    return gains[0].gain, (high - low) / 2


def say(row: dict[str, Any]) -> None:
    """A line of progress."""
    print(json.dumps(row), file=sys.stderr, flush=True)


def interval(value: Sequence[float]) -> str:
    """A mean and half of its interval."""
    return f"{value[0]:+.3f} ± {value[1]:.3f}"


Columns = dict[str, Callable[[Any], str]]
"""Functions of a row by the titles of a table's columns."""


def table(rows: Sequence[dict[str, Any]], columns: Columns) -> str:
    """A Markdown table with a function of a row for each column."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(show(row) for show in columns.values())} |" for row in rows]
    return "\n".join(lines)


def prompt_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of single prompts, with and without the gate."""
    return table(
        rows,
        {
            "text": lambda r: r["text"],
            "method": lambda r: r["method"],
            "gate": lambda r: "yes" if r["gate"] else "no",
            "gain on the prompt": lambda r: interval(r["fit"]),
            "gain on what follows": lambda r: interval(r["gain"]),
            "adapted": lambda r: f"{r['adapted']} of {r['n']}",
        },
    )


def write(doc: Path, made: dict[str, str]) -> None:
    """Puts each table between its markers in the document."""
    text = doc.read_text(encoding="utf-8")
    for name, table in made.items():
        pattern = rf"(<!-- {name} -->\n)[^<]*(<!-- end -->)"
        text, count = re.subn(pattern, rf"\g<1>{table}\n\g<2>", text)
        if count != 1:
            raise ValueError(f"{doc}: has {count} places for the table {name}.")
    doc.write_text(text, encoding="utf-8")


def run(
    description: str,
    parts: Mapping[str, Callable[..., Any]],
    tables: Callable[[dict[str, Any]], dict[str, str]],
    load: Callable[[argparse.Namespace], Any],
    *,
    results: Path,
    seeds: int = 5,
    needed: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> None:
    """The command of a study.

    Args:
      description: of the study.
      parts: functions of the study, which return what is kept of each, or yield it as it grows. Of
        those with a second parameter, ``done``, it is the rows that were kept.
      tables: the document's tables of all that was kept, by the names of their markers.
      load: makes the study from the flags, where a part is run.
      results: file in which the figures are kept.
      seeds: draws or runs by default.
      needed: further flags, of files and folders, without which no part can be run.
      flags: further ones with their defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--parts", default=",".join(parts), help="which parts to run")
    parser.add_argument("--seeds", type=int, default=seeds, help="draws or runs, at least 2")
    parser.add_argument("--results", type=Path, default=results, help="file of the figures")
    parser.add_argument("--doc", type=Path, help="document to write the tables into")
    for name in needed:
        parser.add_argument(name, type=Path, help="needed to run a part")
    for name, value in (flags or {}).items():
        parser.add_argument(name, type=type(value), default=value, help=f"default: {value}")
    args = parser.parse_args()
    names = list(filter(None, args.parts.split(",")))
    missing = [name for name in needed if getattr(args, name.removeprefix("--")) is None]
    if names and missing:
        parser.error(f"{', '.join(missing)}: needed to run {args.parts}; give a path.")
    commands.keep_compiled_programs()
    found = json.loads(args.results.read_text()) if args.results.exists() else {}
    study = functools.cache(lambda: load(args))
    for name in names:
        kept = {"done": found.get(name, {}).get("rows", [])}
        takes = inspect.signature(parts[name]).parameters
        made = parts[name](study(), **{key: rows for key, rows in kept.items() if key in takes})
        for found[name] in made if isinstance(made, Iterator) else [made]:
            args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.doc:
        write(args.doc, tables(found))
