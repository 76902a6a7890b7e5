"""Files and folders that are either whole or not there: JSON, safetensors, a folder of files."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from grpocem_jax.utils.errors import InputError

REFUSED = [
    os.strerror(number)
    for number in (
        *(errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM),
        errno.EROFS,
    )
]
"""What the system says where a disk is full or must not be written."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file."""
    with _in_one_piece(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; NaN and infinity, which JSON lacks, raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, in the layout transformers reads."""
    # safetensors takes the memory of a transposed array as it lies, and lets only its owner read.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with _in_one_piece(path) as partial:
        save_file(contiguous, partial, metadata={"format": "pt"})
        partial.chmod(0o644)


@contextlib.contextmanager
def writing(where: str, fix: str) -> Iterator[None]:
    """Says in one sentence that the disk does not take what the block writes.

    Libraries wrap the system's error in others of their own, so it is known by its text.

    Args:
      where: the flag and its folder.
      fix: what to do.

    Raises:
      InputError: the disk is full, must not be written, or fails.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = next((text for text in REFUSED if text in str(error)), None)
        if reason is None:
            raise
        raise InputError(f"{where}: cannot be written ({reason}); {fix}.") from error


@contextlib.contextmanager
def _in_one_piece(path: Path) -> Iterator[Path]:
    """Gives a file beside ``path`` to write, which takes that name when the block ends."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_object(path: Path, *, fix: str) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
      path: the file.
      fix: what to do where it cannot be read, for the message.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {fix}.") from None
    return parse_object(text, str(path), fix=fix)


def parse_object(text: str, where: str, *, fix: str) -> dict[str, Any]:
    """Reads a JSON object from text; ``where`` it lies and the ``fix`` are for the message.

    Raises:
      InputError: the text is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be read as JSON ({error}); {fix}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: is no JSON object; {fix}.")
    return value


def read_arrays(path: Path, *, fix: str) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Args:
      path: the file.
      fix: what to do where it cannot be read, for the message.

    Raises:
      InputError: no such file, or one that is damaged or in another format.
    """
    try:
        return load_file(path)
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); {fix}.") from None


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder of that name; False also for what no file system takes as one."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name; False also for what no file system takes as one."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside ``path`` to fill, which takes that name when the block ends.

    The folders above are made. Where anything goes wrong in the block, nothing is left at ``path``
    or beside it.
    """
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def expand(path: str | Path, field: str) -> Path:
    """A path in which ``~`` or ``~user`` at the start is replaced by the home directory.

    Args:
      path: the path.
      field: the flag or setting it was given as, for the message.

    Raises:
      InputError: there is no such user, or this one has no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{field}={str(path)!r}: no home directory is known for {Path(path).parts[0]!r}; write "
            "the path in full, or set HOME."
        ) from None


@contextlib.contextmanager
def some_home() -> Iterator[None]:
    """Lets the block find a home directory where there is none: that of temporary files.

    Some libraries cannot be imported without, though they write nothing there.
    """
    if os.path.expanduser("~") != "~":
        yield
        return
    before = os.environ.get("HOME")
    os.environ["HOME"] = tempfile.gettempdir()
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


def cache_folder() -> Path | None:
    """``grpocem_jax`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; made if it is not there.

    Returns:
      the folder, or None where there is no home directory or the folder cannot be written to.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = root / "grpocem_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _partial(path: Path) -> Path:
    """A name beside ``path`` that no other process writes to."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
