"""Progress of a command that runs long."""

import math
import sys
import time

from tqdm.auto import tqdm

from grpocem_jax.utils.terminal import encodable, in_notebook, messages, say, unread


class Progress:
    """Progress on stderr: a bar on a terminal, one of its own in a notebook; in a file a line at
    first, every half minute, and at last, without control characters."""

    interval_s = 30.0

    def __init__(self, total: int):
        shown = sys.stderr.isatty() or in_notebook()
        self._bar = tqdm(
            total=total, unit="step", dynamic_ncols=True, disable=not shown, file=messages()
        )
        self._total, self._shown = total, -math.inf
        self._first: tuple[int, float] | None = None

    def update(self, done: int, **values: str) -> None:
        """Shows that ``done`` steps are done, with some values by name."""
        with unread(sys.stderr):
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(done - self._bar.n)
        now = time.monotonic()
        # The time of the first update is mostly compilation, and says nothing of those to come.
        first, started = self._first = self._first or (done, now)
        if self._bar.disable and (now - self._shown >= self.interval_s or done == self._total):
            self._shown = now
            pairs = [f"{name} {value}" for name, value in values.items()]
            if first < done < self._total:
                left = (now - started) / (done - first) * (self._total - done)
                pairs.append(f"about {left:.0f} s left")
            say("  ".join([f"step {done}/{self._total}", *pairs]), sys.stderr)

    @staticmethod
    def write(text: str) -> None:
        """Writes text above the bar."""
        with unread(sys.stderr):
            tqdm.write(encodable(text, messages()), file=messages())

    def close(self) -> None:
        """Ends the line of the bar."""
        with unread(sys.stderr):
            self._bar.close()
