"""What ``/v1/completions`` and ``/v1/chat/completions`` answer, in the form of OpenAI's."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from grpocem_jax.serving.completions import Asked
from grpocem_jax.serving.errors import ApiError

KEEP_ALIVE_S = 15.0
"""Between comments of a stream on which nothing happens, so that no proxy gives it up."""


class Answers:
    """Completions under way; `cancel` ends those that have not ended.

    Made in the event loop's thread, which also reads `pieces`.

    Args:
      engine: with `submit`.
      count: how many completions.
    """

    def __init__(self, engine: Any, count: int):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._open = count
        self._tickets: list[Any] = []

    def submit(self, requests: Sequence[Any]) -> None:
        """Gives the requests to the engine; in any thread.

        Raises:
          whatever the engine's `submit` does.
        """
        for number, request in enumerate(requests):
            receive = self._receiver(number)
            self._tickets.append(self._engine.submit(request, on_piece=receive))

    def _receiver(self, number: int) -> Any:
        def receive(piece: Any) -> None:
            # The loop is closed where the server has ended.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))

        return receive

    def cancel(self) -> None:
        """Frees the slots."""
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(
        self, *, seconds: float, check: Callable[[], None]
    ) -> AsyncIterator[tuple[int, Any] | None]:
        """The pieces of all completions, each with the completion's number, until all have ended.

        None now and then where nothing comes.

        Args:
          seconds: in which they have to end.
          check: is called every second; raises where no more pieces can come.

        Raises:
          ApiError: they took longer, or one failed.
        """
        spoken = time.monotonic()
        deadline = spoken + seconds
        while self._open:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ApiError(504, f"the completion took more than {seconds:g} seconds.")
            try:
                number, piece = await asyncio.wait_for(self._pieces.get(), min(left, 1.0))
            except TimeoutError:
                check()
                if time.monotonic() - spoken > KEEP_ALIVE_S:
                    spoken = time.monotonic()
                    yield None
                continue
            spoken = time.monotonic()
            if piece.finish == "error":
                raise ApiError(500, f"the completion failed: {piece.error}")
            if piece.finish == "cancelled":
                raise ApiError(503, "the server is ending; try again.", retry_after=5)
            if piece.finish is not None:
                self._open -= 1
            yield number, piece


class Writer:
    """Writes answers as OpenAI does, whole or in chunks.

    Args:
      asked: the request.
      prompt_tokens: of each prompt.
    """

    def __init__(self, asked: Asked, prompt_tokens: Sequence[int]):
        self._asked = asked
        self._prompt_tokens = sum(prompt_tokens)
        kind, self._object = (
            ("chatcmpl", "chat.completion")
            if asked.chat
            else (
                "cmpl",
                "text_completion",
            )
        )
        self._id = f"{kind}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "choices": choices,
        }

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """The counts of tokens."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    def whole(self, texts: Sequence[str], reasons: Sequence[str], tokens: int) -> Mapping[str, Any]:
        """A whole answer."""
        choices = []
        for number, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            content: dict[str, Any] = {"text": text}
            if self._asked.chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": number, **content, "logprobs": None, "finish_reason": reason})
        return {**self._envelope(self._object, choices), "usage": self.usage(tokens)}

    def chunk(
        self, number: int, text: str, reason: str | None, *, first: bool = False
    ) -> Mapping[str, Any]:
        """A chunk of one completion; the first of a chat has the role."""
        content: dict[str, Any] = {"text": text}
        if self._asked.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            content = {"delta": delta | ({"content": text} if text or first else {})}
        choice = {"index": number, **content, "logprobs": None, "finish_reason": reason}
        kind = "chat.completion.chunk" if self._asked.chat else self._object
        chunk = self._envelope(kind, [choice])
        return {**chunk, "usage": None} if self._asked.include_usage else chunk

    def last(self, tokens: int) -> Mapping[str, Any]:
        """The chunk with the counts of tokens."""
        kind = "chat.completion.chunk" if self._asked.chat else self._object
        return {**self._envelope(kind, []), "usage": self.usage(tokens)}
