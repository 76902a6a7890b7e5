"""The HTTP interface: every route and what answers it."""

import dataclasses
import queue
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grpocem_jax.serving import completions, page
from grpocem_jax.serving.adapters import Adapters
from grpocem_jax.serving.answers import Answers, Writer
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.completions import Asked
from grpocem_jax.serving.engine import Request as EngineRequest
from grpocem_jax.serving.errors import ApiError
from grpocem_jax.serving.http import Call, Events, Gate, Json, error_response, while_connected
from grpocem_jax.serving.keeper import Keeper
from grpocem_jax.serving.metrics import CONTENT_TYPE, Metrics
from grpocem_jax.serving.tenants import Keys
from grpocem_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the interface stands on.

    Attributes:
      catalogue: the models.
      engine: which completes; with `submit` and `stats`.
      searches: which search for adapters by likelihood; with `submit`.
      rewarded: the same by reward.
      keeper: which follows them.
      keys: who may ask.
      most_tokens: of a completion.
      most_prompt: of a prompt, in tokens.
      most_together: of both.
      timeout_s: seconds that a completion may take.
      body_timeout_s: seconds in which a request's body has to be there.
      check: raises `ApiError` where the server can answer no more.
      compiled: programs compiled since the server listens, and in how many seconds.
    """

    catalogue: Catalogue
    engine: Any
    searches: Any
    rewarded: Any
    keeper: Keeper
    keys: Keys
    most_tokens: int
    most_prompt: int
    most_together: int
    timeout_s: float
    body_timeout_s: float
    check: Callable[[], None]
    compiled: Callable[[], tuple[int, float]]


def make_app(parts: Parts) -> Starlette:
    """The ASGI application."""
    models = _Models(parts.catalogue)
    metrics = Metrics(lambda: _gauges(parts), parts.compiled)
    adapters = Adapters(parts.catalogue, parts.searches, parts.rewarded, parts.keeper, parts.check)
    complete = _Completions(parts, metrics)
    gate = Gate(parts.keys, parts.body_timeout_s, metrics.observe)

    async def health(request: Request) -> Response:
        del request
        try:
            parts.check()
        except ApiError as error:
            return error_response(error)
        return Json({"status": "ok", "model": parts.catalogue.default})

    async def show_metrics(call: Call) -> Response:
        del call
        return Response(
            await run_in_threadpool(metrics.text), headers={"Content-Type": CONTENT_TYPE}
        )

    one = "/v1/adapters/{id}"
    table = (
        ("POST", "/v1/completions", complete.text),
        ("POST", "/v1/chat/completions", complete.chat),
        ("GET", "/v1/models", models.list),
        ("GET", "/v1/models/{id:path}", models.show),
        ("POST", "/v1/adapters", adapters.create),
        ("GET", "/v1/adapters", adapters.list),
        ("POST", "/v1/adapters/upload", adapters.upload),
        ("GET", one, adapters.show),
        ("DELETE", one, adapters.delete),
        ("GET", f"{one}/events", adapters.events),
        ("GET", f"{one}/download", adapters.download),
    )
    routes = [Route("/health", health, methods=["GET"])]
    for method, path, handler in table:
        endpoint = gate.endpoint(f"{method} {path}", handler)
        routes.append(Route(path, endpoint, methods=[method]))
    routes += page.routes(
        gate,
        parts.keys,
        parts.catalogue,
        most_tokens=parts.most_tokens,
        most_prompt=parts.most_prompt,
    )
    endpoint = gate.endpoint("GET /metrics", show_metrics, operator=True)
    routes.append(Route("/metrics", endpoint, methods=["GET"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    method, path = request.method[:20], request.url.path[:80]
    text = f"{method} {path}: the server has no such path; docs/serving.md lists them."
    if status == 405:
        text = f"{method} {path}: the path does not take {method}; docs/serving.md says what does."
    response = error_response(ApiError(status, text, code="unknown_url"))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _gauges(parts: Parts) -> Mapping[str, Mapping[str, float]]:
    return {
        "engine": parts.engine.stats._asdict(),
        "adapters": parts.catalogue.store.counts(),
    }


class _Models:
    def __init__(self, catalogue: Catalogue):
        self._catalogue = catalogue

    async def list(self, call: Call) -> Response:
        data = await run_in_threadpool(self._catalogue.models, call.tenant)
        return Json({"object": "list", "data": data})

    async def show(self, call: Call) -> Response:
        name = call.request.path_params["id"]
        return Json(await run_in_threadpool(self._catalogue.model, call.tenant, name))


class _Completions:
    def __init__(self, parts: Parts, metrics: Metrics):
        self._parts, self._metrics = parts, metrics
        self._policy = parts.catalogue.run.policy

    async def text(self, call: Call) -> Response:
        return await self._answer(call, chat=False)

    async def chat(self, call: Call) -> Response:
        return await self._answer(call, chat=True)

    async def _answer(self, call: Call, *, chat: bool) -> Response:
        parts = self._parts
        body = await call.json()
        asked = completions.read(
            body,
            chat=chat,
            most_tokens=parts.most_tokens,
            most_characters=call.tenant.limits.max_body_bytes,
        )
        adapter = await run_in_threadpool(parts.catalogue.engine_name, call.tenant, asked.model)
        prompts = await run_in_threadpool(self._encode, asked)
        requests = self._requests(asked, adapter, prompts)
        taken = sum(map(len, prompts)) + sum(x.max_new_tokens for x in requests)
        give_back = call.take_tokens(taken)
        made = _Made([0] * len(requests))
        call.stack.callback(lambda: give_back(taken - made.used))
        parts.check()
        answers = Answers(parts.engine, len(requests))
        call.stack.callback(answers.cancel)
        try:
            await run_in_threadpool(answers.submit, requests)
        except InputError as error:
            raise ApiError(400, str(error), param="model") from None
        except queue.Full:
            raise ApiError(
                429,
                "the server has as many requests waiting as it takes; try again in a second.",
                code="rate_limit_exceeded",
                retry_after=1,
            ) from None
        made.read = sum(map(len, prompts))
        call.stack.callback(lambda: self._metrics.count_tokens(made.read, sum(made.tokens)))
        writer = Writer(asked, list(map(len, prompts)))
        if asked.stream:
            return Events(self._stream(asked, answers, writer, made))
        whole = self._whole(requests, answers, writer, made)
        return Json(await while_connected(call.request.receive, whole))

    def _encode(self, asked: Asked) -> list[list[int]]:
        return completions.encode(self._policy, asked, room=self._parts.most_prompt)

    def _requests(
        self, asked: Asked, adapter: str | None, prompts: list[list[int]]
    ) -> list[EngineRequest]:
        requests: list[EngineRequest] = []
        for tokens in prompts:
            most = completions.new_tokens(
                asked,
                len(tokens),
                room=self._parts.most_together,
                most=self._parts.most_tokens,
            )
            for _ in range(asked.n):
                requests.append(
                    EngineRequest(
                        tokens=np.asarray(tokens, np.int32),
                        adapter=adapter,
                        max_new_tokens=most,
                        temperature=asked.temperature,
                        top_p=asked.top_p,
                        stop=asked.stop,
                        seed=(asked.seed + len(requests)) % (completions.MOST_SEED + 1),
                    )
                )
        return requests

    async def _whole(
        self, requests: list[EngineRequest], answers: Answers, writer: Writer, made: "_Made"
    ) -> Mapping[str, Any]:
        texts, reasons = [""] * len(requests), [""] * len(requests)
        async for found in self._pieces(answers):
            if found is None:
                continue
            number, piece = found
            texts[number] += piece.text
            reasons[number] = piece.finish or ""
            made.add(number, piece)
        return writer.whole(texts, reasons, sum(made.tokens))

    async def _stream(
        self, asked: Asked, answers: Answers, writer: Writer, made: "_Made"
    ) -> AsyncIterator[Mapping[str, Any] | None]:
        begun = set()
        async for found in self._pieces(answers):
            if found is None:
                yield None
                continue
            number, piece = found
            made.add(number, piece)
            if number not in begun and asked.chat:
                yield writer.chunk(number, "", None, first=True)
            begun.add(number)
            if piece.text:
                yield writer.chunk(number, piece.text, None)
            if piece.finish is not None:
                yield writer.chunk(number, "", piece.finish)
        if asked.include_usage:
            yield writer.last(sum(made.tokens))

    def _pieces(self, answers: Answers) -> AsyncIterator[tuple[int, Any] | None]:
        return answers.pieces(seconds=self._parts.timeout_s, check=self._parts.check)


@dataclasses.dataclass
class _Made:
    """Tokens of a request so far.

    Attributes:
      tokens: made, of each completion.
      read: of the prompts; 0 before the engine has taken them.
    """

    tokens: list[int]
    read: int = 0

    @property
    def used(self) -> int:
        """All of them."""
        return self.read + sum(self.tokens)

    def add(self, number: int, piece: Any) -> None:
        """Counts the tokens of a piece."""
        self.tokens[number] = piece.tokens
