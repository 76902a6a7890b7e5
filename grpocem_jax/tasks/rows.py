"""Rows of one split of a data set: a local folder, or a data set of the Hugging Face Hub."""

import csv
import dataclasses
import functools
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import is_file, is_folder

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
HELDOUT_SPLITS = ("test", "validation", "valid")
_SHARD = re.compile(r"-(\d+)(?:-of-(\d+))?$")


class Row(NamedTuple):
    """One row: where it lies, for error messages, and a function that reads its values."""

    where: str
    read: Callable[[], Mapping[str, Any]]


class Rows(NamedTuple):
    """The rows of one split.

    Attributes:
      rows: those that can be read.
      label_names: a column's label names, where the data set itself knows them.
      bad: a sentence for the first line that cannot be read; "" where all can.
      bad_count: how many cannot.
      blank: how many lines are blank.
      other_splits: names of other splits that the data set has.
    """

    rows: list[Row]
    label_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    bad: str = ""
    bad_count: int = 0
    blank: int = 0
    other_splits: Collection[str] = ()


def local_rows(folder: Path, split: str, *, field: str) -> Rows:
    """Rows of ``{split}.EXT`` in a folder, or of its shards where there is no such file.

    Shards are named ``{split}-00000-of-00002.EXT`` or ``{split}-00000.EXT``; of the first kind all
    must be there.  EXT is one that `file_rows` reads.  An empty ``split`` means the first of test,
    validation and valid that has a file.

    Args:
      folder: the folder.
      split: the split's name.
      field: the config field that holds the folder, for error messages.

    Raises:
      InputError: no folder, no file of the split, files in several formats, shards that are
        missing, or an unreadable or empty file.
    """
    if not is_folder(folder):
        raise InputError(
            f"{field} is {str(folder)!r}, which is no folder: correct the path, or give a Hub id "
            "or 'builtin'."
        )
    candidates = [split] if split else list(HELDOUT_SPLITS)
    files = next(filter(None, (_split_files(folder, name, field) for name in candidates)), [])
    if not files:
        others = sorted(x.name for x in folder.iterdir() if x.name.startswith(tuple(candidates)))
        passed_over = f" ({', '.join(others[:5])} cannot be read as one)" if others else ""
        raise InputError(
            f"{field} is {str(folder)!r}, which has no file of the split "
            f"{' or '.join(candidates)}{passed_over}: expected {candidates[0]}.jsonl, "
            f"{', '.join(FORMATS[1:-1])} or {FORMATS[-1]}."
        )
    if len({file.suffix for file in files}) > 1:
        raise InputError(
            f"{field} is {str(folder)!r}, which has a split in several formats "
            f"({', '.join(file.name for file in files)}): keep one of them."
        )
    read = [_read(file) for file in files]
    return Rows(
        [row for part in read for row in part.rows],
        bad=next((part.bad for part in read if part.bad), ""),
        bad_count=sum(part.bad_count for part in read),
        blank=sum(part.blank for part in read),
        other_splits=_split_names(folder.iterdir()) - _split_names(files),
    )


def _split_names(files: Iterable[Path]) -> set[str]:
    return {_SHARD.sub("", file.stem) for file in files if file.suffix in FORMATS}


def _split_files(folder: Path, split: str, field: str) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in FORMATS]
    whole = [file for file in files if file.stem == split]
    if whole:
        return whole
    named = ((file, _SHARD.search(file.stem)) for file in files)
    shards = {
        file: (int(found[1]), found[2])
        for file, found in named
        if found and file.stem == split + found[0]
    }
    counts = {count for _, count in shards.values()}
    if len(counts) > 1:
        raise InputError(
            f"{field} is {str(folder)!r}, whose split {split} has shards of several sets "
            f"({', '.join(file.name for file in shards)}): keep one set."
        )
    there = {number for number, _ in shards.values()}
    for count in counts - {None}:
        missing = next((number for number in range(int(count)) if number not in there), None)
        if missing is not None:
            raise InputError(
                f"{field} is {str(folder)!r}, whose split {split} lacks the shard "
                f"{split}-{missing:0{len(count)}}-of-{count}: fetch it."
            )
    return list(shards)


