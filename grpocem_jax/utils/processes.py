"""Many processes that run one program: who does what, and how they tell each other.

Every process runs the same code on the same settings. What is divided are independent rows: the
prompts of a step with all their completions, and the candidates of a population. Each process
computes its rows on its own devices, and what comes of them is gathered, so that everything after
it (advantages, the optimizer's step, the search's) is computed alike everywhere. No array spans
processes but for the moment in which it is gathered or summed, so nothing waits inside a program
for a process that has failed: each exchange begins by telling how the work of each went.

One process is the simplest case, `ALONE`: its rows are all rows, and nothing is exchanged.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.utils import memory
from grpocem_jax.utils.errors import InputError

T = TypeVar("T")

HEAD = 1024
"""Bytes in which what a process tells the others goes at once, where it is no longer."""


class ProcessLostError(InputError):
    """Another process has ended, or did not come in time; there is nobody left to agree with."""


class Transport(Protocol):
    """What carries arrays from one process to another; every process calls the same functions.

    Each may raise a `jax.errors.JaxRuntimeError` or a ValueError where a process is lost.
    """

    def meet(self, name: str) -> None:
        """Waits, for a limited time, until all processes are here; a name is used once."""

    def gather(self, row: np.ndarray) -> np.ndarray:
        """The rows ``[L]`` of all processes, of one length and type, ``[count, L]``."""

    def total(self, row: np.ndarray) -> np.ndarray:
        """The sum of the rows ``[L]`` of all processes, the same bits in each."""

    def among(self, members: range) -> "Transport":
        """What carries arrays between some processes, by their indices, this one among them."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


