"""The serving engine: continuous batching over slots, each with an adapter of its own.

    engine = Engine(run.policy, run.offsets, buckets=(16, 64), max_new_tokens=24, load=load)
    engine.warm_up()
    ticket = engine.submit(Request(tokens=tokens, adapter="mine", max_new_tokens=24))
    while engine.step():
        pass
    print("".join(piece.text for piece in ticket.pieces()))

Requests join and leave between steps.  One thread calls `Engine.step`, or `Engine.run`; any may
submit and cancel.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.rollouts.prompts import bucket_length
from grpocem_jax.serving import slots as device
from grpocem_jax.serving.group import MOST_STEPS, Group, Settings
from grpocem_jax.serving.line import Line
from grpocem_jax.serving.prompts import Prompt, Prompts
from grpocem_jax.serving.requests import COLDEST, Piece, Request, Ticket, check_request
from grpocem_jax.serving.resident import Resident
from grpocem_jax.serving.text import Writer, vocabulary
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError

__all__ = ["COLDEST", "Engine", "Piece", "Request", "Stats", "Ticket"]

LATENCY_S = 0.05
"""About how long a step may take, after which its tokens are handed out."""

HELD_STEPS = 8
"""Tokens of others for which prompts wait until as many slots are free as are filled at once."""

SHORTEST = 64
"""The least length of the slots: below it, attention takes little of a step's time."""


class Stats(NamedTuple):
    """Counters of an engine since its beginning, and what is in it now.

    Attributes:
      requests: that were submitted.
      finished: of them, that have ended in any way.
      tokens: of completions.
      prompt_tokens: that were processed; what several prompts begin with counts once while it
        stays on the device, and so do equal prompts of a batch.
      active: requests in slots now.
      queued: requests that wait now.
      resident: adapters on the device now, beside the one of the start.
      evictions: adapters that made room for others.
    """

    requests: int
    finished: int
    tokens: int
    prompt_tokens: int
    active: int
    queued: int
    resident: int
    evictions: int


