"""Calls of reward functions, which are the user's own code: copies, time limits, second tries.

Functions written with ``async def`` are awaited together, in one event loop for all calls of a
step; the others are called one after the other.
"""

import asyncio
import copy
import functools
import inspect
import queue
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpocem_jax.tasks.base import Example, Reward, Task
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import say

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before the second try of a call; each pause is twice the one before, up to the longest."""


class Call(NamedTuple):
    """One call of a reward function: all completions of a task.

    Attributes:
      function: an outcome or a process reward.
      task: the task, for its settings of time limit, second tries and errors.
      examples: the example of each completion, ``[n]``.
      completions: the texts, ``[n]``.
    """

    function: Callable[..., Any]
    task: Task
    examples: Sequence[Example]
    completions: Sequence[str]

    @property
    def name(self) -> str:
        """The function's own name."""
        return Reward(self.function).name

    @property
    def columns(self) -> list[str]:
        """The columns that the function gets beside prompts and completions."""
        names = dict.fromkeys(name for example in self.examples for name in example.columns)
        if self.task.own:
            names.pop("prompt", None)
        return list(names)

    @property
    def where(self) -> str:
        """The batch, in words."""
        count, prompt = len(self.completions), self.examples[0].prompt
        return f"for {count} completions of the task {self.task.name}, the first of {prompt!r}"

    def start(self, rows: Sequence[int]) -> Any:
        """Calls the function for some completions, with copies that it may change as it likes."""
        return self.function(
            prompts=[self.examples[row].prompt for row in rows],
            completions=[self.completions[row] for row in rows],
            **{
                name: [copy.deepcopy(self.examples[row].columns.get(name)) for row in rows]
                for name in self.columns
            },
        )


class _Failure(NamedTuple):
    """Why a call gave nothing: what happened, what to do, and the error where one was raised."""

    what: str
    fix: str
    error: BaseException | None = None


class _TimeLimitError(Exception):
    pass


def call(calls: Sequence[Call]) -> list[list[Any] | None]:
    """Calls reward functions.

    A call that fails is tried again as often as ``data.reward_retries`` says, then
    ``data.reward_on_error`` decides.

    Args:
      calls: what to call; functions that are not asynchronous in this order.

    Returns:
      for each call what it returned, one value for each completion; None where it failed and is to
      abstain, which is said on standard error.

    Raises:
      InputError: a function raised, exited, took too long, or returned something else than a list
        with one value for each completion.
    """
    values: list[list[Any] | None] = [None] * len(calls)
    left, tries = list(range(len(calls))), 1
    while left:
        again = []
        for number, found in _attempt({number: calls[number] for number in left}):
            if not isinstance(found, _Failure):
                values[number] = found
                continue
            task = calls[number].task
            if tries <= task.reward_retries:
                again.append((number, found, task.reward_retries))
            elif task.reward_on_error == "stop":
                times = f" ({tries} times)" if tries > 1 else ""
                raise InputError(f"{found.what}{times}; {found.fix}.") from found.error
            else:
                say(f"{found.what}; they abstain", sys.stderr)
        if again:
            pause = min(FIRST_PAUSE_S * 2.0 ** (tries - 1), LONGEST_PAUSE_S)
            for _, found, retries in again:
                say(f"{found.what}; retry {tries} of {retries} in {pause:g} s", sys.stderr)
            time.sleep(pause)
        left, tries = [number for number, *_ in again], tries + 1
    return values


def _attempt(calls: Mapping[int, Call]) -> Iterator[tuple[int, list[Any] | _Failure]]:
    """What each call gives, those to be awaited at last and all together."""
    waiting: dict[int, Any] = {}
    try:
        for number, each in calls.items():
            start = functools.partial(each.start, range(len(each.completions)))
            try:
                found = _within(each.task.reward_timeout_s, functools.partial(_listed, start))
            except BaseException as error:  # whatever the function's own code may raise
                yield number, _failure(each, error)
                continue
            if _is_asynchronous(found):
                waiting[number] = found
            else:
                yield number, _checked(each, found)
        awaited = _await_together(
            {
                number: (value, calls[number].task.reward_timeout_s)
                for number, value in waiting.items()
            }
        )
        waiting = {}
        for number, found in awaited.items():
            if isinstance(found, BaseException):
                yield number, _failure(calls[number], found)
            else:
                yield number, _checked(calls[number], found)
    finally:
        for value in waiting.values():  # nobody waits for them any more
            if inspect.iscoroutine(value):
                value.close()


def _checked(each: Call, values: Any) -> list[Any] | _Failure:
    """The values, if there is one for each completion."""
    if not isinstance(values, list):
        return _Failure(
            f"The reward function {each.name} returned {type(values).__name__} {each.where}",
            "it must return a list with a number or None for each completion",
        )
    if len(values) != len(each.completions):
        return _Failure(
            f"The reward function {each.name} returned {len(values)} values {each.where}",
            "it must return one for each",
        )
    return values


