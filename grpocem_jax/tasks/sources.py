"""From a data source to the examples of a task."""

import bisect
import dataclasses
import random
import re
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal, NamedTuple

from grpocem_jax.tasks.base import Example, Task
from grpocem_jax.tasks.prompts import PromptFormat
from grpocem_jax.tasks.rows import Row, Rows, builtin_rows, hub_rows, local_rows
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_folder
from grpocem_jax.utils.settings import at_least, setting

_INTEGER = re.compile(r"\s*-?\d{1,9}\s*", re.ASCII)
_HEADING = re.compile(r"=.*=", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where the rows of a task come from, and how its columns are called there.

    Attributes:
      source: ``builtin``, an id of the Hugging Face Hub, or a local folder of files named after
        the splits: ``train.jsonl``, ``test.csv``, ``valid.txt``, ``train-00000-of-00002.parquet``.
      subset: the Hub data set's configuration; for a local folder, a folder inside it.
      revision: the Hub data set's branch, tag or commit; "" is its main branch.
      train_split: the split trained on.
      heldout_split: the split held out; "" is the first of test, validation and valid that exists.
      columns: for each task column, the data set's own, with dots for nested ones
        (``answers.text``).  A column that is not named here has the task's name for it.
      label_names: the names of integer labels, in order, and the only strings allowed as labels;
        () where the data set says them itself.
      prompt_words: a free text is cut after so many words, to be continued by the model.
      template: the prompt, with columns of the task in braces, and ``{labels}`` where it has label
        names: ``"{text}\\nTopic ({labels}):"``; "" for the task's own. In a task of the user's own
        the braces hold columns of the data set.
      shots: examples of the training split, with their references, before every prompt; none of
        them trains.
      rewards: reward functions, ``package.module:function``, in place of the task's own.  A task
        that is not one of the package's needs at least one; its data set has a column ``prompt``.
      reward_weights: the weight of each of ``rewards`` in their sum; () for 1 each.
    """

    source: str = "builtin"
    subset: str = ""
    revision: str = ""
    train_split: str = "train"
    heldout_split: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    prompt_words: int = 24
    template: str = ""
    shots: int = setting(allowed=at_least(0), default=0)
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()


class _UnlabelledError(InputError):
    """Begins a sentence that ends with the splits to choose from."""


class Loaded(NamedTuple):
    """The examples of one split.

    Attributes:
      examples: at most ``max_samples`` examples, in the order drawn.
      shortened: how many of them lost words so that the prompt fits.
      dropped: how many rows were passed over because the prompt does not fit.
      bad_lines: how many were passed over because they cannot be used.
      description: one line for the first screen.
    """

    examples: tuple[Example, ...]
    shortened: int
    dropped: int
    bad_lines: int
    description: str


def load_examples(
    task: Task,
    source: SourceConfig,
    *,
    split: Literal["train", "heldout"],
    count_tokens: Callable[[str], int],
    max_prompt_tokens: int,
    max_samples: int,
    seed: int,
    prompt_format: PromptFormat | None = None,
    exclude: Container[str] = frozenset(),
    bad_lines: str = "error",
) -> Loaded:
    """Draws examples of a task from a source.

    Rows are drawn without replacement in an order that depends on ``seed``, the task and the split
    only, until ``max_samples`` have made an example.  Blank lines and WikiText's headings
    (``= Title =``) are no examples of free text; they are counted and passed over.  Published
    splits overlap now and then: draw the held-out examples first and exclude their prompts from
    training.

    Args:
      task: the task.
      source: where its rows come from.
      split: which of the source's two splits.
      count_tokens: the number of tokens of a prompt.
      max_prompt_tokens: the most tokens a prompt may have; longer ones lose the last words of
        ``task.shorten``, or are dropped where that is None.
      max_samples: the most examples to draw, at least 1.
      seed: of the order.
      prompt_format: how prompts are written; None for the template alone.
      exclude: prompts that must not be drawn.
      bad_lines: "error" raises at a line that cannot be read, and at a row that is drawn and lacks
        a column or has a value of another kind; "skip" counts them and passes them over.

    Raises:
      InputError: a source, file, column or value that does not fit (see ``tasks.rows`` too), or
        no row whose prompt fits.
    """
    field = f"data.{task.name}"
    _check(task, source, max_samples, field)
    read = _read(task, source, split, field)
    if read.bad and bad_lines == "error":
        raise InputError(_or_skip(read.bad, read.bad_count))
    rows, bad, bad_count, blank = read.rows, read.bad, read.bad_count, read.blank
    labels = source.label_names or read.label_names.get(source.columns.get("label", "label"), ())
    if not labels and "label" in task.columns and not task.own:
        for row in rows[:1]:  # a data set of other columns has no labels either
            for column in task.columns:
                path = source.columns.get(column, column)
                _value(row.read(), path, row.where, f"{field}.columns.{column}")
        raise InputError(
            f"{field}.label_names is empty, and the data set does not say them either: list the "
            "label names, in the order of integer labels."
        )
    order = list(range(len(rows)))
    random.Random(f"{seed} {task.name} {split}").shuffle(order)

    def write(columns: Mapping[str, Any]) -> str:
        return (prompt_format or PromptFormat()).write(task.prompt(columns))

    examples: list[Example] = []
    shortened = dropped = excluded = 0
    shortest: int | None = None
    for index in order:
        if len(examples) == max_samples:
            break
        try:
            columns = _columns(task, source, rows[index], labels, field)
        except InputError as error:
            if bad_lines == "error":
                sentence = str(error)
                if isinstance(error, _UnlabelledError):
                    option = "train_split" if split == "train" else "heldout_split"
                    others = " or ".join(map(repr, sorted(read.other_splits))) or "another split"
                    sentence += f" set {field}.{option} to {others}, or correct the row."
                raise InputError(_or_skip(sentence, 1)) from None
            bad, bad_count = bad or str(error), bad_count + 1
            continue
        if columns is None:
            blank += 1
            continue
        fitting = _fit(task, columns, lambda x: count_tokens(write(x)), max_prompt_tokens)
        if fitting is None:
            dropped += 1
            length = count_tokens(write(columns))
            shortest = length if shortest is None else min(shortest, length)
            continue
        prompt = write(fitting)
        if prompt in exclude:
            excluded += 1
            continue
        shortened += fitting is not columns
        examples.append(Example(prompt, fitting))
    if not examples and bad:
        raise InputError(
            f"{field}.source is {source.source!r}, in whose {split} split {bad_count} of "
            f"{len(rows) + read.bad_count} rows cannot be used, and none is left; the first: {bad}"
        )
    if not examples:
        where = f"{field}.source is {source.source!r}, "
        if dropped:
            raise InputError(
                f"{where}in which no {split} prompt of the task {task.name} fits into "
                f"data.max_prompt_tokens={max_prompt_tokens} ({dropped} are longer): raise it to "
                f"{shortest} or more."
            )
        if excluded:
            raise InputError(
                f"{where}whose {split} split has no prompt that is not in the other split too "
                f"({excluded} are): give the splits different prompts, or lower "
                "data.heldout_samples."
            )
        raise InputError(f"{where}whose {split} split has nothing to draw: give other data.")
    beside = " or shown before the prompts" if source.shots else ""
    counts = (
        (shortened, "shortened"),
        (dropped, "too long and dropped"),
        (excluded, f"in the other split{beside} and left out"),
        (blank, "blank or a heading"),
        (bad_count, f"bad and passed over (the first: {bad.rstrip('.')})"),
    )
    notes = "".join(f", {count} {what}" for count, what in counts if count)
    description = (
        f"{task.name}: {source.source}, {len(examples)} {split} examples of "
        f"{len(rows) + read.bad_count} rows{notes}"
    )
    return Loaded(tuple(examples), shortened, dropped, bad_count, description)


def _or_skip(sentence: str, count: int) -> str:
    """The sentence on a bad line, with the setting that passes such lines over."""
    others = f" ({count} of them)" if count > 1 else ""
    return (
        f"{sentence.removesuffix('.')}, or set data.bad_lines='skip' to count such lines{others} "
        "and pass them over."
    )


def example_of(
    task: Task, row: Row, source: SourceConfig, prompt_format: PromptFormat | None = None
) -> Example:
    """The example that a row makes whose columns have the task's names.

    Args:
      task: the task.
      row: one row of a file, `tasks.rows.file_rows`.
      source: of the task's own data, for the label names and the length of openings.
      prompt_format: how prompts are written; None for the template alone.

    Raises:
      InputError: a column or value that does not fit, or a row without text.
    """
    labels = source.label_names
    if not labels and source.source == "builtin":
        labels = builtin_rows(task.name, "train").label_names.get("label", ())
    own = SourceConfig(label_names=labels, prompt_words=source.prompt_words)
    columns = _columns(task, own, row, labels, f"data.{task.name}")
    if columns is None:
        raise InputError(f"{row.where} has no text to continue: fill it in or remove the row.")
    return Example((prompt_format or PromptFormat()).write(task.prompt(columns)), columns)


def _check(task: Task, source: SourceConfig, max_samples: int, field: str) -> None:
    if max_samples < 1:
        raise InputError(f"data.max_samples is {max_samples}: give at least 1.")
    if not source.source:
        raise InputError(f"{field}.source is empty: give a folder, a Hub id, or 'builtin'.")
    names = source.label_names
    if len(set(names)) < len(names) or not all(map(str.strip, names)):
        raise InputError(
            f"{field}.label_names is {names}: give every label a name of its own, none empty."
        )
    if source.prompt_words < 1:
        raise InputError(f"{field}.prompt_words is {source.prompt_words}: give at least 1.")
    if source.train_split == source.heldout_split and source.source != "builtin":
        raise InputError(
            f"{field}.heldout_split is {source.heldout_split!r}, which is train_split as well: "
            "hold out another split."
        )
    for column in source.columns:
        if column not in task.columns:
            raise InputError(
                f"{field}.columns names {column!r}, which the task {task.name} does not have: "
                f"its columns are {', '.join(task.columns)}."
            )


def _read(task: Task, source: SourceConfig, split: str, field: str) -> Rows:
    if source.source == "builtin":
        return builtin_rows(task.name, split)
    name = source.train_split if split == "train" else source.heldout_split
    field = f"{field}.source"
    folder = expand(source.source, field)
    looks_local = source.source.startswith((".", "/", "~")) or source.source.count("/") > 1
    if is_folder(folder) or looks_local:
        return local_rows(folder / source.subset, name, field=field)
    return hub_rows(source.source, source.subset, name, source.revision, field=field)


def _columns(
    task: Task, source: SourceConfig, row: Row, labels: tuple[str, ...], field: str
) -> dict[str, Any] | None:
    """The task's columns of a row, checked; None for a blank line or heading of free text."""
    values = row.read()
    if task.own:
        return _own_columns(task, source, values, row.where, field)
    columns: dict[str, Any] = {}
    for column in task.columns:
        path = source.columns.get(column, column)
        value = _value(values, path, row.where, f"{field}.columns.{column}")
        if column == "label":
            columns |= {"label": _label(value, labels, row.where, field), "labels": labels}
        elif column in task.text_columns:
            if task.is_free_text and isinstance(value, str) and _is_blank(value):
                return None
            columns[column] = _text(value, path, row.where)
        else:
            listed = value if isinstance(value, list) and value else [value]
            columns[column] = [_text(text, path, row.where) for text in listed]
    if task.is_free_text:
        columns = {name: _opening(text, source.prompt_words) for name, text in columns.items()}
    return columns


def _own_columns(
    task: Task, source: SourceConfig, values: Mapping[str, Any], where: str, field: str
) -> dict[str, Any]:
    """All columns of a row as they are, with those of the prompt under the task's names."""
    paths = {name: source.columns.get(name, name) for name in task.columns}
    shown = {}
    for name, path in paths.items():
        value = _value(values, path, where, f"{field}.columns.{name}")
        if task.takes_prompts and isinstance(value, list):
            try:
                PromptFormat(render=str).write(value)
            except InputError as error:
                raise InputError(f"{where}, column {path!r}: {error}") from None
        elif task.takes_prompts or isinstance(value, bool) or not isinstance(value, int | float):
            _text(value, path, where)
        shown[name] = value
    if "completions" in values or ("prompts" in values and "prompts" not in paths.values()):
        raise InputError(
            f"{where} has a column 'prompts' or 'completions', names that reward functions get the "
            "texts under: rename it."
        )
    rest = {name: value for name, value in values.items() if name not in paths.values()}
    return {**rest, **shown}


def _value(values: Mapping[str, Any], path: str, where: str, field: str) -> Any:
    if path in values:
        return values[path]
    value: Any = values
    for name in path.split("."):
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, Mapping) and name in part for part in parts):
            raise InputError(
                f"{field} is {path!r}, a column that {where} does not have: choose from "
                f"{', '.join(map(repr, values))}."
            )
        value = [part[name] for part in parts] if isinstance(value, list) else value[name]
    return value


