"""Threads in the place of processes, with a table between them."""

import threading

import jax
import numpy as np

from grpocem_jax.utils.processes import Processes


class Table:
    """What carries arrays between threads; whoever does not come within seconds is lost."""

    def __init__(self, count, wait_s=10.0):
        self.barrier = threading.Barrier(count)
        self.rows, self.wait_s = [None] * count, wait_s
        self.lock, self.sides = threading.Lock(), {}

    def side(self, members):
        """The table of some of them."""
        with self.lock:
            return self.sides.setdefault(members, Table(len(members), self.wait_s))

    def at(self, index):
        table = self

        class Seat:
            def meet(self, name):
                try:
                    table.barrier.wait(table.wait_s)
                except threading.BrokenBarrierError:
                    text = "DEADLINE_EXCEEDED: Barrier timed out. Some timed out task names:\n1\n"
                    raise jax.errors.JaxRuntimeError(text) from None

            def gather(self, row):
                table.rows[index] = row
                self.meet("")
                found = np.stack(table.rows)
                self.meet("")
                return found

            def total(self, row):
                return self.gather(row).sum(0)

            def among(self, members):
                return table.side(members).at(index - members.start)

        return Seat()


def together(count, function, wait_s=10.0, end_s=30):
    """What a function of the processes returns or raises in each of them."""
    table, found = Table(count, wait_s), [None] * count

    def run(index):
        try:
            found[index] = function(Processes(index, count, table.at(index)))
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(end_s)
    assert not any(thread.is_alive() for thread in threads)
    return found
