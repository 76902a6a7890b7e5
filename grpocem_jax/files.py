"""Files that are either whole or not there: JSON and safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; NaN and infinity, which JSON lacks, raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, in the layout transformers reads."""
    partial = _partial(path)
    # safetensors takes the memory of a transposed array as it lies, and lets only its owner read.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)


def cache_folder() -> Path:
    """``grpocem_jax`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; it may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grpocem_jax"


def _partial(path: Path) -> Path:
    """A name beside ``path`` that no other process writes to."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
