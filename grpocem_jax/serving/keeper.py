"""Searches under way: how far they are goes to the store, and what they found is kept there."""

import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

from grpocem_jax import adaptation
from grpocem_jax.adaptation.screens import adapted_card
from grpocem_jax.runs.screens import unit
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.store import Record
from grpocem_jax.utils.errors import InputError

log = logging.getLogger("grpocem_jax.serving")

INTERVAL_S = 0.2
"""Between looks at the searches of this server."""

OTHERS_S = 5.0
"""Between looks for searches of servers that have died."""


class Keeper:
    """A thread that follows searches until they end; a search is deleted by deleting its record.

    Args:
      catalogue: which knows the store and the form of an adapter.
    """

    def __init__(self, catalogue: Catalogue):
        self._catalogue, self._store = catalogue, catalogue.store
        self._jobs: dict[str, tuple[Record, Any]] = {}
        self._written: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; searches that have not ended stay as they are in the store."""
        self._ended.set()
        self._thread.join()

    def follow(self, record: Record, job: Any) -> None:
        """Follows a search until it ends."""
        with self._lock:
            self._jobs[record.id] = (record, job)

    def cancel(self, id: str) -> None:
        """Cancels the search of an adapter that has been deleted, if it is one of this server."""
        with self._lock:
            found = self._jobs.pop(id, None)
            self._written.pop(id, None)
        if found is not None:
            found[1].cancel()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(INTERVAL_S):
            try:
                try:
                    self.look()
                finally:
                    if time.monotonic() - looked > OTHERS_S:
                        looked = time.monotonic()
                        self._store.mark_interrupted()
            except Exception:  # such as a full disk, by many names: tried again
                log.exception("the store fails")
                self._ended.wait(OTHERS_S)

    def look(self) -> None:
        """Writes what has changed since the last look.

        Raises:
          Exception: the first for which a search that has ended could not be written; all others
            were, and the next look tries again.
        """
        with self._lock:
            jobs = dict(self._jobs)
        changed: dict[str, tuple[str, int]] = {}
        failure: Exception | None = None
        for id, (record, job) in jobs.items():
            state = job.state
            if state in ("queued", "running"):
                if self._written.get(id, ("queued", 0)) != (state, job.generation):
                    changed[id] = (state, int(job.generation))
                continue
            try:
                self._end(record, job, state)
            except Exception as error:
                failure = failure or error
                continue
            with self._lock:
                self._jobs.pop(id, None)
                self._written.pop(id, None)
        if changed:
            curves = {id: _curve(jobs[id][1]) for id in changed}
            for id in self._store.update(changed, curves):
                self.cancel(id)
            with self._lock:
                self._written |= {id: x for id, x in changed.items() if id in self._jobs}
        if failure is not None:
            raise failure

    def _end(self, record: Record, job: Any, state: str) -> None:
        last = {record.id: ("running", int(job.generation))}
        self._store.update(last, {record.id: _curve(job)})
        if state != "done":
            error = job.error
            text = "the search was cancelled"
            if state == "failed":
                log.error("the search of %s failed: %s", record.id, error)
                is_known = isinstance(error, InputError | str)
                text = str(error) if is_known else f"the search failed ({type(error).__name__})"
            self._store.end(record.id, "failed" if state == "failed" else "cancelled", text)
            return
        run, found = self._catalogue.run, job.result
        result = adaptation.summary(found)
        result["fitness_unit"] = unit("reward" if record.asked.get("reward") else "likelihood")

        def save(folder: Path) -> str:
            return self._catalogue.save(folder, found.offsets, adapted_card(run, result))

        self._store.keep(record, save, result, int(job.generation))


def _curve(job: Any) -> list[dict[str, Any]]:
    """The fitness of a search after each generation; None for what is not finite."""
    return [
        {
            name: value if math.isfinite(value) else None
            for name, value in progress._asdict().items()
        }
        for progress in job.curve
    ]