def file_rows(file: Path) -> list[Row]:
    """Rows of one file, by how its name ends.

    .jsonl and .json hold one object a line, .json also one array of objects; .csv and .tsv a line
    of column names first, and their values are strings; .txt one paragraph a line, as column
    ``text``; .parquet a table.

    Raises:
      InputError: no such file, another format, one that is unreadable or empty, or a line that is
        not UTF-8 text or no JSON object.
    """
    read = _read(file)
    if read.bad:
        raise InputError(read.bad)
    return read.rows


def _read(file: Path) -> Rows:
    if not is_file(file) or file.suffix not in FORMATS:
        raise InputError(f"{file}: give an existing file that ends in {', '.join(FORMATS)}.")
    if file.suffix == ".parquet":
        read = Rows(_parquet_rows(file))
    else:
        content = _content(file)
        if file.suffix in (".csv", ".tsv"):
            read = _cells(file, content)
        elif file.suffix == ".json" and content.lstrip().startswith(b"["):
            read = _array(file, content)
        else:
            read = _lines(file, content)
    if not read.rows and not read.bad:
        raise InputError(f"{file} is empty: give it at least one row, or remove it.")
    return read


def _content(file: Path) -> bytes:
    """What a file holds, without a byte order mark."""
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): mend that.") from None


def _lines(file: Path, content: bytes) -> Rows:
    """The lines of a file of text or JSON; those that cannot be read are counted."""
    parse = _text_values if file.suffix == ".txt" else _json_values
    rows, bad, blank = [], [], 0
    for number, line in enumerate(content.splitlines(), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            blank += 1
            continue
        try:
            rows.append(Row(where, functools.partial(dict, parse(line, where))))
        except InputError as error:
            bad.append(str(error))
    return Rows(rows, bad=bad[0] if bad else "", bad_count=len(bad), blank=blank)


def _text_values(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}): convert it.") from None
    if "\0" in text:
        raise InputError(f"{where} has a NUL byte, as no text does: correct it.")
    return {"text": text}


def _json_values(line: bytes, where: str) -> Mapping[str, Any]:
    text = _text_values(line, where)["text"]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not valid JSON ({_line(error)}): put one object on each line."
        ) from None
    return _columns(values, where, escapes=r"\u" in text)


def _columns(values: Any, where: str, *, escapes: bool) -> dict[str, Any]:
    """A row that was read from JSON, checked; ``escapes``: it may have halves of characters."""
    if not isinstance(values, dict):
        raise InputError(
            f"{where} holds {_type(values)} instead of an object with columns: give every row as "
            "an object."
        )
    if escapes:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where} has half of a surrogate pair, which is no character: correct it."
            ) from None
    return values


def _array(file: Path, content: bytes) -> Rows:
    """The elements of a file that is one JSON array; those that are no rows are counted."""
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}, line {line} is not UTF-8 text: convert it.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file} begins as a JSON array and is not a valid one ({_line(error)}): correct it, "
            "or put one object on each line."
        ) from None
    rows, bad = [], []
    escapes = rb"\u" in content
    for number, value in enumerate(values, start=1):
        where = f"{file}, element {number}"
        try:
            rows.append(
                Row(where, functools.partial(dict, _columns(value, where, escapes=escapes)))
            )
        except InputError as error:
            bad.append(str(error))
    return Rows(rows, bad=bad[0] if bad else "", bad_count=len(bad))


