"""The serving engine: continuous batching over slots, each with an adapter of its own.

    engine = Engine(run.policy, run.offsets, buckets=(16, 64), max_new_tokens=24, load=load)
    engine.warm_up()
    ticket = engine.submit(Request(tokens, adapter="mine", max_new_tokens=24))
    while engine.step():
        pass
    print("".join(piece.text for piece in ticket.pieces()))

Requests join and leave between steps.  One thread calls `Engine.step`, or `Engine.run`; any may
submit and cancel.
"""

import collections
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.rollouts.prompts import bucket_length
from grpocem_jax.serving import slots as device
from grpocem_jax.serving.text import Vocabulary, Writer, vocabulary
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError

MOST_STEPS = 32
"""Tokens of each slot that one call of the device makes at most."""

LATENCY_S = 0.05
"""About how long one call of the device may take, after which its tokens are handed out."""

SHORTEST = 64
"""The least length of the slots: below it, attention takes little of a step's time."""

COLDEST = 1e-3
"""The lowest temperature but 0."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What is to be completed, and how.

    Attributes:
      tokens: int32 ``[S]``, the encoded prompt, at least one token.
      adapter: the adapter's name; None for the offsets that the engine starts with.
      max_new_tokens: most tokens of the completion, at least 1.
      temperature: 0 for the most probable tokens, else at least `COLDEST`.
      top_p: nucleus mass in (0, 1].
      stop: strings that end the completion and are no part of it, beside the policy's own.
      seed: from 0 to 2**32 - 1; equal requests with equal seeds have equal completions.
    """

    tokens: np.ndarray
    adapter: str | None = None
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Piece(NamedTuple):
    """A part of a completion.

    Attributes:
      text: what is new; no part of a stop string and only whole characters.
      tokens: tokens of the completion so far, with the one that ends it.
      finish: None while more follows; else "stop" (an end token or a stop string), "length",
        "cancelled" or "error".
      error: what went wrong, where ``finish`` is "error".
    """

    text: str
    tokens: int
    finish: str | None = None
    error: str | None = None


class Ticket:
    """A request on its way; all of its functions may be called from any thread.

    Attributes:
      request: the request.
    """

    def __init__(
        self,
        request: Request,
        writer: Writer,
        size: int,
        on_piece: Callable[[Piece], None] | None,
    ):
        """Made by `Engine.submit`."""
        self.request = request
        self._writer = writer
        self._on_piece = on_piece
        self._size = size  # of its bucket
        self._need = max(size, len(request.tokens) + request.max_new_tokens)
        # What the keys and values of the prompt depend on.
        self._prompt = (request.adapter, request.tokens.tobytes())
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._cancelled = False
        self._offsets: Offsets | None = None
        self._count = 0

    def pieces(self, timeout: float | None = None) -> Iterator[Piece]:
        """The completion as it comes; ends after the piece with a ``finish``.

        Without an ``on_piece``, which takes the pieces instead.

        Args:
          timeout: seconds to wait for each piece; None for any time.

        Raises:
          TimeoutError: no piece came in time.
        """
        while True:
            try:
                piece = self._pieces.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no piece of the completion within {timeout} s") from None
            yield piece
            if piece.finish is not None:
                return

    def cancel(self) -> None:
        """Ends the completion at the engine's next step, which frees its slot."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called, or its ``on_piece`` raised an exception."""
        return self._cancelled

    def _emit(self, piece: Piece) -> None:
        if self._on_piece is None:
            self._pieces.put(piece)
            return
        try:
            self._on_piece(piece)
        except Exception:  # a receiver that is gone must not end the others' completions
            self._cancelled = True

    def _finish(self, finish: str, error: str | None = None) -> None:
        self._offsets = None
        text = "" if finish == "error" else self._writer.take(last=True)
        self._emit(Piece(text, self._count, finish, error))