def _failure(each: Call, error: BaseException) -> _Failure:
    """What an error of a call means; what is meant to end the process is raised again."""
    limit = each.task.reward_timeout_s
    if isinstance(error, _TimeLimitError):
        return _Failure(
            f"The reward function {each.name} took more than data.reward_timeout_s={limit:g} "
            f"{each.where}",
            f"make it faster, or set data.reward_timeout_s={2 * limit:g}, or 0 for any time",
            error,
        )
    kind, message = _described(error)
    place, advice = each.where, ", and data.find_failing_completion=True looks for the completion"
    if each.task.find_failing_completion:
        place, advice = _failing_completion(each), ""
    columns = ", ".join(each.columns) or "(none)"
    return _Failure(
        f"The reward function {each.name} raised {kind} ({message}){_line(each, error)} {place}",
        f"it gets prompts, completions and the columns {columns} as keywords{advice}",
        error,
    )


def _described(error: BaseException) -> tuple[str, str]:
    if isinstance(error, KeyboardInterrupt):
        raise error
    return user_code.failure(error)


def _line(each: Call, error: BaseException) -> str:
    """The place of an error in the function's own file, else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(each.function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    raised = own or [frame for frame in frames if frame.filename != __file__]
    if not raised:
        return ""
    frame = raised[-1]
    return f" in line {frame.lineno} of {Path(frame.filename).name}"


def _failing_completion(each: Call) -> str:
    """The completion that a function raises on by itself, in words; calls it again for each."""

    def find() -> int | None:
        for row in range(len(each.completions)):
            try:
                found = _listed(functools.partial(each.start, [row]))
                if _is_asynchronous(found):
                    (found,) = _await_together({0: (found, 0.0)}).values()
                    if isinstance(found, BaseException):
                        raise found
            except BaseException as error:  # whatever the function's own code may raise
                _described(error)  # a signal is none of the row's
                return row
        return None

    limit = each.task.reward_timeout_s
    try:
        row = _within(limit, find)
    except _TimeLimitError:
        return (
            f"{each.where}, and looking for the completion took more than "
            f"data.reward_timeout_s={limit:g}"
        )
    if row is None:
        return f"{each.where}, though on no completion by itself"
    return (
        f"on the completion {each.completions[row]!r} of the prompt {each.examples[row].prompt!r}"
    )


def _listed(function: Callable[[], Any]) -> Any:
    """What a function returns, as a list where it can be iterated over; here a generator runs."""
    value = function()
    return value if _is_asynchronous(value) else _as_list(value)


def _as_list(value: Any) -> Any:
    try:
        iterator = iter(value)
    except TypeError:
        return value
    return list(iterator)


def _is_asynchronous(value: Any) -> bool:
    return inspect.isawaitable(value) or hasattr(value, "__aiter__")


def _await_together(values: Mapping[int, tuple[Any, float]]) -> dict[int, Any]:
    """What awaitables and asynchronous generators give, or the error that each ends with.

    Args:
      values: by number, each with its time limit in seconds; 0 for any time.
    """
    if not values:
        return {}
    done: dict[int, Any] = {}

    async def settle(number: int, value: Any, limit: float) -> None:
        try:
            async with asyncio.timeout(limit or None) as clock:
                done[number] = await _result(value)
        except BaseException as error:  # whatever the function's own code may raise
            late = isinstance(error, TimeoutError) and clock.expired()
            done[number] = _TimeLimitError() if late else error

    async def together() -> None:
        await asyncio.gather(*(settle(number, *value) for number, value in values.items()))

    limits = [limit for _, limit in values.values()]
    # Code that holds the loop up is not stopped by a limit inside it.
    outer = max(limits) + 1.0 if all(limits) else 0.0
    try:
        # Never in this thread, which in a notebook has a loop of its own.
        _in_thread(outer, lambda: asyncio.run(together()))
    except _TimeLimitError as error:
        done = {number: done.get(number, error) for number in values}
    return done


async def _result(value: Any) -> Any:
    if isinstance(value, Awaitable):
        value = await value
    if hasattr(value, "__aiter__"):
        return [each async for each in value]
    return _as_list(value)


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns or raises; `_TimeLimitError` if that takes longer.

    Without a limit it is called in this thread.
    """
    return _in_thread(seconds, function) if seconds else function()


def _in_thread(seconds: float, function: Callable[[], Any]) -> Any:
    """The same in a thread of its own, also where 0 seconds stand for any time.

    The thread of a function that hangs is left behind, and does not keep the process alive.
    """
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, function()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        good, value = results.get(timeout=min(seconds, threading.TIMEOUT_MAX) if seconds else None)
    except queue.Empty:
        raise _TimeLimitError from None
    if not good:
        raise value
    return value
