"""Requests, and the tickets by which their completions are followed."""

import dataclasses
import math
import queue
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.serving.text import Writer
from grpocem_jax.utils.errors import InputError

COLDEST = 1e-3
"""The lowest temperature but 0."""

AdapterKey = tuple[str, int]
"""An adapter's name, and how often it has stood for another before."""


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
    """A request on its way; what has no underscore may be called from any thread.

    Attributes:
      request: the request.
    """

    def __init__(
        self,
        request: Request,
        *,
        writer: Writer,
        adapter: AdapterKey | None,
        offsets: Offsets | None,
        size: int,
        on_piece: Callable[[Piece], None] | None,
    ):
        """Made by `Engine.submit`.

        Args:
          request: the request.
          writer: of its text.
          adapter: the adapter as it is now.
          offsets: the adapter, where it was not on the device.
          size: the bucket of the prompt.
          on_piece: as in `Engine.submit`.
        """
        self.request = request
        self._writer = writer
        self._adapter = adapter
        self._offsets = offsets
        self._size = size
        self._need = max(size, len(request.tokens) + request.max_new_tokens)
        # What the keys and values of the prompt depend on.
        self._prompt = (adapter, request.tokens.tobytes())
        self._on_piece = on_piece
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._cancelled = False
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
        """Whether `cancel` was called, or ``on_piece`` raised an exception."""
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


def check_request(
    request: Request, *, vocab_size: int, max_new_tokens: int, longest: int, length: int
) -> Request:
    """The request with its tokens as int32.

    Args:
      request: the request.
      vocab_size: tokens of the model.
      max_new_tokens: the longest completion.
      longest: the longest prompt.
      length: the most tokens of a prompt and its completion together.

    Raises:
      InputError: a request that cannot be served.
    """
    tokens = np.asarray(request.tokens)
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and len(tokens)):
        raise InputError(f"tokens: are {tokens.dtype} {list(tokens.shape)}; give int32 [S].")
    if not len(tokens):
        raise InputError("the prompt is empty; give some text.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = next(x for x in tokens.tolist() if not 0 <= x < vocab_size)
        raise InputError(
            f"tokens: {wrong} is no token of the model; they are 0 to {vocab_size - 1}."
        )
    new = request.max_new_tokens
    if type(new) is not int or not 1 <= new <= max_new_tokens:
        raise InputError(f"max_new_tokens={new!r}: must be from 1 to {max_new_tokens}.")
    if len(tokens) > longest or len(tokens) + new > length:
        raise InputError(
            f"the prompt has {len(tokens)} tokens and max_new_tokens={new}; at most {longest} and "
            f"{length} together are served; shorten the prompt or lower the other."
        )
    heat, top_p, seed, stop = request.temperature, request.top_p, request.seed, request.stop
    if not (_is_number(heat) and (heat == 0 or COLDEST <= heat < math.inf)):
        raise InputError(
            f"temperature={heat!r}: must be 0, which takes the most probable tokens, or at least "
            f"{COLDEST}."
        )
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise InputError(f"top_p={top_p!r}: must be above 0 and at most 1.")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise InputError(f"seed={seed!r}: must be a whole number from 0 to 4294967295.")
    if isinstance(stop, str) or not all(isinstance(x, str) and x for x in stop):
        raise InputError(f"stop={stop!r}: must be a list of strings that are not empty.")
    name = request.adapter
    if name is not None and not (isinstance(name, str) and name):
        raise InputError(f"adapter={name!r}: must be an adapter's name, or None.")
    return dataclasses.replace(request, tokens=tokens.astype(np.int32))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
