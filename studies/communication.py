"""What a step costs on links between processes, on paper, from the bytes that are counted.

    python -m studies.communication [--completions 64] [--trained 7368] [--step_s 0.106] \
        [--candidate_s 1.887e-5]

Makes the exchanges of a training step and of a generation of CEM with a transport that only counts,
for 1 to 512 processes of 8 devices each.  The time on the links is that of NCCL's own model of a
ring over a network (`baseLat` and `hwLat` of its src/graph/tuning.cc, protocol LL): 6.6 us for each
collective, and 2.7 us for each hop.  The defaults are the report's setting on an H100, 64
completions in 0.106 s, and 53,000 candidates a second (docs/benchmarks.md).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import common
from grpocem_jax.config import commands
from grpocem_jax.utils.processes import Processes

DEVICES = 8
"""Of a process."""

BYTES_PER_S = 50e9
"""Of a process: 400 Gb/s InfiniBand."""

COLLECTIVE_S, HOP_S = 6.6e-6, 2.7e-6


class Counting:
    """A transport without others behind it: what this process sends, it receives of each."""

    def __init__(self, count: int):
        self.count, self.collectives = count, 0

    def meet(self, name: str) -> None:
        """Waits for nobody."""

    def gather(self, row: np.ndarray) -> np.ndarray:
        """The row, once for each process."""
        self.collectives += 1
        return np.broadcast_to(row, (self.count, *row.shape))

    def total(self, row: np.ndarray) -> np.ndarray:
        """The row; the sum is not of interest."""
        self.collectives += 1
        return row

    def among(self, members: range) -> "Counting":
        """The same for so many."""
        return Counting(len(members))


class Cost(NamedTuple):
    """What goes through the links of a process."""

    received: int
    collectives: int
    seconds: float


def cost(count: int, exchange: Callable[[Processes], Any]) -> Cost:
    """What some exchanges among so many processes cost each of them."""
    transport = Counting(count)
    processes = Processes(0, count, transport)
    if count > 1:
        exchange(processes)
    received = processes.traffic[1]
    steps = transport.collectives * (COLLECTIVE_S + (count - 1) * HOP_S)
    return Cost(received, transport.collectives, received / BYTES_PER_S + steps)


def step(processes: Processes, number: int, trained: int, judges: int = 2) -> None:
    """What processes exchange in a training step whose texts are not written down.

    Args:
      processes: of `cost`.
      number: completions of each process.
      trained: numbers of the adapter.
      judges: reward functions.
    """
    rows = processes.count

    def completed(own: np.ndarray) -> dict[str, np.ndarray]:
        shape = (len(own), number)
        return {
            "lengths": np.zeros(shape, np.int32),
            "finite": np.ones(shape, bool),
            "cut": np.zeros(shape, bool),
        }

    rewards = np.zeros((1, number), np.float32)
    scores = {str(judge): rewards for judge in range(judges)}
    processes.divided(rows, completed)
    processes.each(lambda: {"total": rewards, "functions": scores, "errors": None})
    processes.total(lambda: {"gradient": np.zeros(trained, np.float32), "metrics": np.zeros(8)})
    processes.each(lambda: {"signal": 0, "due": False, "at": "0" * 64})


def generation(processes: Processes, number: int) -> None:
    """What processes exchange in a generation of CEM with so many candidates each."""
    fitness = np.zeros(number, np.float32)
    processes.divided(processes.count * number, lambda own: {"fitness": fitness})


def enough(seconds: float, exchange: Callable[..., Any], count: int) -> int:
    """How much of a device, a power of two, keeps the efficiency above 0.9.

    Args:
      seconds: of computing one on a device.
      exchange: with a `number` of them in each process.
      count: processes.
    """
    for power in itertools.count():
        of_each = DEVICES * 2**power
        needed = cost(count, functools.partial(exchange, number=of_each)).seconds
        if needed <= 2**power * seconds / 9:
            return 2**power
    raise AssertionError


def table(
    completions: int, trained: int, step_s: float, candidate_s: float
) -> Sequence[Sequence[str]]:
    """The rows that are printed, the first of them the names."""
    rows = [
        (
            "devices",
            "processes",
            "received in a step",
            "collectives",
            "time",
            "efficiency",
            "completions for 0.9",
            "candidates for 0.9",
        )
    ]
    for count in (1, 8, 64, 512):
        found = cost(count, lambda x: step(x, DEVICES * completions, trained))
        least = enough(step_s / completions, functools.partial(step, trained=trained), count)
        fewest = enough(candidate_s, generation, count)
        rows.append(
            (
                f"{DEVICES * count:,}",
                str(count),
                f"{found.received / 1e3:,.0f} kB",
                str(found.collectives),
                f"{1e3 * found.seconds:.2f} ms",
                f"{step_s / (step_s + found.seconds):.3f}",
                str(least),
                str(fewest),
            )
        )
    return rows


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    values = flags.FLAGS
    print(
        common.table(table(values.completions, values.trained, values.step_s, values.candidate_s))
    )


if __name__ == "__main__":
    flags.DEFINE_integer("completions", 64, "Of a step on each device.", 1)
    flags.DEFINE_integer("trained", 7368, "Numbers of the adapter.", 1)
    flags.DEFINE_float("step_s", 0.106, "Seconds of a step with so many completions.", 0.0)
    flags.DEFINE_float("candidate_s", 1 / 52_998, "Seconds for a candidate.", 0.0)
    commands.run(main)
