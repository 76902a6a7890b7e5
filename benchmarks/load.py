"""Requests over HTTP to a server on this machine: what it bears, and how long they take.

    python -m benchmarks.load --url http://127.0.0.1:8000 --clients 16      # a closed loop
    python -m benchmarks.load --url http://127.0.0.1:8000 --rate 40         # an open one

In a closed loop so many clients ask again as soon as they are answered.  In an open one requests
come at a rate, after gaps drawn from an exponential distribution, whether or not others have been
answered; what one waits for its turn counts.  Prompts are random tokens, completions are streamed
and greedy, and the models that the server lists, adapters among them, are asked in turn.  A run is
bounded in seconds and in requests, and no host but this machine is asked.  OPENAI_API_KEY is sent
where it is set.
"""

import collections
import http.client
import ipaddress
import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks import common
from grpocem_jax.config import commands
from grpocem_jax.utils.errors import InputError

MOST_CLIENTS = 256
"""Requests under way at a time."""

MOST_SECONDS, MOST_REQUESTS = 600, 100_000
TIMEOUT_S = 60
TOKENS = (32, 256)
"""Prompts are drawn from these tokens, which every vocabulary has."""


class Answer(NamedTuple):
    """What came of a request.

    Attributes:
      status: of HTTP, or the name of what cut it off.
      seconds: from when it was due until its end.
      first: the same until the first of its text; NaN where none came.
      tokens: of the completion.
      ended: when, by the clock of the run.
    """

    status: str
    seconds: float
    first: float
    tokens: int
    ended: float


class Target(NamedTuple):
    """A server and what is asked of it.

    Attributes:
      host: an address of this machine.
      port: of the server.
      models: asked in turn.
      prompt_tokens: of each prompt.
      tokens: of each completion, at most.
    """

    host: str
    port: int
    models: Sequence[str]
    prompt_tokens: int
    tokens: int


