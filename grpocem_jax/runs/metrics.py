"""What a run writes down: JSON lines, memory, versions."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError


class JsonLines:
    """Appends one JSON object a line, each flushed when written.

    Args:
      path: of the file, made with the first record where it is not there.
      size: bytes of it to keep, what a checkpoint knows of; None keeps all.
      written: whether anything is; of several processes one writes.

    Raises:
      InputError: the file has fewer bytes.
    """

    def __init__(self, path: Path, size: int | None = None, *, written: bool = True):
        self._written = written
        if size is not None and written:
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
        if not self._written:
            return 0
        if self._file is None:
            return self._path.stat().st_size if self._path.exists() else 0
        return self._file.tell()

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record; NaN and infinity, which JSON lacks, are refused (ValueError)."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        if not self._written:
            return
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


def last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last records of a file of JSON lines, at most ``count``; none of a file not there."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[-count - 1 :] if line]


ZERO_STD = "frac_reward_zero_std"
"""The share of groups with equal rewards, of all tasks; behind it and a slash that of one."""

WINDOW = 20
"""Steps, the last ones, by which a task is judged to be without signal."""

FLAT = 0.9
"""Share of a task's groups with equal rewards from which on it is."""


def without_signal(records: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """Tasks nearly all of whose groups had equal rewards, with the share of those groups.

    Args:
      records: lines of metrics.jsonl; the last `WINDOW` count.
    """
    shares: dict[str, list[float]] = {}
    for record in list(records)[-WINDOW:]:
        for name, value in record.items():
            if name.startswith(f"{ZERO_STD}/") and value is not None:
                shares.setdefault(name.removeprefix(f"{ZERO_STD}/"), []).append(value)
    means = {task: float(np.mean(values)) for task, values in shares.items()}
    return {task: share for task, share in means.items() if share >= FLAT}


def signal_lines(
    records: Collection[Mapping[str, Any]],
    temperature: float | None,
    unchanged: Collection[str] = (),
) -> list[str]:
    """A sentence for each task `without_signal`: what that means, and what to do.

    Args:
      records: lines of metrics.jsonl.
      temperature: ``generation.temperature``, or None where it is not known.
      unchanged: tasks whose held-out gain is exactly 0.
    """
    now = "" if temperature is None else f" than generation.temperature={temperature:g}"
    steps = min(len(records), WINDOW)
    last = f"the last {steps} steps" if steps > 1 else "the last step"
    return [
        f"{task}: in {last} {share:.0%} of the groups had equal rewards, and such a group teaches "
        "nothing"
        + (", hence the held-out gain of exactly 0" if task in unchanged else "")
        + "; give prompts that are neither too easy nor too hard, a reward that tells answers "
        f"apart more finely, or a higher temperature{now}."
        for task, share in without_signal(records).items()
    ]


def peak_memory_bytes() -> int | None:
    """The largest memory in use on the first device, or None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def invocation() -> dict[str, Any]:
    """The command line and what code it ran, for run.json.

    Returns:
      ``command``; ``version`` of the package; ``commit`` of the checkout that it lies in, with
      ``-dirty`` behind it where files there differ, None of an installed package.
    """
    script, *arguments = sys.argv or [""]
    start = f"python {script}" if script.endswith(".py") else Path(script).name
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("grpocem_jax")
    return {
        "command": " ".join([start, *map(shlex.quote, arguments)]),
        "version": version,
        "commit": _commit(Path(__file__).parents[2]),
    }


def _commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


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
        "float32_products": devices.float32_products(device),
        "python": platform.python_version(),
        "versions": versions,
    }
