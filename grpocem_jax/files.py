"""Files and folders that are either whole or not there: JSON, safetensors, a folder of files."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from grpocem_jax.errors import InputError

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


def cache_folder() -> Path:
    """``grpocem_jax`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; it may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grpocem_jax"


def _partial(path: Path) -> Path:
    """A name beside ``path`` that no other process writes to."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
