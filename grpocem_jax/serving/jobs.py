"""Searches that were asked for: what any thread sees of one, and those that wait for their turn."""

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpocem_jax.adaptation.workflow import Adaptation
from grpocem_jax.utils.errors import InputError

METHODS: Mapping[str, dict[str, Any]] = {
    "gradient": {"method": "gradient", "space": "full"},
    "cem": {"method": "cem", "space": "full"},
    "experts": {"method": "cem", "space": "experts"},
}
"""What a job may ask for, as settings of the search."""


class QueueFullError(InputError):
    """There are as many waiting jobs as may wait; later there will be room again."""


class Progress(NamedTuple):
    """Where a job is after some generation.

    Attributes:
      generation: generations run, by the longer of two searches.
      best: largest fitness so far, nats per token.
      mean: mean fitness of the candidates of the last generation.
    """

    generation: int
    best: float
    mean: float


class Job:
    """An adaptation that was asked for; any thread may read it, and cancel it.

    What runs it calls `begin` when it has its turn, `note` after each generation, and `end`.

    Attributes:
      method: one of `METHODS`.
      generations: at most so many.
      seed: of its PRNG key.
    """

    def __init__(self, method: str, generations: int, seed: int, subject: Any):
        """A job that waits; ``subject`` is what to adapt to, for what runs it."""
        self.method, self.generations, self.seed = method, generations, seed
        self._subject = subject
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._state = "queued"
        self._curve: list[Progress] = []
        self._result: Adaptation | None = None
        self._error: str | None = None

    @property
    def state(self) -> str:
        """One of "queued", "running", "done", "failed" and "cancelled"."""
        return self._state

    @property
    def result(self) -> Adaptation | None:
        """What was found; None before the job is done."""
        return self._result

    @property
    def error(self) -> str | None:
        """Why the job failed, in one sentence; None where it did not."""
        return self._error

    @property
    def curve(self) -> tuple[Progress, ...]:
        """Where the job was after each generation."""
        with self._lock:
            return tuple(self._curve)

    @property
    def progress(self) -> Progress | None:
        """Where the job is; None before the first generation."""
        with self._lock:
            return self._curve[-1] if self._curve else None

    @property
    def generation(self) -> int:
        """Generations run."""
        progress = self.progress
        return progress.generation if progress else 0

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self._ended.is_set()

    def cancel(self) -> bool:
        """Ends the job, and frees its place before the next generation.

        Returns:
          whether it had not ended before.
        """
        return self.end("cancelled")

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the job has ended, or ``timeout`` seconds; whether it has."""
        return self._ended.wait(timeout)

    def begin(self) -> Any:
        """Says that the job has its turn; returns its subject, or None where it has ended."""
        with self._lock:
            if not self._ended.is_set():
                self._state = "running"
            return self._subject

    def note(self, progress: Progress) -> None:
        """Says where the job is after a generation."""
        with self._lock:
            if not self._curve or progress.generation > self._curve[-1].generation:
                self._curve.append(progress)

    def restart(self) -> None:
        """Forgets the generations of searches by halves, before that by all texts."""
        with self._lock:
            self._curve = []

    def end(self, state: str, result: Adaptation | None = None, error: str | None = None) -> bool:
        """Ends the job.

        Args:
          state: "done", "failed" or "cancelled".
          result: what was found, where it is done.
          error: why it failed, in one sentence.

        Returns:
          whether it had not ended before; else nothing changes.
        """
        with self._lock:
            if self._ended.is_set():
                return False
            # The state last: who sees it sees the rest too.
            self._result, self._error = result, error
            self._state = state
            self._ended.set()
            self._subject = None
            return True


class Waiting:
    """Jobs that wait, in the order in which they came; for any thread."""

    def __init__(self, most: int):
        """No more than ``most`` may wait."""
        self._most = most
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many wait, without those that have been cancelled."""
        with self._lock:
            return sum(not job.ended for job in self._jobs)

    def add(self, job: Job) -> Job:
        """Lets a job wait; returns it.

        Raises:
          QueueFullError: too many wait.
        """
        with self._lock:
            self._jobs = deque(each for each in self._jobs if not each.ended)
            if len(self._jobs) >= self._most:
                raise QueueFullError(
                    f"{len(self._jobs)} jobs wait, which is as many as may (max_queue); try again "
                    "later."
                )
            self._jobs.append(job)
        return job

    def begin(self) -> tuple[Job, Any] | None:
        """The next job that has not ended, which has begun, and its subject; None where none is."""
        with self._lock:
            while self._jobs:
                job = self._jobs.popleft()
                if (subject := job.begin()) is not None:
                    return job, subject
        return None

    def cancel(self) -> None:
        """Cancels all that wait."""
        with self._lock:
            for job in self._jobs:
                job.cancel()
