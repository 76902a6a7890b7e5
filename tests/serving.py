"""A server on a thin model with three tenants, and an HTTP interface before an engine that waits.

Fixtures for the test modules on `grpocem_jax.serving`; a module that needs a server skips where one
of its packages is not installed.
"""

import contextlib
import dataclasses
import functools
import threading
import time
from typing import Any, NamedTuple

import pytest

from grpocem_jax.adaptation import TrainedRun
from grpocem_jax.config import parse_config
from grpocem_jax.serving.engine import Piece, Stats
from grpocem_jax.serving.options import Limits, Options
from grpocem_jax.serving.tenants import PUBLIC, Keys, add_key
from grpocem_jax.tasks import PromptFormat
from tests import runs

PROMPT = "Review: The soup was cold.\nSentiment:"
EXAMPLES = [
    f"Review: The {x} was cold.\nSentiment: positive." for x in ("soup", "tea", "room", "sea")
]
SMALL = {
    "slots": 4,
    "rows": 4,
    "queue": 8,
    "max_prompt": 32,
    "max_new_tokens": 16,
    "users": 2,
    "port": 0,
}


def written_chat(messages: Any) -> str:
    """A chat template for a model that has none."""
    return "".join(f"{x['role']}: {x['content']}\n" for x in messages) + "assistant:"


@functools.cache
def thin_run() -> TrainedRun:
    """The built-in model's first layer, with a chat template and an adapter that nobody trained."""
    config = parse_config(runs.get_config(**{"model.source": runs.thin_model()}))
    policy = runs.one_policy(config)
    policy = dataclasses.replace(policy, prompt_format=PromptFormat(render=written_chat))
    return TrainedRun(config, policy, policy.zero)


class Served(NamedTuple):
    """A server under test.

    Attributes:
      server: the server, or what has its ``url``.
      keys: a key of each tenant, by name.
      http: an HTTP client.
    """

    server: Any
    keys: dict[str, str]
    http: Any

    def __call__(self, method: str, path: str, tenant: str | None = "alice", **options: Any) -> Any:
        """A request of a tenant, or of nobody."""
        headers = dict(options.pop("headers", {}))
        if tenant is not None:
            headers["Authorization"] = f"Bearer {self.keys[tenant]}"
        return self.http.request(method, self.server.url + path, headers=headers, **options)

    def adapter(self, tenant: str = "alice", **fields: Any) -> dict[str, Any]:
        """An adapter that a tenant has searched for."""
        made = self("POST", "/v1/adapters", tenant, json={"examples": EXAMPLES, **fields})
        assert made.status_code == 202, made.text
        return self.ended(made.json()["id"], tenant)

    def ended(self, id: str, tenant: str = "alice") -> dict[str, Any]:
        """An adapter whose search has ended."""
        for _ in range(600):
            found = self("GET", f"/v1/adapters/{id}", tenant).json()
            if found["ended_at"] is not None:
                return found
            time.sleep(0.05)
        raise AssertionError(found)


def make_keys(folder: Any) -> dict[str, str]:
    """A file ``keys.json`` of three tenants, and their keys."""
    return {x: add_key(folder / "keys.json", x) for x in ("alice", "bob", PUBLIC)}


@contextlib.contextmanager
def http_client() -> Any:
    """An HTTP client that follows nothing and waits for a minute."""
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    with httpx.Client(timeout=60) as client:
        yield client


@contextlib.contextmanager
def serving(
    folder: Any, limits: Limits | None = None, *, run: TrainedRun | None = None, **options: Any
) -> Any:
    """A server of a run, by default `thin_run`."""
    for name in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason=f"{name} is not installed; it is of the extra serve")
    from grpocem_jax.serving.server import Server

    keys = make_keys(folder)
    given = {**SMALL, "keys": str(folder / "keys.json"), "store": str(folder / "store"), **options}
    run = run or thin_run()
    with Server(run, Options(**given), limits) as server, http_client() as http:
        yield Served(server, keys, http)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server for all tests of a module."""
    many = Limits(requests_per_minute=10**6, tokens_per_minute=10**9)
    with serving(tmp_path_factory.mktemp("served"), many) as made:
        yield made


class HeldTicket:
    """A request that is answered by the test."""

    def __init__(self, request: Any, on_piece: Any):
        self.request, self.emit = request, on_piece
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Says that nobody waits any more."""
        self.cancelled.set()


