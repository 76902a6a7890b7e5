"""The load generator of the benchmarks, against servers that answer as the test says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks import load
from grpocem_jax.utils.errors import InputError


class Handler(BaseHTTPRequestHandler):
    """Completes every prompt by two tokens, and every fifth not at all."""

    protocol_version = "HTTP/1.1"
    delay_s = 0.02

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send({"data": [{"id": "base"}, {"id": "mine"}]})

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))
        with self.server.lock:
            self.server.asked.append((asked, self.headers["Authorization"]))
            number = len(self.server.asked)
        if number % 5 == 0:
            return self.send({"error": {"message": "too many"}}, 429)
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(self.delay_s)
        self.event({"choices": [{"text": "a"}]})
        time.sleep(self.delay_s)
        self.event({"choices": [{"text": "b"}]})
        self.event({"choices": [], "usage": {"completion_tokens": 2}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, chunk):
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def send(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked, made.lock = [], threading.Lock()
        made.handle_error = lambda *_: None  # of connections that a test cuts off
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def target(server, **changes):
    url = f"http://localhost:{server.server_port}"
    return load.find(url, **{"prompt_tokens": 3, "tokens": 2, **changes})


def test_a_closed_loop_has_so_many_requests_under_way(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    found = target(server)
    assert found.models == ["base", "mine"]
    answers = load.run(found, clients=2, rate=0, seconds=30, requests=11)
    asked = [x for x, _ in server.asked]
    assert len(asked) == len(answers) == 11
    assert {x["model"] for x in asked} == {"base", "mine"}
    assert all(x["stream"] and x["max_tokens"] == 2 and len(x["prompt"]) == 3 for x in asked)
    assert len({tuple(x["prompt"]) for x in asked}) == 11
    assert {key for _, key in server.asked} == {"Bearer sk-1"}
    result = load.summarize(answers)
    assert (result["requests"], result["failed"]) == (11, {"429": 2})
    # Nine answers of two tokens; each took two delays, the first token one.
    assert result["tokens_per_s"] == pytest.approx(18 / result["seconds"])
    assert result["latency_s"]["p50"] >= 2 * Handler.delay_s
    assert Handler.delay_s <= result["first_token_s"]["p50"] < result["latency_s"]["p50"]
    assert result["seconds"] >= 5 * 2 * Handler.delay_s  # two at a time, nine in all


def test_an_open_loop_comes_at_its_rate_whatever_the_answers_take(server, monkeypatch):
    monkeypatch.setattr(Handler, "delay_s", 0.2)
    answers = load.run(target(server), clients=1, rate=40, seconds=0.5, requests=1000)
    gaps = np.random.default_rng(0).exponential(1 / 40, 100)
    assert len(answers) == np.sum(np.cumsum(gaps) < 0.5)
    # One client would have had time for two.
    assert len(answers) > 10
    assert max(x.ended for x in answers) < 0.5 + 10 * 0.4


def test_a_wait_for_the_turn_counts_as_time(server, monkeypatch):
    monkeypatch.setattr(load, "MOST_CLIENTS", 1)
    monkeypatch.setattr(Handler, "delay_s", 0.1)
    answers = load.run(target(server), clients=1, rate=1000, seconds=10, requests=4)
    assert [x.seconds for x in answers] == sorted(x.seconds for x in answers)
    assert answers[-1].seconds > 3.5 * 0.2


def test_what_is_cut_off_is_counted(server, monkeypatch):
    found = target(server)
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.connection.shutdown(2))
    result = load.summarize(load.run(found, clients=1, rate=0, seconds=5, requests=3))
    assert sum(result["failed"].values()) == result["requests"] == 3
    assert result["requests_per_s"] == 0
    assert result["latency_s"] is None
    json.dumps(result, allow_nan=False)
    assert load.row("x", result)[-1] == "3"


@pytest.mark.parametrize(
    ("url", "fragment"),
    [
        ("http://192.0.2.1:8000", "another machine's address"),
        ("http://0.0.0.0:8000", "another machine's address"),
        ("https://127.0.0.1:8000", "must be http://127.0.0.1:PORT"),
        ("127.0.0.1:8000", "must be http://127.0.0.1:PORT"),
        ("http://127.0.0.1:99999", "must be http://127.0.0.1:PORT"),
        ("http://127.0.0.1:1", "no grpocem-serve answers"),
    ],
)
def test_no_other_machine_is_asked(url, fragment, monkeypatch):
    monkeypatch.setattr(load, "TIMEOUT_S", 5)
    with pytest.raises(InputError, match=r"^--url='") as refused:
        load.find(url, prompt_tokens=1, tokens=1)
    assert fragment in str(refused.value)


def test_a_name_with_an_address_elsewhere_is_refused(monkeypatch):
    found = [(2, 1, 6, "", (x, 80)) for x in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(load.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(InputError, match="another machine's"):
        load.find("http://somewhere.test", prompt_tokens=1, tokens=1)


def test_quantiles_by_hand():
    answers = [load.Answer("200", x / 100, x / 200, 3, x / 100) for x in range(1, 102)]
    found = load.summarize(answers)
    assert found["latency_s"] == pytest.approx({"p50": 0.51, "p95": 0.96, "p99": 1.0})
    assert found["first_token_s"]["p50"] == pytest.approx(0.255)
    assert found["requests_per_s"] == pytest.approx(101 / 1.01)
    assert found["tokens_per_s"] == pytest.approx(303 / 1.01)