def _cells(file: Path, content: bytes) -> Rows:
    """The rows of a table of text; those that cannot be read are counted."""
    # What is not UTF-8 becomes halves of surrogate pairs, so that only its own row is bad.
    text = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
    reader = csv.reader(text, "excel-tab" if file.suffix == ".tsv" else "excel", strict=True)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        columns = _header(reader, file)
        rows, bad, blank = [], [], 0
        while True:
            where = f"{file}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
                if cells is None:
                    break
                blank += not cells
                if cells:
                    rows.append(Row(where, functools.partial(dict, _named(cells, columns, where))))
            except csv.Error as error:
                bad.append(f"{where} cannot be read ({_line(error)}): correct the quotes there.")
            except InputError as error:
                bad.append(str(error))
    finally:
        csv.field_size_limit(limit)
    return Rows(rows, bad=bad[0] if bad else "", bad_count=len(bad), blank=blank)


def _header(reader: Any, file: Path) -> list[str]:
    """The names of the columns of a table of text."""
    try:
        columns: list[str] = next(reader, [])
        _check_cells(columns, f"{file}, line 1")
    except csv.Error as error:
        raise InputError(
            f"{file}, line 1 cannot be read ({_line(error)}): correct the quotes there."
        ) from None
    if len(set(columns)) < len(columns) or not all(columns):
        raise InputError(
            f"{file} begins with the columns {', '.join(map(repr, columns))}: give every column "
            "a name of its own in the first line."
        )
    return columns


def _named(cells: list[str], columns: list[str], where: str) -> dict[str, str]:
    """The cells of a line by their columns."""
    if len(cells) != len(columns):
        raise InputError(
            f"{where} has {len(cells)} cells for {len(columns)} columns: correct it, with double "
            "quotes around a cell that holds a separator or a line break."
        )
    _check_cells(cells, where)
    return dict(zip(columns, cells, strict=True))


def _check_cells(cells: list[str], where: str) -> None:
    text = "".join(cells)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} is not UTF-8 text: convert it.") from None
    if "\0" in text:
        raise InputError(f"{where} has a NUL byte, as no text does: correct it.")


def _parquet_rows(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file} is not a readable parquet file ({_line(error)}): replace it."
        ) from error
    places = [f"{file}, row {index + 1}" for index in range(table.num_rows)]
    return [
        Row(where, functools.partial(_table_row, table, index, where))
        for index, where in enumerate(places)
    ]


def _table_row(table: Any, index: int, where: str) -> Mapping[str, Any]:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except ValueError as error:  # such as a string that is not UTF-8
        raise InputError(f"{where} cannot be read ({_line(error)}): correct it.") from None


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
    if not (datasets.config.HF_HUB_OFFLINE or hub_answers()):
        # Otherwise every request is tried again for half a minute before the cache is looked at.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        try:
            loaded = datasets.load_dataset(
                path, subset or None, split=split or None, revision=revision or None
            )
        except datasets.exceptions.DatasetGenerationError:
            # All splits are read at once, which fails where their columns differ.
            loaded = _one_split(path, subset, split, revision)
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
    splits = {str(name) for name in loaded.info.splits or ()} - {str(loaded.split)}
    return Rows(rows, names, other_splits=splits)


def _one_split(path: str, subset: str, split: str, revision: str) -> Any:
    """A split by itself, arguments as those of `hub_rows`.

    Raises:
      Exception: as ``load_dataset`` of datasets.
    """
    import datasets

    builder = datasets.load_dataset_builder(path, subset or None, revision=revision or None)
    files = {str(name): value for name, value in (builder.config.data_files or {}).items()}
    name = split.partition("[")[0] or next((n for n in HELDOUT_SPLITS if n in files), "")
    if name not in files:
        raise ValueError(f"it has the splits {', '.join(files) or '(none)'}")
    named = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    options = {
        field.name: getattr(builder.config, field.name)
        for field in dataclasses.fields(builder.config)
        if field.name not in named
    }
    *_, reader = type(builder).__module__.split(".")
    return datasets.load_dataset(
        reader, data_files={name: list(files[name])}, split=split or name, **options
    )


@functools.cache
def hub_answers() -> bool:
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
