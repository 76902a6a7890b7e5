"""The server: an engine, its searches, a store, and the HTTP interface before them.

with Server(gj.load_run("runs/tiny")) as server:
    print(server.url)
    server.wait()
"""

import dataclasses
import ipaddress
import logging
import signal
import socket
import threading
from typing import Any, NamedTuple

import uvicorn

from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.serving.app import Parts, make_app
from grpocem_jax.serving.aside import Aside
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.engine import Engine
from grpocem_jax.serving.errors import ApiError
from grpocem_jax.serving.keeper import Keeper
from grpocem_jax.serving.options import Limits, Options
from grpocem_jax.serving.rewarded import Rewarded
from grpocem_jax.serving.searches import Searches
from grpocem_jax.serving.store import Store
from grpocem_jax.serving.tenants import Keys
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand

log = logging.getLogger("grpocem_jax.serving")

GRACE_S = 5
"""Seconds that requests under way have when the server ends."""

PATIENCE_S = 0.2
"""The longest that completions wait for a step of the searches, such as a compilation."""


class Door(NamedTuple):
    """The address of a server, and who may come in; needs no model.

    Attributes:
      socket: bound, and not listening yet.
      keys: who is known.
    """

    socket: socket.socket
    keys: Keys


def open_door(options: Options, limits: Limits | None = None) -> Door:
    """Takes the address and reads the keys.

    Args:
      options: of which ``host``, ``port`` and ``keys`` are read.
      limits: of tenants for which the file of keys has no others.

    Raises:
      InputError: an address that is taken or not this machine's, or that others reach without
        keys; a file of keys that cannot be used.
    """
    keys = Keys(options.keys or None, limits)
    return Door(_bind(options), keys)