def find(url: str, *, prompt_tokens: int, tokens: int) -> Target:
    """Looks at a server.

    Raises:
      InputError: an address that is not this machine's own, or where no server answers.
    """
    parts = urllib.parse.urlsplit(url)
    must = "must be http://127.0.0.1:PORT, a server on this machine"
    try:
        host, port = parts.hostname, parts.port or 80
        if parts.scheme != "http" or host is None:
            raise InputError(f"--url={url!r}: {must}.")
        found = {str(x[4][0]) for x in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, ValueError) as error:
        raise InputError(f"--url={url!r}: {must} ({error}).") from None
    if not all(ipaddress.ip_address(x.partition("%")[0]).is_loopback for x in found):
        raise InputError(f"--url={url!r}: is another machine's address; {must}.")
    host = sorted(found)[0]
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/v1/models", headers=_headers())
        response = connection.getresponse()
        listed = json.loads(response.read())
        if response.status != 200:
            raise InputError(f"--url={url!r}: the server says {listed['error']['message']}")
        models = [model["id"] for model in listed["data"]]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"--url={url!r}: no grpocem-serve answers ({type(error).__name__}); start one."
        ) from None
    finally:
        connection.close()
    return Target(host, port, models, prompt_tokens, tokens)


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Due:
    """Numbers of requests and when they are due, handed out until the run is over."""

    def __init__(self, rate: float, seconds: float, requests: int):
        self._rate, self._seconds, self._requests = rate, seconds, requests
        self._gaps = np.random.default_rng(0)
        self._number, self._due = 0, 0.0
        self._lock = threading.Lock()
        self.began = time.perf_counter()

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Each request once, whichever client asks for the next."""
        while True:
            with self._lock:
                if self._rate:
                    self._due += self._gaps.exponential(1 / self._rate)
                else:
                    self._due = self.now()
                if self._due >= self._seconds or self._number >= self._requests:
                    return
                number, due = self._number, self._due
                self._number += 1
            time.sleep(max(0.0, due - self.now()))
            yield number, due


def run(
    target: Target, *, clients: int, rate: float, seconds: float, requests: int
) -> list[Answer]:
    """Asks until the seconds or the requests are used up, and waits for the answers.

    Args:
      target: from `find`.
      clients: of a closed loop.
      rate: requests per second of an open loop; 0 for a closed one.
      seconds: no request is due later.
      requests: at most so many.
    """
    due = _Due(rate, seconds, requests)
    answers: list[Answer] = []  # appending is atomic

    def client() -> None:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT_S)
        for number, at in due:
            answers.append(_ask(connection, target, number, at, due))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(MOST_CLIENTS if rate else clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _ask(
    connection: http.client.HTTPConnection, target: Target, number: int, at: float, due: _Due
) -> Answer:
    """One request and its answer."""
    prompt = np.random.default_rng(number).integers(*TOKENS, target.prompt_tokens).tolist()
    asked = {
        "model": target.models[number % len(target.models)],
        "prompt": prompt,
        "max_tokens": target.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, tokens = float("nan"), 0
    try:
        headers = {"Content-Type": "application/json", **_headers()}
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        response = connection.getresponse()
        status = str(response.status)
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                status = "error in a stream"
            if first != first and any(x["text"] for x in chunk.get("choices", ())):
                first = due.now() - at
            tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
        response.read()  # which frees the connection
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        status = type(error).__name__
    ended = due.now()
    return Answer(status, ended - at, first, tokens, ended)


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates and quantiles of the requests that were answered, and how many were not, and why."""
    good = [x for x in answers if x.status == "200"]
    seconds = max((x.ended for x in answers), default=0.0)
    failed = collections.Counter(x.status for x in answers if x.status != "200")
    return {
        "requests": len(answers),
        "failed": dict(failed),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds if seconds else 0.0,
        "tokens_per_s": sum(x.tokens for x in good) / seconds if seconds else 0.0,
        "latency_s": _quantiles([x.seconds for x in good]),
        "first_token_s": _quantiles([x.first for x in good if x.first == x.first]),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(values, (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))


def row(label: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a table under `HEAD`; milliseconds as p50 / p95 / p99."""
    times = [found["latency_s"], found["first_token_s"]]
    cells = [" / ".join(f"{1000 * x:.0f}" for x in own.values()) if own else "-" for own in times]
    rates = (f"{found['requests_per_s']:.1f}", f"{found['tokens_per_s']:.0f}")
    return (label, *rates, *cells, str(sum(found["failed"].values())))


HEAD = ("", "requests/s", "tokens/s", "ms p50/p95/p99", "first token", "failed")


def measure(
    url: str,
    *,
    clients: int,
    rate: float,
    seconds: float,
    requests: int,
    prompt_tokens: int,
    tokens: int,
) -> tuple[str, dict[str, Any]]:
    """Runs it; returns the text to show and the JSON record."""
    target = find(url, prompt_tokens=prompt_tokens, tokens=tokens)
    answers = run(target, clients=clients, rate=rate, seconds=seconds, requests=requests)
    found = summarize(answers)
    label = f"{rate:g} requests/s" if rate else f"{clients} clients"
    lines = [
        f"Load over HTTP, prompts of {prompt_tokens} tokens, completions of {tokens}, "
        f"{len(target.models)} models",
        "",
        common.table([HEAD, row(label, found)]),
    ]
    lines += [f"failed    {count} by {why}" for why, count in found["failed"].items()]
    how = {"rate": rate} if rate else {"clients": clients}
    return "\n".join(lines), {**how, **found, "models": len(target.models)}


def main(argv: list[str]) -> None:
    """Checks the flags and measures."""
    del argv
    values = flags.FLAGS
    text, record = measure(
        values.url,
        clients=values.clients,
        rate=values.rate,
        seconds=values.seconds,
        requests=values.requests,
        prompt_tokens=values.prompt_tokens,
        tokens=values.tokens,
    )
    common.show(text, record, values.json)


if __name__ == "__main__":
    flags.DEFINE_string("url", None, "Address of a server on this machine.", required=True)
    flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
    flags.DEFINE_integer("clients", 16, "Clients of a closed loop.", 1, MOST_CLIENTS)
    flags.DEFINE_float("rate", 0.0, "Requests per second of an open loop; 0: a closed one.", 0.0)
    flags.DEFINE_float("seconds", 10.0, "So long.", 0.1, MOST_SECONDS)
    flags.DEFINE_integer("requests", 10_000, "At most so many.", 1, MOST_REQUESTS)
    flags.DEFINE_integer("tokens", 64, "Tokens of each completion.", 1)
    flags.DEFINE_integer("prompt_tokens", 23, "Tokens of each prompt.", 1)
    commands.run(main)