class Stats(NamedTuple):
    """Counters of an engine since its beginning, and what is in it now.

    Attributes:
      requests: that were submitted.
      finished: of them, that have ended in any way.
      tokens: of completions.
      prompt_tokens: that were processed; of equal prompts in a batch, those of one.
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
        prefill_tokens: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ):
        """Makes room on the device; `warm_up` compiles.

        Args:
          policy: the policy.
          start_offsets: the adapter of requests that name none.
          slots: requests that are completed at once.
          rows: adapters that are kept on the device; the one that was used last stays longest.
          buckets: lengths that prompts are padded to, a program each. The last one, within the
            model's context, is the longest prompt.
          max_new_tokens: the longest completion.
          load: the offsets of an adapter by its name, in the form of ``start_offsets``; called
            where it is not on the device, from the threads that submit and the engine's own. An
            InputError of it refuses the request. None where there is one adapter only, which all
            slots then share.
          max_queue: requests that may wait for a slot.
          prefill_tokens: about how many tokens of prompts are processed at once; by default 128 on
            a CPU and 2,048 elsewhere.
          top_k: of all requests, as in `models.sampling.sample`.
          min_p: the same.
          repetition_penalty: the same.

        Raises:
          InputError: a number out of range, or a tokenizer whose tokens have no text of their own.
        """
        model = policy.model
        for name, value in (
            ("slots", slots),
            ("rows", rows),
            ("max_new_tokens", max_new_tokens),
            ("max_queue", max_queue),
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
        self.policy = policy
        self.slots = slots
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.max_queue = max_queue
        self.buckets = tuple(sorted({min(x, model.context_length) for x in buckets}))
        self.length = min(self.buckets[-1] + max_new_tokens, model.context_length)
        self._lengths = _halvings(self.length)
        if prefill_tokens is None:
            prefill_tokens = 128 if jax.default_backend() == "cpu" else 2048
        self._prefill_tokens = prefill_tokens
        self._own = load is not None
        self._load = load
        self._vocabulary: Vocabulary = vocabulary(policy)
        self._end_ids = frozenset(np.asarray(policy.end_ids).tolist())
        self._penalized = repetition_penalty != 1.0
        self._sampling = {"top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty}

        self._start = devices.replicate(policy.mesh, jax.tree.map(jax.numpy.asarray, start_offsets))
        # Row 0 of the table is the start's.
        self._table = device.make_table(self._start, rows=rows + 1) if self._own else None
        self._slots = self._empty()
        self._tickets: list[Ticket | None] = [None] * slots
        self._resident: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._free_rows = list(range(rows, 0, -1))

        self._wake = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._closed = False
        self._step_s = LATENCY_S
        self._requests = self._finished = self._tokens = self._prompt_tokens = self._evictions = 0

    def _empty(self) -> device.Slots:
        return device.empty(
            self.policy.params,
            self._start,
            model=self.policy.model,
            slots=self.slots,
            length=self._lengths[0],
            own=self._own,
            penalized=self._penalized,
        )

    # What any thread may call.

    @property
    def stats(self) -> Stats:
        """Counters."""
        with self._wake:
            return Stats(
                requests=self._requests,
                finished=self._finished,
                tokens=self._tokens,
                prompt_tokens=self._prompt_tokens,
                active=sum(ticket is not None for ticket in self._tickets),
                queued=len(self._waiting),
                resident=len(self._resident),
                evictions=self._evictions,
            )

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
        tokens = self._check(request)
        request = dataclasses.replace(request, tokens=tokens)
        ticket = Ticket(
            request,
            Writer(self._vocabulary, (*self.policy.stop_strings, *request.stop)),
            bucket_length(len(tokens), self.buckets),
            on_piece,
        )
        name = request.adapter
        with self._wake:
            self._check_room()
            known = name in self._resident
        if name is not None and not known:
            ticket._offsets = self._loaded(name)
        with self._wake:
            self._check_room()
            self._waiting.append(ticket)
            self._requests += 1
            self._wake.notify_all()
        return ticket

    def forget(self, adapter: str) -> None:
        """Takes an adapter off the device, as its name is free or stands for another now.

        Completions that are under way go on with what they began with.
        """
        with self._wake:
            if adapter in self._resident:
                self._free_rows.append(self._resident.pop(adapter))

    def _check_room(self) -> None:
        if self._closed:
            raise queue.Full("the engine has stopped")
        if len(self._waiting) >= self.max_queue:
            raise queue.Full(f"{self.max_queue} requests wait already")

    def _check(self, request: Request) -> np.ndarray:
        """The request's tokens as int32.

        Raises:
          InputError: a request that cannot be served.
        """
        tokens = np.asarray(request.tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InputError(f"tokens: are {tokens.dtype} {list(tokens.shape)}, not int32 [S].")
        size, longest = self.policy.model.vocab_size, self.buckets[-1]
        if not len(tokens):
            raise InputError("the prompt is empty; give some text.")
        if tokens.min() < 0 or tokens.max() >= size:
            wrong = next(x for x in tokens.tolist() if not 0 <= x < size)
            raise InputError(f"tokens: {wrong} is no token of the model; they are 0 to {size - 1}.")
        new = request.max_new_tokens
        if type(new) is not int or not 1 <= new <= self.max_new_tokens:
            raise InputError(f"max_new_tokens={new!r}: must be from 1 to {self.max_new_tokens}.")
        if len(tokens) > longest or len(tokens) + new > self.length:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and max_new_tokens={new}; at most {longest} "
                f"and {self.length} together are served; shorten the prompt or lower the other."
            )
        heat, top_p, seed = request.temperature, request.top_p, request.seed
        if not (_number(heat) and (heat == 0 or COLDEST <= heat < math.inf)):
            raise InputError(
                f"temperature={heat!r}: must be 0, which takes the most probable tokens, or at "
                f"least {COLDEST}."
            )
        if not (_number(top_p) and 0 < top_p <= 1):
            raise InputError(f"top_p={top_p!r}: must be above 0 and at most 1.")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise InputError(f"seed={seed!r}: must be a whole number from 0 to 4294967295.")
        stop = request.stop
        if isinstance(stop, str) or not all(isinstance(x, str) and x for x in stop):
            raise InputError(f"stop={stop!r}: must be a list of strings that are not empty.")
        name = request.adapter
        if name is not None and not (isinstance(name, str) and name):
            raise InputError(f"adapter={name!r}: must be an adapter's name, or None.")
        if name is not None and self._load is None:
            raise InputError(f"adapter={name!r}: this engine has one adapter only; give None.")
        return tokens.astype(np.int32)

    def _loaded(self, name: str) -> Offsets:
        """An adapter that is not on the device.

        Raises:
          InputError: there is none, or it is of another form than the start's, or not finite.
        """
        assert self._load is not None
        offsets = jax.tree.map(np.asarray, self._load(name))
        form, own = (
            jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (self._start, offsets)
        )
        if form != own:
            raise InputError(
                f"adapter={name!r}: is of another form than the model's adapter; give one that was "
                "made with the same settings."
            )
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(offsets)):
            raise InputError(f"adapter={name!r}: has numbers that are not finite; give another.")
        return offsets

    # What the engine's thread calls.

    def warm_up(self) -> float:
        """Compiles every program; afterwards none is compiled, whatever comes.

        Returns:
          the seconds that it took.

        Raises:
          RuntimeError: requests are under way.
        """
        started = time.perf_counter()
        if any(ticket is not None for ticket in self._tickets):
            raise RuntimeError("warm_up: requests are under way; call it before the first step")
        for length in self._lengths:
            for other in self._lengths:
                self._set_length(length)
                self._set_length(other)
            self._set_length(length)
            for size in self.buckets:
                if size <= length:
                    self._prefill({}, (), size)
            self._slots = device.wipe(self._slots, np.int32(0))
            self._decode(0, until_free=False)
        if self._table is not None:
            self._table = device.put_row(self._table, np.int32(0), self._start)
            host = jax.device_get(self._start)
            self._table = device.put_row(self._table, np.int32(0), host)
        jax.block_until_ready(self._slots)
        return time.perf_counter() - started

    def step(self) -> bool:
        """Fills free slots with requests that wait, and goes on with all of them by some tokens.

        Returns:
          whether there was anything to do.
        """
        try:
            admitted = self._admit()
            if not any(ticket is not None for ticket in self._tickets):
                return admitted
            self._advance()
        except Exception as error:  # of the device; whatever was in the slots is lost
            self._fail(" ".join(str(error).split()) or type(error).__name__)
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
                    with self._wake:
                        if not self._waiting:
                            self._wake.wait(LATENCY_S)
        finally:
            self.close()

    def close(self) -> None:
        """Cancels what is under way and takes no more requests."""
        with self._wake:
            self._closed = True
            left = [*self._waiting, *(ticket for ticket in self._tickets if ticket is not None)]
            self._waiting.clear()
            self._tickets = [None] * self.slots
            self._finished += len(left)
        for ticket in left:
            ticket._finish("cancelled")

    def _admit(self) -> bool:
        """Puts requests that wait into free slots; returns whether there were any."""
        some = False
        busy = any(ticket is not None for ticket in self._tickets)
        # Completions under way are held up by a few prompts at most.
        for _ in range(2 if busy else self.slots):
            free = [i for i, ticket in enumerate(self._tickets) if ticket is None]
            batch = self._next_batch(len(free))
            if not batch:
                break
            some = True
            rows: dict[Ticket, int] = {}
            for ticket in batch:
                row = self._row(ticket, rows.values())
                if row is not None:
                    rows[ticket] = row
            if not rows:
                continue
            for ticket, slot in zip(rows, free, strict=False):
                self._tickets[slot], ticket._offsets = ticket, None
            # The least that holds what is in the slots: attention reads all of it.
            need = max(ticket._need for ticket in self._tickets if ticket is not None)
            self._set_length(next(length for length in self._lengths if length >= need))
            self._prefill(rows, free, batch[0]._size)
        return some

    def _prompts_at_once(self, size: int) -> int:
        limit = self.slots if self._table is None else min(self.slots, self.rows)
        return max(1, min(self._prefill_tokens // size, limit))

    def _next_batch(self, count: int) -> list[Ticket]:
        """The request that waits longest and others of its bucket, at most ``count``."""
        batch: list[Ticket] = []
        dropped: list[Ticket] = []
        passed: list[Ticket] = []
        prompts: set[tuple[str | None, bytes]] = set()
        with self._wake:
            # Of a long queue not all is looked through for what fits.
            for _ in range(min(len(self._waiting), 2 * self.slots)):
                if len(batch) == count:
                    break
                ticket = self._waiting.popleft()
                first = batch[0] if batch else ticket
                known = ticket._prompt in prompts
                if ticket.cancelled:
                    dropped.append(ticket)
                elif ticket._size == first._size and (
                    known or len(prompts) < self._prompts_at_once(first._size)
                ):
                    batch.append(ticket)
                    prompts.add(ticket._prompt)
                else:
                    passed.append(ticket)
            self._waiting.extendleft(reversed(passed))
            self._finished += len(dropped)
        for ticket in dropped:
            ticket._finish("cancelled")
        return batch

    def _row(self, ticket: Ticket, taken: Collection[int]) -> int | None:
        """The row of a ticket's adapter in the table, where it is put if it is not there.

        None where it cannot be had any more, with which the ticket ends.  A batch has at most as
        many adapters as there are rows, and what was used last stays: none takes another's row.

        Args:
          ticket: the ticket.
          taken: rows of others of its batch; one whose adapter was forgotten meanwhile is free for
            the next batch only.
        """
        name = ticket.request.adapter
        if name is None or self._table is None:
            return 0
        with self._wake:
            if name in self._resident:
                self._resident.move_to_end(name)
                return self._resident[name]
        try:
            offsets = self._loaded(name) if ticket._offsets is None else ticket._offsets
        except Exception as error:  # of the user's own function, or an adapter deleted meanwhile
            with self._wake:
                self._finished += 1
            ticket._finish("error", str(error) or type(error).__name__)
            return None
        with self._wake:
            row = next((row for row in self._free_rows if row not in taken), None)
            if row is not None:
                self._free_rows.remove(row)
            else:
                _, row = self._resident.popitem(last=False)
                self._evictions += 1
            self._resident[name] = row
        self._table = device.put_row(self._table, np.int32(row), offsets)
        return row

    def _prefill(self, batch: Mapping[Ticket, int], free: Sequence[int], size: int) -> None:
        """Processes prompts of a bucket and puts them into slots; none where there are none.

        Args:
          batch: tickets, each with the row of its adapter.
          free: slots that are free, at least as many.
          size: the bucket.
        """
        most = self._prompts_at_once(size)
        prompts, mask = np.zeros((most, size), np.int32), np.zeros((most, size), bool)
        mask[:, 0] = True
        rows = np.zeros(most, np.int32)
        number: dict[tuple[str | None, bytes], int] = {}
        admitted = device.Admitted(
            source=np.zeros(self.slots, np.int32),
            slot=np.zeros(self.slots, np.int32),
            limit=np.zeros(self.slots, np.int32),
            temperature=np.zeros(self.slots, np.float32),
            top_p=np.ones(self.slots, np.float32),
            seed=np.zeros(self.slots, np.uint32),
            number=np.int32(len(batch)),
        )
        for place, ((ticket, row), slot) in enumerate(zip(batch.items(), free, strict=False)):
            request = ticket.request
            if ticket._prompt not in number:
                source = number[ticket._prompt] = len(number)
                prompts[source, : len(request.tokens)] = request.tokens
                mask[source, : len(request.tokens)] = True
                rows[source] = row
                self._prompt_tokens += len(request.tokens)
            admitted.source[place] = number[ticket._prompt]
            admitted.slot[place] = slot
            admitted.limit[place] = request.max_new_tokens
            admitted.temperature[place] = request.temperature
            admitted.top_p[place] = request.top_p
            admitted.seed[place] = request.seed
        made = device.prefill(
            self.policy.params,
            self._start,
            self._table,
            prompts,
            mask,
            rows,
            model=self.policy.model,
            penalized=self._penalized,
        )
        self._slots = device.place(self._slots, made, admitted)

    def _set_length(self, length: int) -> None:
        if length != self._slots.cache.keys[0].shape[2]:
            self._slots = device.resize(self._slots, length=length)

    def _decode(self, steps: int, *, until_free: bool) -> np.ndarray:
        """Tokens ``[MOST_STEPS, slots]`` of one call of the device."""
        self._slots, tokens = device.decode(
            self.policy.params,
            self._start,
            self._slots,
            self.policy.end_ids,
            np.array([ticket is not None for ticket in self._tickets]),
            np.int32(steps),
            np.bool_(until_free),
            model=self.policy.model,
            most=MOST_STEPS,
            **self._sampling,
        )
        return np.asarray(tokens)

    def _advance(self) -> None:
        """Goes on with all slots and hands out what comes."""
        for slot, ticket in enumerate(self._tickets):
            if ticket is not None and ticket.cancelled:
                self._free(slot, "cancelled")
        if not any(ticket is not None for ticket in self._tickets):
            return
        waiting, full = bool(self._waiting), all(t is not None for t in self._tickets)
        steps = max(1, min(int(LATENCY_S / self._step_s), MOST_STEPS))
        if waiting and not full:
            steps = 1
        started = time.perf_counter()
        tokens = self._decode(steps, until_free=waiting)
        done = max(1, int(np.sum(np.any(tokens != device.NOTHING, -1))))
        seconds = (time.perf_counter() - started) / done
        self._step_s += 0.2 * (seconds - self._step_s)
        for slot, own in enumerate(tokens.T[:, :done].tolist()):
            if self._tickets[slot] is not None:
                self._hand_out(slot, own)

    def _hand_out(self, slot: int, tokens: Sequence[int]) -> None:
        """Writes the new tokens of a slot, and frees it where its completion has ended."""
        ticket = self._tickets[slot]
        assert ticket is not None
        for token in tokens:
            if token == device.NOTHING:
                break
            if token == device.NOT_FINITE:
                self._slots = device.wipe(self._slots, np.int32(slot))
                fix = "use another adapter, or another prompt"
                self._free(slot, "error", f"{self.policy.nonfinite_logits(fix)}.")
                return
            ticket._count += 1
            self._tokens += 1
            if token in self._end_ids or ticket._writer.add(token):
                self._free(slot, "stop")
                return
            if ticket._count == ticket.request.max_new_tokens:
                self._free(slot, "length")
                return
        text = ticket._writer.take()
        if text:
            ticket._emit(Piece(text, ticket._count))

    def _free(self, slot: int, finish: str, error: str | None = None) -> None:
        ticket = self._tickets[slot]
        assert ticket is not None
        with self._wake:
            self._tickets[slot] = None
            self._finished += 1
        ticket._finish(finish, error)

    def _fail(self, message: str) -> None:
        """Ends what is in the slots with an error, and begins with empty ones."""
        for slot, ticket in enumerate(self._tickets):
            if ticket is not None:
                self._free(slot, "error", message)
        self._slots = self._empty()
        if self._own:
            with self._wake:
                self._resident.clear()
                self._free_rows = list(range(self.rows, 0, -1))
            self._table = device.make_table(self._start, rows=self.rows + 1)


def _halvings(length: int) -> tuple[int, ...]:
    """The lengths that the slots can have: the whole and its halves, as long as halving pays."""
    lengths = [length]
    while lengths[-1] >= 2 * SHORTEST:
        lengths.append(lengths[-1] // 2)
    return tuple(reversed(lengths))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
