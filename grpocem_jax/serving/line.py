"""Requests that wait for a slot, in the order in which they came."""

import collections
import queue
import threading
from collections.abc import Callable

from grpocem_jax.serving.requests import Ticket


class Line:
    """Tickets that wait; any thread may add to them.

    Attributes:
      added: how many have come.
    """

    def __init__(self, most: int):
        """No more than ``most`` may wait."""
        self._most = most
        self._tickets: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self.added = 0

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def first(self) -> Ticket | None:
        """The one that waits longest; None where none does."""
        with self._changed:
            return self._tickets[0] if self._tickets else None

    def check_room(self) -> None:
        """Refuses one more where there is no room.

        Raises:
          queue.Full: as many wait as may, or the line is closed.
        """
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._closed:
            raise queue.Full("the engine has stopped")
        if sum(not ticket.cancelled for ticket in self._tickets) >= self._most:
            raise queue.Full(f"{self._most} requests wait already")

    def add(self, ticket: Ticket) -> None:
        """Lets a ticket wait.

        Raises:
          queue.Full: as `check_room`.
        """
        with self._changed:
            self._check()
            self._tickets.append(ticket)
            self.added += 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Waits until a ticket does, at most so long."""
        with self._changed:
            if not self._tickets:
                self._changed.wait(seconds)

    def drop_cancelled(self) -> list[Ticket]:
        """Takes out those that nobody waits for any more."""
        with self._changed:
            dropped = [ticket for ticket in self._tickets if ticket.cancelled]
            for ticket in dropped:
                self._tickets.remove(ticket)
        return dropped

    def take(self, count: int, at_once: Callable[[int], int], *, look: int) -> list[Ticket]:
        """Takes out the one that waits longest and others of its bucket.

        Args:
          count: tickets, at most.
          at_once: how many different prompts of a bucket there may be.
          look: how many tickets are looked at, as a line may be long.
        """
        batch: list[Ticket] = []
        passed: list[Ticket] = []
        prompts: set[object] = set()
        with self._changed:
            for _ in range(min(len(self._tickets), look)):
                if len(batch) == count:
                    break
                ticket = self._tickets.popleft()
                size = batch[0]._size if batch else ticket._size
                fits = ticket._prompt in prompts or len(prompts) < at_once(size)
                if ticket._size == size and fits:
                    batch.append(ticket)
                    prompts.add(ticket._prompt)
                else:
                    passed.append(ticket)
            self._tickets.extendleft(reversed(passed))
        return batch

    def close(self) -> list[Ticket]:
        """Takes no more, and gives out those that waited."""
        with self._changed:
            self._closed = True
            left = list(self._tickets)
            self._tickets.clear()
        return left
