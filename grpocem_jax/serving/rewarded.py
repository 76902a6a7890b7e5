"""Searches by a reward: one after another, a generation whenever it is their turn.

A reward judges decoded completions in Python, so such a search is not advanced together with those
of others.  It runs in a thread of its own that goes on only while `Rewarded.step` waits for it.
"""

import dataclasses
import logging
import queue
import threading
from collections.abc import Sequence

import jax

from grpocem_jax import adaptation, rollouts
from grpocem_jax.config import SearchConfig
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.search.loop import History
from grpocem_jax.serving.jobs import METHODS, Job, Progress, Waiting
from grpocem_jax.utils.errors import InputError

log = logging.getLogger("grpocem_jax.serving")


class _Ended(Exception):  # noqa: N818
    """Raised in a search that has been cancelled."""


class Rewarded:
    """Searches that wait, and the one that runs.

    One thread calls `step` again and again; any may `submit`.

    Args:
      run: what is adapted, its adapter the start of all searches.
      settings: of the searches; method, space, fitness and task are the jobs' own.
      max_queue: how many jobs may wait.
    """

    def __init__(self, run: TrainedRun, settings: SearchConfig, *, max_queue: int = 256):
        self._run, self._settings = run, settings
        self._waiting = Waiting(max_queue)
        self._go = threading.Semaphore(0)
        self._goes_on: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._job: Job | None = None

    def submit(
        self, items: Sequence[rollouts.Item], *, method: str, seed: int, generations: int
    ) -> Job:
        """Lets a job wait for its turn.

        Args:
          items: prompts of one task, `rollouts.encode`.
          method: "cem" or "experts".
          seed: of the PRNG key.
          generations: at most so many.

        Raises:
          QueueFullError: too many jobs wait.
        """
        return self._waiting.add(Job(method, generations, seed, items))

    def step(self) -> bool:
        """Lets the search that runs go on by a generation, or the next one begin.

        Returns:
          False where nothing is running.
        """
        if self._thread is None and not self._begin():
            return False
        self._go.release()
        if not self._goes_on.get():
            self._end()
        return True

    def close(self) -> None:
        """Cancels all jobs; called once `step` is called no more."""
        self._waiting.cancel()
        if self._job is not None:
            self._job.cancel()
        while self._thread is not None:
            self.step()

    def _begin(self) -> bool:
        if begun := self._waiting.begin():
            self._job = begun[0]
            self._thread = threading.Thread(
                target=self._search, args=begun, name="reward", daemon=True
            )
            self._thread.start()
        return self._thread is not None

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread = self._job = None

    def _search(self, job: Job, items: Sequence[rollouts.Item]) -> None:
        """The thread of a search."""

        def turn_is_over(done: int, history: History) -> None:
            if done <= job.generation:
                job.restart()
            job.note(Progress(done, float(max(history.best)), float(history.mean[-1])))
            self._goes_on.put(True)
            self._go.acquire()
            if job.ended:
                raise _Ended

        settings = dataclasses.replace(
            self._settings,
            **METHODS[job.method],
            fitness="reward",
            task=items[0].task.name,
            generations=job.generations,
        )
        self._go.acquire()
        try:
            found = adaptation.adapt(
                self._run,
                items,
                key=jax.random.key(job.seed),
                settings=settings,
                on_chunk=turn_is_over,
            )
            job.end("done", found)
        except _Ended:
            pass
        except InputError as error:
            job.end("failed", error=str(error))
        except Exception as error:  # such as a bug in a reward function
            log.exception("a search by reward failed")
            job.end("failed", error=f"the search failed ({type(error).__name__}).")
        finally:
            self._goes_on.put(False)