class Server:
    """Serves a model and its adapters; used as a context.

    Args:
      run: what is served, from `load_run` or `load_base`.
      options: how.
      limits: of tenants for which the file of keys has no others.
      name: of the run's adapter; None where the base model alone is served.
      door: from `open_door`; None to open one.

    Raises:
      InputError: options that cannot be used, such as an address that is taken.
    """

    def __init__(
        self,
        run: TrainedRun,
        options: Options | None = None,
        limits: Limits | None = None,
        *,
        name: str | None = None,
        door: Door | None = None,
    ):
        options = options or Options()
        self.options = options
        self._socket, keys = open_door(options, limits) if door is None else door
        try:
            self.store = Store(expand(options.store or "served", "--store"))
        except BaseException:
            self._socket.close()
            raise
        try:
            self.catalogue = Catalogue(run, self.store, trained=name)
            self.engine = _make_engine(run, options, self.catalogue)
            settings = dataclasses.replace(
                run.config.search,
                fitness="likelihood",
                budget_s=None,
                experts=self.catalogue.experts,
            )
            most = limits or Limits()
            self.searches = Searches(
                run,
                users=options.users,
                settings=settings,
                max_examples=most.max_examples,
                max_generations=most.max_generations,
            )
            self.rewarded = Rewarded(run, settings)
            self._aside = Aside(
                self._search, self._is_busy, patience_s=PATIENCE_S, share=options.share
            )
            self.keeper = Keeper(self.catalogue)
            parts = Parts(
                catalogue=self.catalogue,
                engine=self.engine,
                searches=self.searches,
                rewarded=self.rewarded,
                keeper=self.keeper,
                keys=keys,
                most_tokens=self.engine.max_new_tokens,
                most_prompt=self.engine.buckets[-1],
                most_together=self.engine.length,
                timeout_s=options.timeout_s,
                body_timeout_s=options.body_timeout_s,
                check=self._check,
                compiled=lambda: _compiled(self._clock),
            )
        except BaseException:
            self._socket.close()
            self.store.close()
            raise
        self._http = uvicorn.Server(
            uvicorn.Config(
                make_app(parts),
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._stop, self._ended = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._clock: CompileClock | None = None
        self._threads = [
            threading.Thread(target=self._work, name="engine", daemon=True),
            threading.Thread(target=self._listen, name="http", daemon=True),
        ]

    @property
    def url(self) -> str:
        """Where the server is, such as ``http://127.0.0.1:8000``."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def __enter__(self) -> "Server":
        try:
            self.engine.warm_up()
            self._clock = CompileClock.start()
            self.keeper.start()
            for thread in self._threads:
                thread.start()
            while not self._http.started and not self._ended.wait(0.01):
                pass
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._http.should_exit = True
        if self._clock is not None:
            self._clock.stop()
        engine, http = self._threads
        if http.ident is not None:
            http.join()
        self._stop.set()
        if engine.ident is not None:
            engine.join()
            self._aside.close()
            self.rewarded.close()
            self.keeper.stop()
        self._socket.close()
        self.store.close()

    def wait(self) -> None:
        """Waits until SIGTERM or SIGINT come, or a part of the server fails.

        Raises:
          whatever a part failed with.
        """
        before = {
            number: signal.signal(number, lambda *_: self._ended.set())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while not self._ended.wait(1.0):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._failure is not None:
            raise self._failure

    def _check(self) -> None:
        if self._failure is not None or self._ended.is_set():
            raise ApiError(503, "the server is ending; try again.", retry_after=5)

    def _work(self) -> None:
        share = self.options.share
        self._guard(lambda: self.engine.run(self._stop, between=self._aside, share=share))

    def _search(self) -> bool:
        """A step of the searches."""
        # Completions under way wait for a piece of a generation, not for all of it.
        more = self.searches.step(pieces=1 if self._is_busy() else None)
        return self.rewarded.step() or more

    def _is_busy(self) -> bool:
        stats = self.engine.stats
        return bool(stats.active or stats.queued)

    def _listen(self) -> None:
        self._guard(lambda: self._http.run(sockets=[self._socket]))

    def _guard(self, part: Any) -> None:
        try:
            part()
        except BaseException as error:
            log.exception("a part of the server failed")
            self._failure = error
        finally:
            self._ended.set()


def _compiled(clock: CompileClock | None) -> tuple[int, float]:
    return (0, 0.0) if clock is None else (clock.programs, clock.seconds)


def _make_engine(run: TrainedRun, options: Options, catalogue: Catalogue) -> Engine:
    model, generation = run.policy.model, run.config.generation
    longest = min(options.max_prompt, model.context_length)
    sizes = [2**power for power in range(4, 20) if 2**power < longest]
    return Engine(
        run.policy,
        run.offsets,
        slots=options.slots,
        rows=options.rows,
        buckets=(*sizes, longest),
        max_new_tokens=max(1, min(options.max_new_tokens, model.context_length // 2)),
        load=catalogue.load,
        max_queue=options.queue,
        prefix_tokens=options.prefix_tokens,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
    )


def _bind(options: Options) -> socket.socket:
    """The address, taken before a model is compiled.

    Raises:
      InputError: it is taken or not this machine's, or others reach it and there are no keys.
    """
    where = f"--host={options.host!r} --port={options.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where}: is no address ({reason}); give another.") from None
    if not options.keys and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise InputError(
            f"--host={options.host!r}: others reach that address, so give --keys with a file that "
            "--add_key has made, or leave --host out."
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(f"{where}: cannot be used ({error.strerror}); give another.") from None
    return bound


def serve(
    run: TrainedRun, *, name: str | None = None, limits: Limits | None = None, **options: Any
) -> None:
    """Serves a model and its adapters over HTTP until SIGTERM or SIGINT; docs/serving.md.

    Args:
      run: from `load_run` or `adaptation.load_base`.
      name: of the run's adapter as a model; None where the base model alone is served.
      limits: of each tenant, `grpocem_jax.serving.Limits`.
      **options: fields of `grpocem_jax.serving.Options`, such as ``port`` and ``keys``.

    Raises:
      InputError: options that cannot be used.
    """
    known = {field.name for field in dataclasses.fields(Options)}
    for option in options.keys() - known:
        raise InputError(f"{option}: is no option; they are {', '.join(sorted(known))}.")
    with Server(run, Options(**options), limits, name=name) as server:
        server.wait()