def _text(value: Any, path: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where} has {value!r} in column {path!r}, where a string is needed: correct the row "
            "or choose another column."
        )
    if not value.strip():
        raise InputError(f"{where} has no text in column {path!r}: fill it in or remove the row.")
    return value.strip()


def _label(value: Any, labels: tuple[str, ...], where: str, field: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with a gap in it
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(
            f"{where} has the label {value!r}, which is neither an integer nor a string: correct "
            f"the row or {field}.columns."
        )
    if isinstance(value, str) and value.strip() in labels:
        return value.strip()
    # A table of text has the integers as strings.
    number = int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value
    if isinstance(number, int) and 0 <= number < len(labels):
        return labels[number]
    if number == -1:
        raise _UnlabelledError(
            f"{where} has the label {value!r}, which {field}.label_names={labels} does not cover, "
            "and which splits have whose labels are not published:"
        )
    raise InputError(
        f"{where} has the label {value!r}, which {field}.label_names={labels} does not cover: "
        "complete the names or correct the row."
    )


def _fit(
    task: Task, columns: dict[str, Any], count_tokens: Callable[[dict[str, Any]], int], limit: int
) -> dict[str, Any] | None:
    """The columns themselves where the prompt fits, shortened ones, or None where it cannot."""
    if count_tokens(columns) <= limit:
        return columns
    if task.shorten is None:
        return None
    shorten, text = task.shorten, columns[task.shorten]

    def tokens(words: int) -> int:
        return count_tokens({**columns, shorten: _opening(text, words)})

    if tokens(0) > limit:
        raise InputError(
            f"data.max_prompt_tokens is {limit}, which a prompt of the task {task.name} exceeds "
            f"with an empty {shorten} already: raise it to {tokens(0)} or more."
        )
    # Bisection needs counts that rise with the words; a tokenizer that merges across words may
    # break this by a token, so the result is checked rather than trusted.
    words = bisect.bisect_right(range(1, len(text.split()) + 1), limit, key=tokens)
    while words and tokens(words) > limit:
        words -= 1
    if not words:
        return None
    return {**columns, shorten: _opening(text, words)}


def _opening(text: str, words: int) -> str:
    """The first words of a text, with the white space between them as it is."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[words - 1] if words else 0] if words < len(ends) else text


def _is_blank(text: str) -> bool:
    return not text.strip() or _HEADING.fullmatch(text.strip()) is not None