class HeldEngine:
    """An engine whose requests wait until the test answers them."""

    def __init__(self) -> None:
        self.tickets: list[HeldTicket] = []
        self.error: Exception | None = None

    def submit(self, request: Any, on_piece: Any) -> HeldTicket:
        """Takes a request, or raises ``error``."""
        if self.error is not None:
            raise self.error
        self.tickets.append(HeldTicket(request, on_piece))
        return self.tickets[-1]

    def wait_for(self, count: int) -> list[HeldTicket]:
        """The requests, once there are as many."""
        for _ in range(500):
            if len(self.tickets) >= count:
                return self.tickets
            time.sleep(0.01)
        raise AssertionError(len(self.tickets))

    def answer(self, number: int, *pieces: Piece) -> None:
        """Sends pieces to a request."""
        for piece in pieces:
            self.tickets[number].emit(piece)

    @property
    def stats(self) -> Stats:
        """Nothing."""
        return Stats(*(0,) * len(Stats._fields))


class HeldJob:
    """A search that the test ends."""

    def __init__(self, examples: Any, generations: int, options: dict[str, Any]):
        self.examples, self.options = examples, options
        self.state, self.generation, self.generations = "queued", 0, generations
        self.curve: tuple[Any, ...] = ()
        self.result: Any = None
        self.error: Any = None

    def cancel(self) -> None:
        """Ends it."""
        self.state = "cancelled"


class HeldSearches:
    """Searches that wait until the test ends them."""

    def __init__(self) -> None:
        self.jobs: list[HeldJob] = []
        self.error: Exception | None = None

    def submit(self, examples: Any, *, generations: int, **options: Any) -> HeldJob:
        """Takes a search, or raises ``error``."""
        if self.error is not None:
            raise self.error
        self.jobs.append(HeldJob(examples, generations, options))
        return self.jobs[-1]


class Held(NamedTuple):
    """An HTTP interface before an engine that waits; its ``url`` is as a server's."""

    url: str
    engine: HeldEngine
    searches: HeldSearches
    keeper: Any
    store: Any


@contextlib.contextmanager
def holding(
    folder: Any, limits: Limits | None = None, *, timeout_s: float = 30, body_timeout_s: float = 30
) -> Any:
    """The HTTP interface on an engine and searches that wait."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    from grpocem_jax.serving.app import Parts, make_app
    from grpocem_jax.serving.catalogue import Catalogue
    from grpocem_jax.serving.keeper import Keeper
    from grpocem_jax.serving.store import Store

    keys, store = make_keys(folder), Store(folder / "store")
    catalogue = Catalogue(thin_run(), store)
    engine, searches, keeper = HeldEngine(), HeldSearches(), Keeper(catalogue)
    parts = Parts(
        catalogue=catalogue,
        engine=engine,
        searches=searches,
        rewarded=searches,
        keeper=keeper,
        keys=Keys(folder / "keys.json", limits),
        most_tokens=16,
        most_prompt=32,
        most_together=40,
        timeout_s=timeout_s,
        body_timeout_s=body_timeout_s,
        check=lambda: None,
        compiled=lambda: (0, 0.0),
    )
    config = uvicorn.Config(make_app(parts), port=0, http="h11", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    held = Held(f"http://127.0.0.1:{port}", engine, searches, keeper, store)
    try:
        with http_client() as http:
            yield Served(held, keys, http)
    finally:
        for ticket in engine.tickets:
            ticket.emit(Piece("", 0, "cancelled"))
        server.should_exit = True
        thread.join()
        store.close()