class Engine:
    """Completes requests over the slots of one model.

    The completion of a request depends on its fields and its adapter alone, not on what else is
    under way. Token ``t`` is drawn with the key ``fold_in(key(seed), t)``.
    """

    def __init__(
        self,
        policy: Policy,
        start_offsets: Offsets,
        *,
        slots: int = 64,
        rows: int = 64,
        buckets: Sequence[int],
        max_new_tokens: int,
        load: Callable[[str], Offsets] | None = None,
        max_queue: int = 256,
        group: int | None = None,
        prefill_tokens: int | None = None,
        prefix_tokens: int = 4096,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ):
        """Makes room on the device; `warm_up` compiles.

        Args:
          policy: the policy.
          start_offsets: the adapter of requests that name none.
          slots: requests that are completed at once, rounded up to equal groups.
          rows: adapters that are kept on the device; the one that was used last stays longest.
          buckets: lengths that prompts are padded to, a program each. The last one, within the
            model's context, is the longest prompt.
          max_new_tokens: the longest completion.
          load: the offsets of an adapter by its name, in the form of ``start_offsets``; called
            where it is not on the device, from the threads that submit and the engine's own. An
            InputError of it refuses the request. None where there is one adapter only, which all
            slots then share.
          max_queue: requests that may wait for a slot.
          group: the most slots that one program completes. Groups run in turn, and only those with
            requests, so that a few need not wait for what all slots take. By default all slots
            are one, but on a CPU 32, with which products are about as fast as with more.
          prefill_tokens: about how many tokens of prompts are processed at once; by default 128 on
            a CPU and 2,048 elsewhere.
          prefix_tokens: how many tokens of beginnings of prompts stay on the device, so that those
            with the same beginning and adapter do not process it again; 0 for none. What is shared
            is a bucket's tokens, or several buckets'.
          top_k: of all requests, as in `models.sampling.sample`.
          min_p: the same.
          repetition_penalty: the same.

        Raises:
          InputError: a number out of range, or a tokenizer whose tokens have no text of their own.
        """
        model = policy.model
        on_cpu = jax.default_backend() == "cpu"
        if prefill_tokens is None:
            prefill_tokens = 128 if on_cpu else 2048
        if group is None:
            group = 32 if on_cpu else slots
        for name, value in (
            ("slots", slots),
            ("rows", rows),
            ("max_new_tokens", max_new_tokens),
            ("max_queue", max_queue),
            ("group", group),
            ("prefill_tokens", prefill_tokens),
        ):
            if type(value) is not int or value < 1:
                raise InputError(f"{name}={value!r}: must be a whole number of at least 1.")
        if not buckets or any(type(size) is not int or size < 1 for size in buckets):
            raise InputError(f"buckets={buckets!r}: must be whole numbers of at least 1.")
        if max_new_tokens >= model.context_length:
            raise InputError(
                f"max_new_tokens={max_new_tokens}: leaves no room for a prompt in a context of "
                f"{model.context}; lower it."
            )
        if type(prefix_tokens) is not int or prefix_tokens < 0:
            raise InputError(
                f"prefix_tokens={prefix_tokens!r}: must be a whole number, or 0 for none."
            )
        groups = math.ceil(slots / group)
        group = math.ceil(slots / groups)
        self.policy = policy
        self.slots = groups * group
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.max_queue = max_queue
        self.buckets = tuple(sorted({min(x, model.context_length) for x in buckets}))
        self.length = min(self.buckets[-1] + max_new_tokens, model.context_length)
        self._vocabulary = vocabulary(policy)
        self._end_ids = frozenset(np.asarray(policy.end_ids).tolist())
        start = devices.replicate(policy.mesh, jax.tree.map(jnp.asarray, start_offsets))
        self._resident = None if load is None else Resident(start, rows=rows, load=load)
        self._settings = Settings(
            policy=policy,
            start=start,
            own=load is not None,
            slots=group,
            lengths=_halvings(self.length),
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        self._groups = [Group(self._settings) for _ in range(groups)]
        self._prompts = Prompts(
            self._settings,
            self.buckets,
            at_once=prefill_tokens,
            most=group if load is None else min(group, rows),
            kept=prefix_tokens,
        )

        self._line = Line(max_queue)
        self._lock = threading.Lock()
        self._step_s = LATENCY_S  # of a group, for one token of each slot
        self._held = 0
        self._finished = self._tokens = 0

    # What any thread may call.

    @property
    def stats(self) -> Stats:
        """Counters."""
        with self._lock:
            return Stats(
                requests=self._line.added,
                finished=self._finished,
                tokens=self._tokens,
                prompt_tokens=self._prompts.tokens,
                active=len(self._under_way()),
                queued=len(self._line),
                resident=0 if self._resident is None else len(self._resident),
                evictions=0 if self._resident is None else self._resident.evictions,
            )

    def _under_way(self) -> list[Ticket]:
        groups = (group.tickets for group in self._groups)
        return [ticket for tickets in groups for ticket in tickets if ticket is not None]

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Ticket:
        """Takes a request.

        Args:
          request: the request.
          on_piece: called with each piece from the engine's thread, and must not wait; an
            exception of it cancels the request. By default `Ticket.pieces` hands them out.

        Raises:
          InputError: a request that cannot be served.
          queue.Full: as many wait as may.
        """
        request = check_request(
            request,
            vocab_size=self.policy.model.vocab_size,
            max_new_tokens=self.max_new_tokens,
            longest=self.buckets[-1],
            length=self.length,
        )
        name, key, offsets = request.adapter, None, None
        self._line.check_room()
        if name is not None:
            if self._resident is None:
                raise InputError(f"adapter={name!r}: this engine has one adapter only; give None.")
            key = self._resident.key(name)
            if key not in self._resident:
                offsets = self._resident.load(name)
        ticket = Ticket(
            request,
            writer=Writer(self._vocabulary, (*self.policy.stop_strings, *request.stop)),
            adapter=key,
            offsets=offsets,
            size=bucket_length(len(request.tokens), self.buckets),
            on_piece=on_piece,
        )
        self._line.add(ticket)
        return ticket

    def forget(self, adapter: str) -> None:
        """Takes an adapter off the device, as its name is free or stands for another from now on.

        Completions that are under way go on with what they began with.
        """
        if self._resident is not None:
            self._resident.forget(adapter)

    # What the engine's thread calls.

    def warm_up(self) -> float:
        """Compiles every program; afterwards none is compiled, whatever comes.

        Returns:
          the seconds that it took.

        Raises:
          RuntimeError: requests are under way.
        """
        started = time.perf_counter()
        if self._under_way():
            raise RuntimeError("warm_up: requests are under way; call it before the first step")
        # Twice: on several devices what a program has returned may lie otherwise than new arrays.
        for _ in range(2):
            if self._resident is not None:
                self._resident.warm_up()
            table = None if self._resident is None else self._resident.table
            prompts = self._prompts.warm_up(table)
            for group in self._groups:
                group.warm_up(prompts)
        return time.perf_counter() - started

    def step(self) -> bool:
        """Fills free slots with requests that wait, and goes on with all of them by some tokens.

        Returns:
          whether there was anything to do.
        """
        try:
            admitted = self._admit()
            if not self._under_way():
                return admitted
            self._advance()
        except Exception as error:  # of the device; whatever was in the slots is lost
            self._fail(_message(error))
        return True

    def run(
        self,
        stop: threading.Event,
        between: Callable[[], bool] | None = None,
        share: float = 0.5,
    ) -> None:
        """Serves until ``stop`` is set; what is under way then is cancelled.

        Args:
          stop: ends it, after the step under way.
          between: other work, a bit of it with each call; returns whether there is more.
          share: most of the time that ``between`` gets while there are requests, in [0, 1).

        Raises:
          InputError: a share out of range.
        """
        if not 0 <= share < 1:
            raise InputError(f"share={share}: must be at least 0 and below 1.")
        # Seconds that the other work may take, or has taken too many.
        credit = 0.0
        try:
            while not stop.is_set():
                started = time.perf_counter()
                worked = self.step()
                credit += (time.perf_counter() - started) * share / (1 - share)
                more = False
                if not worked:
                    credit = 0.0
                if between is not None and credit >= 0 and (share > 0 or not worked):
                    started = time.perf_counter()
                    more = between()
                    credit = min(credit, 0.0) - (time.perf_counter() - started)
                if not worked and not more:
                    self._line.wait(LATENCY_S)
        finally:
            self.close()

    def close(self) -> None:
        """Cancels what is under way and takes no more requests."""
        left = self._line.close()
        with self._lock:
            left += self._under_way()
            for group in self._groups:
                group.tickets = [None] * len(group.tickets)
            self._finished += len(left)
        for ticket in left:
            ticket._finish("cancelled")

    def _admit(self) -> bool:
        """Puts requests that wait into free slots; returns whether there were any."""
        dropped = self._line.drop_cancelled()
        with self._lock:
            self._finished += len(dropped)
        for ticket in dropped:
            ticket._finish("cancelled")
        some, busy = False, bool(self._under_way())
        if busy and self._missing() > 0 and self._held < HELD_STEPS:
            return False
        self._held = 0
        # Completions under way are held up by a few prompts at most.
        for _ in range(2 if busy else self.slots):
            # One that is running already has room for more at no cost.
            groups = sorted((group for group in self._groups if group.free), key=_is_idle)
            if not groups:
                break
            batch = self._line.take(len(groups[0].free), self._prompts.at_once, look=2 * self.slots)
            if not batch:
                break
            some = True
            self._place(groups[0], batch)
        return some

    def _missing(self) -> int:
        """How many more slots must be free for as many prompts as are processed at once.

        But an eighth of all is enough, as what is free is idle. Negative where more are free.
        """
        first = self._line.first
        most = 0 if first is None else self._prompts.at_once(first._size)
        return min(most, len(self._line), max(1, self.slots // 8)) - sum(
            len(group.free) for group in self._groups
        )

    def _place(self, group: Group, batch: Sequence[Ticket]) -> None:
        """Processes the prompts of a batch, equal ones once, and puts it into free slots."""
        table = None
        sources: dict[Ticket, int] = {}
        number: dict[object, int] = {}
        prompts: list[Prompt] = []
        for ticket in batch:
            if ticket._prompt not in number:
                row = 0
                if self._resident is not None and ticket._adapter is not None:
                    try:
                        taken = [prompt.row for prompt in prompts]
                        row = self._resident.row(ticket._adapter, ticket._offsets, taken)
                    except Exception as error:  # it is gone, or whatever loading raises
                        with self._lock:
                            self._finished += 1
                        ticket._finish("error", _message(error))
                        continue
                number[ticket._prompt] = len(prompts)
                prompts.append(Prompt(ticket._adapter, row, ticket.request.tokens))
            sources[ticket], ticket._offsets = number[ticket._prompt], None
        if not sources:
            return
        if self._resident is not None:
            table = self._resident.table
        try:
            made = self._prompts.process(table, batch[0]._size, prompts)
            group.place(made, sources)
        except Exception as error:
            lost = [ticket for ticket in sources if ticket not in group.tickets]
            self._finished += len(lost)
            for ticket in lost:
                ticket._finish("error", _message(error))
            raise

    def _advance(self) -> None:
        """Goes on with all slots and hands out what comes."""
        for group in self._groups:
            for slot, ticket in enumerate(group.tickets):
                if ticket is not None and ticket.cancelled:
                    self._free(group, slot, "cancelled")
        active = [group for group in self._groups if group.active]
        waiting, missing = bool(self._line), self._missing()
        steps = max(1, min(int(LATENCY_S / self._step_s / max(1, len(active))), MOST_STEPS))
        if waiting and missing <= 0:
            steps = 1
        elif waiting:
            steps = max(1, min(steps, HELD_STEPS - self._held))
        for group in active:
            started = time.perf_counter()
            tokens = group.decode(steps, until=missing if waiting and missing > 0 else self.slots)
            seconds = (time.perf_counter() - started) / max(1, len(tokens[0]))
            self._step_s += 0.2 * (seconds - self._step_s)
            for slot, own in enumerate(tokens):
                if group.tickets[slot] is not None:
                    self._hand_out(group, slot, own)
        self._held += steps

    def _hand_out(self, group: Group, slot: int, tokens: Sequence[int]) -> None:
        """Writes the new tokens of a slot, and frees it where its completion has ended."""
        ticket = group.tickets[slot]
        assert ticket is not None
        for token in tokens:
            if token == device.NOTHING:
                break
            if token == device.NOT_FINITE:
                group.wipe(slot)
                fix = "use another adapter, or another prompt"
                self._free(group, slot, "error", f"{self.policy.nonfinite_logits(fix)}.")
                return
            ticket._count += 1
            self._tokens += 1
            if token in self._end_ids or ticket._writer.add(token):
                self._free(group, slot, "stop")
                return
            if ticket._count == ticket.request.max_new_tokens:
                self._free(group, slot, "length")
                return
        text = ticket._writer.take()
        if text:
            ticket._emit(Piece(text, ticket._count))

    def _free(self, group: Group, slot: int, finish: str, error: str | None = None) -> None:
        ticket = group.tickets[slot]
        assert ticket is not None
        with self._lock:
            group.tickets[slot] = None
            self._finished += 1
        ticket._finish(finish, error)

    def _fail(self, message: str) -> None:
        """Ends what is in the slots with an error, and begins with empty ones."""
        for group in self._groups:
            for slot, ticket in enumerate(group.tickets):
                if ticket is not None:
                    self._free(group, slot, "error", message)
            group.clear()
        self._prompts.clear()
        if self._resident is not None:
            self._resident.clear()


def _message(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_idle(group: Group) -> bool:
    return not group.active


def _halvings(length: int) -> tuple[int, ...]:
    """The lengths that the slots can have: the whole and its halves, as long as halving pays."""
    lengths = [length]
    while lengths[-1] >= 2 * SHORTEST:
        lengths.append(lengths[-1] // 2)
    return tuple(reversed(lengths))
