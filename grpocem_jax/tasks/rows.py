"""Rows of one split of a data set: a local folder, or a data set of the Hugging Face Hub."""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpocem_jax.errors import InputError

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
HELDOUT_SPLITS = ("test", "validation", "valid")


class Row(NamedTuple):
    """One row: where it lies, for error messages, and a function that reads its values."""

    where: str
    read: Callable[[], Mapping[str, Any]]


class Rows(NamedTuple):
    """The rows of one split and, where the data set itself knows them, a column's label names."""

    rows: list[Row]
    label_names: Mapping[str, tuple[str, ...]]


def local_rows(folder: Path, split: str, *, field: str) -> Rows:
    """Rows of ``{split}.EXT``, or of shards such as ``{split}-00000-of-00002.EXT``, in a folder.

    EXT is jsonl or json (one object a line), parquet, or txt (one paragraph a line, as column
    ``text``).  An empty ``split`` means the first of test, validation and valid that has a file.

    Args:
      folder: the folder.
      split: the split's name.
      field: the config field that holds the folder, for error messages.

    Raises:
      InputError: no folder, no file of the split, files in several formats, an unreadable or empty
        file, or a line that is not a JSON object.
    """
    if not folder.is_dir():
        raise InputError(
            f"{field} is {str(folder)!r}, which is no folder: correct the path, or give a Hub id "
            "or 'builtin'."
        )
    candidates = [split] if split else list(HELDOUT_SPLITS)
    files = next(filter(None, (_split_files(folder, name) for name in candidates)), [])
    if not files:
        raise InputError(
            f"{field} is {str(folder)!r}, which has no file of the split "
            f"{' or '.join(candidates)}: expected {candidates[0]}.jsonl, .json, .parquet or .txt."
        )
    if len({file.suffix for file in files}) > 1:
        raise InputError(
            f"{field} is {str(folder)!r}, which has a split in several formats "
            f"({', '.join(file.name for file in files)}): keep one of them."
        )
    return Rows([row for file in files for row in file_rows(file)], {})


def _split_files(folder: Path, split: str) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in FORMATS and re.fullmatch(rf"{re.escape(split)}(-\d.*)?", file.stem)
    )


def file_rows(file: Path) -> list[Row]:
    """Rows of one file: .jsonl or .json (one object a line), .parquet, or .txt (column ``text``).

    Raises:
      InputError: no such file, another format, or one that is unreadable or empty.
    """
    if not file.is_file() or file.suffix not in FORMATS:
        raise InputError(f"{file}: give an existing file that ends in {', '.join(FORMATS)}.")
    reader = {".parquet": _parquet_rows, ".txt": _text_rows}.get(file.suffix, _json_rows)
    try:
        rows = list(reader(file))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: convert it.") from error
    if not rows:
        raise InputError(f"{file} is empty: give it at least one row, or remove it.")
    return rows


def _json_rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{file}, line {number} is not valid JSON ({error.msg}): put one object on "
                    "each line."
                ) from error
            if not isinstance(values, dict):
                raise InputError(
                    f"{file}, line {number} holds {_type(values)} instead of an object with "
                    "columns: put one object on each line."
                )
            yield Row(f"{file}, line {number}", functools.partial(dict, values))


def _text_rows(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Row(f"{file}, line {number}", functools.partial(dict, text=line))


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file} is not a readable parquet file ({_line(error)}): replace it."
        ) from error
    for index in range(table.num_rows):
        yield Row(f"{file}, row {index + 1}", functools.partial(_table_row, table, index))


def _table_row(table: Any, index: int) -> Mapping[str, Any]:
    return table.slice(index, 1).to_pylist()[0]


def hub_rows(path: str, subset: str, split: str, revision: str, *, field: str) -> Rows:
    """Rows of a data set of the Hugging Face Hub, or of its copy in the local cache.

    Args:
      path: the Hub id, such as ``rajpurkar/squad``.
      subset: the data set's configuration, or "" for its only one.
      split: the split, slices such as ``train[:1000]`` allowed; "" means the first of test,
        validation and valid that exists.
      revision: branch, tag or commit, or "" for the main branch.
      field: the config field that holds the id, for error messages.

    Raises:
      InputError: no network and not in the cache, or the Hub has no such data set, subset or split.
    """
    import datasets

    ways_on = f"give a local folder in {field}, or use --config tiny, whose data are built in"
    if not (datasets.config.HF_HUB_OFFLINE or _hub_answers()):
        # Otherwise every request is tried again for half a minute before the cache is looked at.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(
            path, subset or None, split=split or None, revision=revision or None
        )
    except Exception as error:  # the libraries underneath raise errors of a dozen families
        if isinstance(error, ConnectionError):
            raise InputError(
                f"{field} is {path!r}, which is no local folder nor in the local cache of Hub data "
                f"sets, and there is no network to fetch it: {ways_on}."
            ) from error
        place = (
            "the local cache (there is no network)" if datasets.config.HF_HUB_OFFLINE else "the Hub"
        )
        raise InputError(
            f"{field} is {path!r}, which {place} could not deliver ({type(error).__name__}: "
            f"{_line(error)}): check the id, subset, split and revision, {ways_on}."
        ) from error
    if isinstance(loaded, dict):
        present = [name for name in HELDOUT_SPLITS if name in loaded]
        if not present:
            raise InputError(
                f"{field} is the Hub data set {path!r}, which has none of the splits "
                f"{', '.join(HELDOUT_SPLITS)}: set heldout_split to one of {', '.join(loaded)}."
            )
        loaded = loaded[present[0]]
    rows = [
        Row(f"{path}, row {index + 1}", functools.partial(loaded.__getitem__, index))
        for index in range(len(loaded))
    ]
    names = {
        column: tuple(feature.names)
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Rows(rows, names)


@functools.cache
def _hub_answers() -> bool:
    """Whether the Hub answers at all; asked once a process."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever it is, the data set's own request would meet it again
        return False
    return True


def builtin_rows(task: str, split: str) -> Rows:
    """Rows of the built-in data of a task; ``split`` is train or heldout."""
    from grpocem_jax.builtin import data

    rows = [
        Row(f"built-in {task} data, {split} row {number}", functools.partial(dict, values))
        for number, values in enumerate(data.rows(task, split), start=1)
    ]
    return Rows(rows, {"label": tuple(data.LABELS[task])} if task in data.LABELS else {})


def _type(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _line(error: Exception) -> str:
    """An error's first line without full stops, to stand inside a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.rstrip(".").replace(". ", "; ")
