"""Work beside other work: in a thread of its own, for which the other waits a while at most."""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("grpocem_jax.serving")


class Aside:
    """Steps of some work, each begun by a call and done in one thread.

    A step that is done within ``patience_s`` takes the caller's time, so that a caller who gives
    such work a share of its time, as `Engine.run` does, is exact.  One that takes longer, such as
    one for which a program is compiled, goes on beside the caller.

    Args:
      step: the work; returns whether there is more.  What it raises is logged.
      patience_s: the longest that a call waits for a step.
    """

    def __init__(self, step: Callable[[], bool], *, patience_s: float):
        self._step, self._patience_s = step, patience_s
        self._begin, self._done = threading.Semaphore(0), threading.Event()
        self._more = self._under_way = self._closed = False
        self._thread: threading.Thread | None = None

    def __call__(self, *, idle: bool) -> bool:
        """Begins a step, or looks whether the one under way is done.

        Args:
          idle: whether the caller has nothing else to do, and may as well wait for a step that
            takes long.

        Returns:
          whether there is more to do.
        """
        if not self._under_way:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="searches", daemon=True)
                self._thread.start()
            self._done.clear()
            self._under_way = True
            self._begin.release()
            done = self._done.wait(self._patience_s)
        else:
            done = self._done.wait(self._patience_s if idle else 0)
        if not done:
            return True
        self._under_way = False
        return self._more

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
            self._done.set()
