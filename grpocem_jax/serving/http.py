"""What all endpoints have in common: who asks, how much, how errors and events are sent."""

import asyncio
import contextlib
import json
import logging
import math
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from safetensors import SafetensorError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from grpocem_jax.serving.errors import ApiError
from grpocem_jax.serving.fields import read_json
from grpocem_jax.serving.tenants import Bucket, Keys, Tenant
from grpocem_jax.utils.errors import InputError

T = TypeVar("T")

log = logging.getLogger("grpocem_jax.serving")

LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]*)?", re.IGNORECASE)
"""The header Host of a server without keys: a name of this machine, perhaps with a port."""

MOST_TENANTS = 10_000
"""Whose meters are kept; those of tenants that have nothing under way go first."""


class Json(Response):
    """A body of JSON in ASCII, so that no text in it can be anything else."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return (json.dumps(content, allow_nan=False) + "\n").encode()


def error_response(error: ApiError) -> Json:
    """The response to a request that failed."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Json(error.body, error.status, headers)


class Events(Response):
    """Server-sent events: an object each, then ``[DONE]``; errors are events as well."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Mapping[str, Any] | None]):
        """``events`` yields objects, and None for a comment that keeps the connection open."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client has gone."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )

        async def write(text: str, *, more: bool = True) -> None:
            body = text.encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def stream() -> None:
            try:
                async for event in self._events:
                    await write(": \n\n" if event is None else f"data: {json.dumps(event)}\n\n")
            except ApiError as error:
                await write(f"data: {json.dumps(error.body)}\n\n")
            await write("data: [DONE]\n\n", more=False)

        await while_connected(receive, stream())


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits something for as long as the client is there; the request's body has been read.

    Raises:
      ClientDisconnect: it has gone, and the work was cancelled.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class Meter:
    """What a tenant has asked for lately."""

    def __init__(self, tenant: Tenant):
        self.tenant = tenant
        self.requests = Bucket(tenant.limits.requests_per_minute)
        self.tokens = Bucket(tenant.limits.tokens_per_minute)
        self.open = 0


