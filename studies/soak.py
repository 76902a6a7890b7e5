"""Thousands of optimizer steps and adaptations in one process: memory and compiled programs.

    python -m studies.soak [--steps 2000] [--adaptations 2000] [--workdir DIR]

Trains with configs/tiny.py, with a checkpoint and an evaluation every 50 steps, and adapts what
came of it to prompts of all lengths, 4 generations each.  Prints on the way the resident memory of
the process, what of its heap is in use by glibc's account (0 with another C library), and the
number of compiled programs; at last how much memory grew in the second half of each part.  Ends
with status 1 where either grew by more than 2% or anything was compiled in the second half.
"""

import ctypes
import dataclasses
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import ml_collections
import numpy as np
from absl import flags

from grpocem_jax import adaptation
from grpocem_jax.config import commands
from grpocem_jax.config.files import load_config
from grpocem_jax.training import loop as training
from grpocem_jax.training.data import load_data

BOUND = 0.02
"""Growth of memory in the second half, as a share of it, that passes."""

OVERRIDES = {
    "data.validation_samples": 4,
    "train.checkpoint_every_steps": 50,
    "train.evaluate_every_steps": 50,
}
GENERATIONS = 4


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class _HeapInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def heap_mb() -> float:
    """What is allocated and not freed: unlike resident memory, it leaves out the heap's gaps."""
    report = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if report is None:
        return 0.0
    report.restype = _HeapInfo
    info = report()
    return float(info.uordblks + info.hblkhd) / 1e6


class Meter:
    """Memory and compiled programs after each of ``total`` things, printed ten times."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.compiled = what, total, 0
        self.samples: list[tuple[float, float, int]] = []
        print(f"{what:>12}{'resident MB':>14}{'heap MB':>10}{'programs':>10}", flush=True)

    def __enter__(self) -> "Meter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.compiled += event == "/jax/core/compile/backend_compile_duration"

    def count(self) -> None:
        """One more is done."""
        resident, heap = resident_mb(), heap_mb()
        self.samples.append((resident, heap, self.compiled))
        done = len(self.samples)
        if done % max(1, self.total // 10) == 0 or done == self.total:
            print(f"{done:>12}{resident:>14.1f}{heap:>10.1f}{self.compiled:>10}", flush=True)

    def verdict(self) -> bool:
        """Prints how the second half went and returns whether that passes."""
        half = self.samples[len(self.samples) // 2 :]
        compiled = half[-1][2] - half[0][2]
        good, said = compiled == 0, []
        for place, name in enumerate(("resident", "heap")):
            memory = [sample[place] for sample in half]
            slope = float(np.polyfit(range(len(half)), memory, 1)[0])
            good &= slope * len(half) <= BOUND * memory[0]
            said.append(f"{name} {slope * len(half):+.2f} MB ({1000 * slope:+.3f} MB a thousand)")
        print(
            f"second half of {len(self.samples)} {self.what}: {', '.join(said)}, "
            f"{compiled} programs compiled: {'flat' if good else 'NOT FLAT'}",
            flush=True,
        )
        return good


def train(config: ml_collections.ConfigDict, workdir: Path) -> Meter:
    """Trains ``config.train.max_steps`` steps."""
    meter = Meter("steps", config.train.max_steps)
    log = training.Run.log

    def counted(run: training.Run, record: dict[str, Any]) -> None:
        log(run, record)
        meter.count()

    with meter, mock.patch.object(training.Run, "log", counted):
        training.train(config, workdir)
    return meter


def adapt(count: int, workdir: Path) -> Meter:
    """Adapts the run in a directory so many times, to openings of its training prompts."""
    run = adaptation.load_run(workdir)
    settings = dataclasses.replace(run.config.search, generations=GENERATIONS)
    prompts = [item.example.prompt for item in load_data(run.config, run.policy).train]
    rng = random.Random(0)
    rng.shuffle(prompts)
    with Meter("adaptations", count) as meter:
        for number, prompt in zip(range(count), itertools.cycle(prompts), strict=False):
            words = prompt.split(" ")
            text = " ".join(words[: rng.randint(2, max(2, len(words)))])
            adaptation.adapt(run, text, key=jax.random.key(number), settings=settings)
            meter.count()
    return meter


def soak(
    steps: int, adaptations: int, workdir: Path, overrides: Mapping[str, Any] = OVERRIDES
) -> bool:
    """Runs both parts and returns whether memory and programs stayed as they were."""
    config = load_config("tiny")
    config.update_from_flattened_dict({"train.epochs": steps, **overrides})
    config.train.max_steps = steps
    meters = [train(config, workdir), adapt(adaptations, workdir)]
    return sum(meter.verdict() for meter in meters) == len(meters)


def main(argv: Sequence[str]) -> None:
    """Runs the study."""
    del argv
    values = flags.FLAGS
    folder = Path(values.workdir or tempfile.mkdtemp()) / "run"
    if not soak(values.steps, values.adaptations, folder):
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 2000, "Optimizer steps.", 2)
    flags.DEFINE_integer("adaptations", 2000, "Adaptations.", 2)
    flags.DEFINE_string("workdir", None, "Folder for the run; by default a temporary one.")
    commands.run(main)
