"""Work beside other work: in a thread of its own, for which the other waits a while at most."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("grpocem_jax.serving")

SLICE_S = 0.005
"""Between looks whether the caller has something else to do."""

LEAST_SHARE = 0.01


class Aside:
    """Steps of some work, each begun by a call and done in one thread.

    A step takes the caller's time, so that a caller who gives such work a share of its time, as
    `Engine.run` does, is exact.  One that takes longer than ``patience_s``, such as one for which a
    program is compiled, goes on beside the caller, and so does one that was begun while the caller
    had nothing else to do, once it has.  For the time that a step took beside the caller, the
    caller is left alone afterwards, so that the share holds.

    Args:
      step: the work; returns whether there is more.  What it raises is logged.
      is_busy: whether the caller has anything else to do.
      patience_s: the longest that a call waits for a step.
      share: of the time that the work gets, above 0; with 0 as with the least.
    """

    def __init__(
        self,
        step: Callable[[], bool],
        is_busy: Callable[[], bool],
        *,
        patience_s: float,
        share: float,
    ):
        self._step, self._is_busy, self._patience_s = step, is_busy, patience_s
        self._pause = 1 / max(share, LEAST_SHARE) - 1
        self._begin, self._done = threading.Semaphore(0), threading.Event()
        self._more = self._under_way = self._closed = False
        self._left_at: float | None = None
        self._ended_at = self._not_before = 0.0
        self._thread: threading.Thread | None = None

    def __call__(self) -> bool:
        """Begins a step, or looks whether the one under way is done.

        Returns:
          whether there is more to do.
        """
        was_busy, began = self._is_busy(), time.monotonic()
        if self._under_way:
            if was_busy and not self._done.is_set():
                return True
        elif was_busy and began < self._not_before:
            return True
        else:
            self._start()
        while not self._done.wait(SLICE_S):
            interrupted = not was_busy and self._is_busy()
            if interrupted or time.monotonic() - began > self._patience_s:
                self._left_at = self._left_at or time.monotonic()
                return True
        if self._left_at is not None:
            beside = max(0.0, self._ended_at - self._left_at)
            self._not_before = self._ended_at + self._pause * beside
            self._left_at = None
        self._under_way = False
        return self._more

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="searches", daemon=True)
            self._thread.start()
        self._done.clear()
        self._under_way = True
        self._begin.release()

    def close(self) -> None:
        """Waits for the step under way; no call may follow."""
        self._closed = True
        self._begin.release()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._begin.acquire()
            if self._closed:
                return
            self._more = True
            try:
                self._more = self._step()
            except Exception:
                log.exception("a step beside the completions failed")
            self._ended_at = time.monotonic()
            self._done.set()