class Call:
    """One request of a tenant.

    Attributes:
      request: Starlette's.
      tenant: who asks.
      stack: what is to be done when the response has ended, however it does.
    """

    def __init__(
        self,
        request: Request,
        tenant: Tenant,
        stack: contextlib.ExitStack,
        meter: Meter,
        wait: float,
    ):
        self.request, self.tenant, self.stack = request, tenant, stack
        self._meter, self._wait = meter, wait

    async def body(self, *, media: str, most: int) -> bytes:
        """The body of the request.

        Args:
          media: its content type.
          most: bytes that it may have.

        Raises:
          ApiError: another type, too large, or too slow.
        """
        given = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != media:
            raise ApiError(
                415,
                f"the header Content-Type is {given[:60]!r}; send {media}.",
                param="Content-Type",
            )
        large = ApiError(413, f"the body is larger than {most} bytes; send less.")
        length = self.request.headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            raise large
        content = bytearray()
        try:
            async with asyncio.timeout(self._wait):
                async for part in self.request.stream():
                    content += part
                    if len(content) > most:
                        raise large
        except TimeoutError:
            raise ApiError(
                408, f"the body was not there after {self._wait:g} seconds; send it again."
            ) from None
        return bytes(content)

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
          ApiError: it is something else.
        """
        most = self.tenant.limits.max_body_bytes
        content = await self.body(media="application/json", most=most)
        return await run_in_threadpool(read_json, content)

    def take_tokens(self, count: int) -> Callable[[int], None]:
        """Takes tokens from the tenant's rate.

        Returns:
          a function that gives back those that were not used.

        Raises:
          ApiError: there are not as many.
        """
        most, bucket = self.tenant.limits.tokens_per_minute, self._meter.tokens
        if count > most:
            raise ApiError(
                400,
                f"the request may take {count} tokens, but tokens_per_minute={most}; ask for fewer "
                "or shorter completions.",
                param="max_tokens",
            )
        wait = bucket.take(count)
        if wait:
            raise _rate(f"tokens_per_minute={most}", wait)
        return bucket.give_back


Handler = Callable[[Call], Awaitable[Response]]


def _rate(limit: str, wait: float) -> ApiError:
    return ApiError(
        429,
        f"{limit} is used up; try again in {max(1, math.ceil(wait))} seconds.",
        code="rate_limit_exceeded",
        retry_after=wait,
    )


class Gate:
    """Lets requests in: by key, and by what their tenant has asked for lately.

    Args:
      keys: who is known.
      body_timeout_s: seconds in which a request's body has to be there.
      observe: is called with route, status and seconds of every request.
    """

    def __init__(
        self, keys: Keys, body_timeout_s: float, observe: Callable[[str, int, float], None]
    ):
        self._keys, self._wait, self._observe = keys, body_timeout_s, observe
        self._meters: dict[str, Meter] = {}

    def endpoint(self, route: str, handler: Handler, *, operator: bool = False) -> "_Endpoint":
        """An ASGI application of a handler; ``operator``: for the operator's key alone."""
        return _Endpoint(self, route, handler, operator)

    def tenant(self, request: Request) -> Tenant:
        """Who asks.

        Raises:
          ApiError: nobody that is known, or a name of another machine where there are no keys.
        """
        host = request.headers.get("host", "")
        if self._keys.are_open and not LOOPBACK.fullmatch(host):
            # Else a web page could reach the server through a name of its own.
            raise ApiError(
                403,
                f"the header Host is {host[:80]!r}, but a server "
                "without keys is for this machine alone; ask for 127.0.0.1, or give it --keys.",
                param="Host",
            )
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else None
        found = self._keys.find(given)
        if found is None:
            text = "the API key is missing" if given is None else "the API key is not known"
            raise ApiError(
                401,
                f"{text}; send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
            )
        return found

    def meter(self, tenant: Tenant) -> Meter:
        """The meter of a tenant, a new one where its limits have changed."""
        meter = self._meters.get(tenant.name)
        if meter is None or meter.tenant.limits != tenant.limits:
            if len(self._meters) >= MOST_TENANTS:
                self._meters = {name: x for name, x in self._meters.items() if x.open}
            fresh = Meter(tenant)
            fresh.open = meter.open if meter else 0
            meter = self._meters[tenant.name] = fresh
        return meter

    @contextlib.contextmanager
    def admitted(self, meter: Meter) -> Any:
        """Counts a request among those under way while the block runs.

        Raises:
          ApiError: too many in a minute, or at a time.
        """
        limits = meter.tenant.limits
        if meter.open >= limits.max_open:
            raise ApiError(
                429,
                f"max_open={limits.max_open} requests are under way; wait for one of them.",
                code="rate_limit_exceeded",
                retry_after=1,
            )
        wait = meter.requests.take(1)
        if wait:
            raise _rate(f"requests_per_minute={limits.requests_per_minute}", wait)
        meter.open += 1
        try:
            yield
        finally:
            # A tenant whose limits have changed meanwhile has another meter.
            now = self._meters.get(meter.tenant.name, meter)
            now.open -= 1

    async def answer(
        self,
        route: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        respond: Callable[[Send], Awaitable[None]],
    ) -> None:
        """Sends what ``respond`` gives or the error that it raises, and says so to ``observe``."""
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                await respond(watched)
            except ClientDisconnect:
                status = status or 499
            except ApiError as error:
                if not status:
                    await error_response(error)(scope, receive, watched)
            except InputError as error:
                if not status:
                    await error_response(ApiError(400, str(error)))(scope, receive, watched)
            except (sqlite3.Error, OSError, SafetensorError) as error:
                log.exception("the store fails")
                if not status:
                    text = f"the store fails ({type(error).__name__}); try again later."
                    unable = ApiError(503, text, retry_after=5)
                    await error_response(unable)(scope, receive, watched)
            except Exception:
                log.exception("%s failed", route)
                if not status:
                    text = "the server failed to answer; its log says why."
                    await error_response(ApiError(500, text))(scope, receive, watched)
        finally:
            self._observe(route, status or 499, time.monotonic() - began)


class _Endpoint:
    def __init__(self, gate: Gate, route: str, handler: Handler, operator: bool):
        self._gate, self._route = gate, route
        self._handler, self._operator = handler, operator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate = self._gate

        async def respond(send: Send) -> None:
            request = Request(scope, receive)
            tenant = gate.tenant(request)
            if self._operator and not tenant.is_operator:
                raise ApiError(403, "this is for the operator's key alone.")
            meter = gate.meter(tenant)
            with contextlib.ExitStack() as stack:
                stack.enter_context(gate.admitted(meter))
                call = Call(request, tenant, stack, meter, gate._wait)
                response = await self._handler(call)
                await response(scope, receive, send)

        await gate.answer(self._route, scope, receive, send, respond)