class Processes:
    """The processes of a program, as one of them sees them.

    Args:
      index: which this is, from 0.
      count: how many there are.
      transport: what carries something from one to another; None for a single process.
    """

    def __init__(self, index: int = 0, count: int = 1, transport: Transport | None = None):
        self.index, self.count, self._way = index, count, transport
        self._rounds, self._received = 0, 0
        self._first, self._sides = 0, list[Processes]()
        self._raised: BaseException | None = None
        self._stderr: Any = None

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes, locks, downloads, logs and speaks."""
        return self.index == 0

    @property
    def traffic(self) -> tuple[int, int]:
        """How often the processes have exchanged something, and the bytes that each has received.

        They are those of the arrays of the programs that gather and sum, on this one's side too.
        """
        told = [(self._rounds, self._received), *(side.traffic for side in self._sides)]
        return sum(rounds for rounds, _ in told), sum(received for _, received in told)

    def side(self, first: int) -> "Processes":
        """Those on this one's side, where the ``first`` processes do one thing, the others another.

        They divide their work, and tell each other of it, while the other side does its own; an
        error of one reaches the other side at the next exchange of all.

        Args:
          first: at least 1, below the number of processes.
        """
        members = range(first) if self.index < first else range(first, self.count)
        way = None if len(members) == 1 else self._transport.among(members)
        side = Processes(self.index - members.start, len(members), way)
        side._first, side._stderr = members.start, self._stderr
        self._sides.append(side)
        return side

    def own(self, total: int) -> range:
        """The rows of ``total`` that are this process's; the last ones may have fewer, or none."""
        size = -(-total // self.count)
        return range(min(self.index * size, total), min((self.index + 1) * size, total))

    def rows(self, total: int) -> np.ndarray:
        """The same, int ``[n]``, as many for each, so that all compile one program.

        The last row is repeated for it.
        """
        size = -(-total // self.count)
        return np.minimum(np.arange(self.index * size, (self.index + 1) * size), total - 1)

    def part(self, tree: T) -> T:
        """This process's rows of arrays with a leading axis that `divide_evenly` has looked at."""
        if self.count == 1:
            return tree
        rows = self.rows(len(jax.tree.leaves(tree)[0]))
        return jax.tree.map(lambda x: x[rows], tree)

    def divided(
        self,
        total: int,
        function: Callable[[np.ndarray], dict[str, Any]],
        kept: Collection[str] = (),
    ) -> dict[str, Any]:
        """What a function makes of rows, each process of its own.

        Args:
          total: number of rows, at least 1.
          function: given `rows`, returns arrays and lists by name, a leading axis of these rows.
          kept: names of what the other processes have no use for.

        Returns:
          the same of all rows; what is kept has zeros, or None in a list, where another process's
          rows are.
        """
        rows = self.rows(total)
        if self.count == 1:
            return function(rows)
        own: dict[str, Any] = {}

        def told() -> dict[str, Any]:
            own.update(_plain(function(rows)))
            return {name: value for name, value in own.items() if name not in kept}

        found = _joined(self.each(told), total)
        for name in own.keys() - found.keys():
            found[name] = _spaced(own[name], rows, total)
        return found

    def each(self, function: Callable[[], T], *, speaks: bool = True) -> list[T]:
        """What a function returns in each process, known to all.

        Args:
          function: returns numbers, text, None, arrays, and lists and dicts of them.
          speaks: whether what the function says on stderr is heard from every process, not from
            process 0 alone.

        Raises:
          InputError: it raised one, here or elsewhere; the first process's error is raised in all.
            An error of another kind is raised as such where it was, elsewhere as the nearest one:
            memory that ran out is memory that ran out everywhere, so that all go on alike.
          ProcessLostError: another process is not there any more.
        """
        if self.count == 1:
            return [function()]
        value, error = self._attempt(function, speaks=speaks)
        found, _ = self._exchange({"value": _plain(value)}, error)
        return [each["value"] for each in found]

    def first(self, function: Callable[[], T]) -> T:
        """What a function returns in process 0, where alone it is called; else as `each`."""
        return self.each(lambda: function() if self.writes else None)[0]  # type: ignore[return-value]

    def ahead(self, function: Callable[[], T]) -> T:
        """What a function returns in this process, called in process 0 before the others.

        What process 0 leaves in a shared cache, such as a download, the others find there.
        """
        if self.count == 1:
            return function()
        found: list[T] = []

        def here(turn: bool) -> None:
            if self.writes is turn:
                found.append(function())

        for turn in (True, False):
            self.each(functools.partial(here, turn))
        return found[0]

    def total(self, function: Callable[[], Any]) -> Any:
        """The sum over the processes of what a function returns: float32 arrays of one structure.

        Raises:
          InputError: as `each`.
        """
        if self.count == 1:
            return function()
        tree, error = self._attempt(lambda: jax.device_get(function()))
        leaves, structure = jax.tree.flatten(tree)
        flat = [np.asarray(x, np.float32).ravel() for x in leaves]
        _, sums = self._exchange({}, error, np.concatenate([np.zeros(0, np.float32), *flat]))
        cuts = np.cumsum([x.size for x in leaves])[:-1]
        shaped = [
            jnp.asarray(part.reshape(x.shape))
            for part, x in zip(np.split(sums, cuts), leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, shaped)

    def require_same(self, named: Mapping[str, Any]) -> None:
        """Refuses processes that were started on different things.

        Args:
          named: what must be equal, by name; JSON.

        Raises:
          InputError: the first difference, with its name and both values.
        """
        texts = {name: json.dumps(value, default=str) for name, value in named.items()}
        first, *others = self.each(lambda: texts)
        for number, other in enumerate(others, start=1):
            for name in sorted(first.keys() | other):
                if first.get(name) != other.get(name):
                    raise InputError(
                        f"{name} is {_brief(first.get(name))} in process 0 and "
                        f"{_brief(other.get(name))} in process {number}; start the same command "
                        "with the same code, data and weights in every process."
                    )

    def divide_evenly(self, count: int, what: str, fix: str) -> None:
        """Refuses a number of rows that is not the same for each process.

        Raises:
          InputError: ``what`` there is that many of, and the ``fix``.
        """
        if count % self.count:
            raise InputError(
                f"{what} cannot be divided evenly among {self.count} processes; {fix}."
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends the block alike in all processes: they leave it together, or with one's error."""
        if self.count == 1:
            yield
            return
        try:
            with self._quiet():
                yield
                self.each(lambda: None)
        except BaseException as error:
            if not self._known(error):
                with contextlib.suppress(BaseException):
                    self._exchange({}, error)
            raise

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Lets process 0 speak alone, but for the work that each process does by itself."""
        if self.writes:
            yield
            return
        self._stderr = sys.stderr
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield

    def _attempt(
        self, function: Callable[[], T], *, speaks: bool = True
    ) -> tuple[T | None, BaseException | None]:
        try:
            if self._stderr is None or not speaks:
                return function(), None
            with contextlib.redirect_stderr(self._stderr):
                return function(), None
        except BaseException as error:  # signals and exits too: the others must not wait
            return None, error

    def _known(self, error: BaseException) -> bool:
        """Whether an error is one that all processes have, or comes of one."""
        return any(
            each is self._raised or isinstance(each, ProcessLostError) for each in causes(error)
        )

    @property
    def _transport(self) -> Transport:
        assert self._way is not None
        return self._way

    def _gathered(self, row: np.ndarray) -> np.ndarray:
        self._received += row.nbytes * self.count
        return self._transport.gather(row)

    def _spread(self, content: bytes) -> list[bytes]:
        """The contents of all processes: what is short in one piece, the rest in a second one."""
        head = np.zeros(HEAD, np.uint8)
        head[:4] = np.array([len(content)], np.int32).view(np.uint8)
        rest = np.frombuffer(content, np.uint8)
        head[4 : 4 + len(rest)] = rest[: HEAD - 4]
        heads = self._gathered(head)
        sizes = np.ascontiguousarray(heads[:, :4]).view(np.int32)[:, 0]
        whole = heads[:, 4:]
        if sizes.max() > HEAD - 4:
            # Few lengths, as each is a program of its own.
            padded = np.zeros(1 << int(sizes.max() - (HEAD - 4) - 1).bit_length(), np.uint8)
            padded[: max(0, len(rest) - (HEAD - 4))] = rest[HEAD - 4 :]
            whole = np.concatenate([whole, self._gathered(padded)], axis=1)
        return [row[:size].tobytes() for row, size in zip(whole, sizes, strict=True)]

    def _exchange(
        self,
        value: dict[str, Any],
        error: BaseException | None,
        row: np.ndarray | None = None,
    ) -> tuple[list[Any], Any]:
        """What all processes bring, and the sum of their rows, or the first error of one of them.

        A signal does not break it off, as the others would wait for the rest.
        """
        outcome = shielded(lambda: self._round(value, error, row))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _round(
        self, value: dict[str, Any], error: BaseException | None, row: np.ndarray | None
    ) -> tuple[list[Any], Any] | BaseException:
        from flax import serialization  # it is loaded with a model, not with the package

        if error is not None:
            value = {"error": _told(error)}
        content = serialization.msgpack_serialize(value)
        self._rounds += 1
        try:
            self._transport.meet(f"grpocem_jax/{self._rounds}")
            found = [serialization.msgpack_restore(each) for each in self._spread(content)]
            failures = [i for i, each in enumerate(found) if "error" in each]
            if failures:
                # The first error that is one's own, and not what a side was told of another.
                failed = min(failures, key=lambda i: found[i]["error"]["retold"])
                own = error is not None and failed == self.index
                number = self._first + failed
                self._raised = error if own else _retold(found[failed]["error"], number)
                return self._raised or InputError("unknown")
            if row is None:
                return found, None
            self._received += row.nbytes
            return found, self._transport.total(row)
        except (jax.errors.JaxRuntimeError, ValueError) as gone:  # gloo's errors are ValueErrors
            found_lost = ProcessLostError(lost(gone))
            found_lost.__cause__ = error or gone
            return found_lost


def shielded(work: Callable[[], T]) -> T:
    """What some work returns, though a signal comes meanwhile; that is raised when it is done.

    A second one is raised at once. What the work returns goes before where it is an error.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    # Signals are handled in the main thread, which must be able to.
    done = threading.Event()  # a join that was interrupted cannot be taken up again
    thread = threading.Thread(target=run, daemon=True)
    stopped: BaseException | None = None
    try:
        thread.start()
        done.wait()
    except (KeyboardInterrupt, SystemExit) as signalled:
        stopped = signalled
        if not done.wait(1.0) and not thread.is_alive():
            raise  # it came before the thread was there
        done.wait()
    if errors:
        raise errors[0]
    if stopped is not None and not isinstance(results[0], BaseException):
        raise stopped
    return results[0]


ALONE = Processes()
"""A program of one process."""


def _plain(value: Any) -> Any:
    """A value as msgpack takes it: arrays on the host, lists for tuples."""
    if isinstance(value, jax.Array):
        return np.asarray(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _joined(parts: Sequence[dict[str, Any]], total: int) -> dict[str, Any]:
    """The rows of all parts, as many as there are."""
    joined: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(value, list):
            joined[name] = [row for part in values for row in part][:total]
        else:
            joined[name] = np.concatenate(values)[:total]
    return joined


def _spaced(value: Any, rows: np.ndarray, total: int) -> Any:
    """Some rows in their places among ``total``."""
    if isinstance(value, list):
        listed = [None] * total
        for row, each in zip(rows, value, strict=True):
            listed[row] = each
        return listed
    spaced = np.zeros((total, *value.shape[1:]), value.dtype)
    spaced[rows] = value
    return spaced


def _told(error: BaseException) -> dict[str, Any]:
    """An error as the other processes need it."""
    told: dict[str, Any] = {"text": str(error), "retold": getattr(error, "retold", False)}
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return {**told, "kind": "exit", "code": code}
    if isinstance(error, KeyboardInterrupt):
        return {**told, "kind": "exit", "code": 130, "text": "interrupted"}
    if isinstance(error, InputError):
        return {**told, "kind": "input"}
    if isinstance(error, Exception) and memory.ran_out(error):
        return {**told, "kind": "memory"}
    return {**told, "kind": "other", "text": f"{type(error).__name__}: {error}"}


def _retold(told: Mapping[str, Any], number: int) -> BaseException:
    """The error of another process, as it is raised here."""
    text = told["text"]
    error: BaseException
    if told["kind"] == "exit":
        error = SystemExit(told["code"])
    elif told["kind"] == "memory":
        error = jax.errors.JaxRuntimeError(text)
    elif told["kind"] == "input":
        error = InputError(f"process {number}: {text}")
    else:
        error = RuntimeError(f"process {number}: {text}")
    error.retold = True  # type: ignore[attr-defined]
    return error


def lost(error: Exception) -> str:
    """Who is lost, of what the runtime says."""
    text = str(error)
    if "DEADLINE_EXCEEDED" in text:
        late = re.findall(r"^(?:/job:\w+/task:)?(\d+)\s*$", text.partition("task names:")[2], re.M)
        who = f"process {' and '.join(late)}" if late else "another process"
        return (
            f"{who} did not come to where the others wait, in the time of --wait_s: it hangs, or "
            "its work takes longer; end it, and start the same command again in every process, "
            "which continues the run; data.reward_timeout_s bounds the calls of a reward function."
        )
    dead = re.search(r"Task (?:/job:\w+/task:)?(\d+) heartbeat", text)
    who = f"process {dead[1]} has ended or cannot be reached" if dead else "another process is gone"
    reason = (text.splitlines() or [""])[0][:160]
    return (
        f"{who} ({reason}); start the same command again in every process, which continues the run "
        "from its last checkpoint."
    )


def _brief(text: str | None) -> str:
    if text is None:
        return "not there"
    return text if len(text) <= 80 else f"{text[:79]}…"
