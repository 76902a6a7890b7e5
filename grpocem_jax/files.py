"""Files and folders that are either whole or not there: JSON, safetensors, a folder of files."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file."""
    partial = _partial(path)
    partial.write_bytes(content)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; NaN and infinity, which JSON lacks, raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, in the layout transformers reads."""
    partial = _partial(path)
    # safetensors takes the memory of a transposed array as it lies, and lets only its owner read.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)


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
