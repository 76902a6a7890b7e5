"""What a run writes down: JSON lines, compile time, memory, versions."""

import contextlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, TextIO

import jax

from grpocem_jax.errors import InputError


class JsonLines:
    """Appends one JSON object a line, each flushed when written.

    Args:
      path: of the file, made with the first record where it is not there.
      size: bytes of it to keep, what a checkpoint knows of; None keeps all.

    Raises:
      InputError: the file has fewer bytes.
    """

    def __init__(self, path: Path, size: int | None = None):
        if size is not None:
            present = path.stat().st_size if path.exists() else 0
            if present < size:
                raise InputError(
                    f"{path}: has {present} bytes, but the checkpoint was made at {size}; put the "
                    "file back, or delete that checkpoint to continue from the one before."
                )
            if present:
                os.truncate(path, size)
        self._path = path
        self._file: TextIO | None = None

    @property
    def size(self) -> int:
        """Bytes written."""
        if self._file is None:
            return self._path.stat().st_size if self._path.exists() else 0
        return self._file.tell()

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record; NaN and infinity, which JSON lacks, are refused (ValueError)."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
            self._file.seek(0, os.SEEK_END)
        self._file.write(line + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until what was written is on the disk, where a loss of power leaves it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def peak_memory_bytes() -> int | None:
    """The largest memory in use on the first device, or None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def environment() -> dict[str, Any]:
    """Platform and versions, for summary.json."""
    packages = ("grpocem_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "python": platform.python_version(),
        "versions": versions,
    }
