"""What a tenant may ask for, and what becomes of requests that are cut off or take too long."""

import http.client
import json
import queue
import socket
import sqlite3
import threading
import time

import pytest

from grpocem_jax.serving.engine import Piece
from grpocem_jax.serving.options import Limits
from grpocem_jax.utils.errors import InputError
from tests.serving import EXAMPLES, PROMPT, holding, serving

ASKED = {"model": "thin", "prompt": PROMPT, "max_tokens": 4}
DONE = Piece(" cold", 2, "stop")


@pytest.fixture
def model(monkeypatch):
    """The thin model by a short name."""
    from grpocem_jax.serving.catalogue import Catalogue

    made = Catalogue.__init__

    def init(self, *arguments, **options):
        made(self, *arguments, **options)
        self.base = self.default = "thin"

    monkeypatch.setattr(Catalogue, "__init__", init)


@pytest.fixture
def held(tmp_path, model):
    with holding(tmp_path) as made:
        yield made


def in_thread(held, *arguments, **options):
    """A request that waits; gives a function that waits for its answer."""
    found = []
    thread = threading.Thread(target=lambda: found.append(held(*arguments, **options)))
    thread.start()

    def answer():
        thread.join(20)
        return found[0]

    return answer


def assert_limited(found, fragment):
    assert found.status_code == 429, found.text
    assert int(found.headers["retry-after"]) >= 1
    error = found.json()["error"]
    assert error["type"] == "rate_limit_error"
    assert error["code"] == "rate_limit_exceeded"
    assert fragment in error["message"]


def raw(held, body, *, length=None, path="/v1/completions", more=""):
    """A connection on which a request has been written by hand."""
    host, port = held.server.url.removeprefix("http://").split(":")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {held.keys['alice']}\r\n"
        f"Content-Type: application/json\r\n{more}"
    )
    if length is not False:
        head += f"Content-Length: {len(body) if length is None else length}\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode() + b"\r\n" + body)
    return connection


def answered(connection):
    """Status and body of the answer on a connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read().decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot(held, stream):
    with raw(held, json.dumps({**ASKED, "stream": stream, "n": 2}).encode()):
        first, second = held.server.engine.wait_for(2)
        held.server.engine.answer(0, Piece(" very", 1))
        time.sleep(0.05)
        assert not first.cancelled.is_set()
    assert first.cancelled.wait(10)
    assert second.cancelled.wait(10)


def test_a_stream_that_waits_is_kept_open_by_comments(held, monkeypatch):
    from grpocem_jax.serving import answers

    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.1)
    answer = in_thread(held, "POST", "/v1/completions", json={**ASKED, "stream": True})
    held.server.engine.wait_for(1)
    time.sleep(2.5)
    held.server.engine.answer(0, DONE)
    events = [x for x in answer().text.split("\n\n") if x]
    assert 1 <= events.count(": ") <= 3
    assert " cold" in events[-3]
    assert events[-1] == "data: [DONE]"


def test_a_completion_that_takes_too_long_is_an_error_and_frees_its_slot(tmp_path, model):
    with holding(tmp_path, timeout_s=0.3) as held:
        whole = held("POST", "/v1/completions", json=ASKED)
        assert whole.status_code == 504
        assert "0.3 seconds" in whole.json()["error"]["message"]
        streamed = held("POST", "/v1/completions", json={**ASKED, "stream": True})
        assert streamed.status_code == 200
        error, done = [x for x in streamed.text.split("\n\n") if x]
        assert "0.3 seconds" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        assert all(x.cancelled.wait(5) for x in held.server.engine.tickets)


def test_a_body_that_comes_too_slowly_is_an_error(tmp_path, model):
    with holding(tmp_path, body_timeout_s=0.3) as held, raw(held, b'{"model"', length=100) as slow:
        status, body = answered(slow)
        assert status == 408
        assert "0.3 seconds" in json.loads(body)["error"]["message"]


def test_a_body_that_is_cut_off_ends_its_request_alone(held):
    for length in (0, 1, 20):
        raw(held, json.dumps(ASKED).encode()[:length], length=100).close()
    answer = in_thread(held, "POST", "/v1/completions", json=ASKED)
    held.server.engine.wait_for(1)
    held.server.engine.answer(0, DONE)
    assert answer().json()["choices"][0]["text"] == " cold"


@pytest.mark.parametrize("length", [None, 10**30, False])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(tmp_path, model, length):
    with holding(tmp_path, Limits(max_body_bytes=100)) as held:
        body, more = b"x" * 200, ""
        if length is False:
            body, more = b"ff\r\n" + b"x" * 255 + b"\r\n", "Transfer-Encoding: chunked\r\n"
        with raw(held, body, length=length, more=more) as connection:
            status, answer = answered(connection)
        if length == 10**30:  # which is no HTTP
            assert 400 <= status < 500
        else:
            assert status == 413
            assert "100 bytes" in json.loads(answer)["error"]["message"]


def test_more_requests_than_a_minute_allows_have_to_wait(tmp_path, model):
    with holding(tmp_path, Limits(requests_per_minute=3)) as held:
        for _ in range(3):
            assert held("GET", "/v1/models").status_code == 200
        assert_limited(held("GET", "/v1/models"), "requests_per_minute=3")
        assert held("GET", "/v1/models", "bob").status_code == 200


def test_more_tokens_than_a_minute_allows_have_to_wait(tmp_path, model):
    """A request takes the prompt and all it may write, and gives back what it did not."""
    from tests.serving import thin_run

    prompt = len(thin_run().policy.encode(PROMPT))
    with holding(tmp_path, Limits(tokens_per_minute=prompt + 4)) as held:
        answer = in_thread(held, "POST", "/v1/completions", json=ASKED)
        held.server.engine.wait_for(1)
        assert_limited(held("POST", "/v1/completions", json=ASKED), "tokens_per_minute")
        held.server.engine.answer(0, DONE)
        assert answer().json()["usage"]["completion_tokens"] == 2
        short = {**ASKED, "prompt": "a", "max_tokens": 1}
        answer = in_thread(held, "POST", "/v1/completions", json=short)
        held.server.engine.wait_for(2)
        held.server.engine.answer(1, DONE)
        assert answer().status_code == 200
        never = held("POST", "/v1/completions", json={**ASKED, "max_tokens": 5})
        assert never.status_code == 400
        assert "tokens_per_minute" in never.json()["error"]["message"]


def test_more_requests_at_a_time_than_allowed_have_to_wait(tmp_path, model):
    with holding(tmp_path, Limits(max_open=1)) as held:
        answer = in_thread(held, "POST", "/v1/completions", json=ASKED)
        held.server.engine.wait_for(1)
        assert_limited(held("GET", "/v1/models"), "max_open=1")
        assert held("GET", "/v1/models", "bob").status_code == 200
        held.server.engine.answer(0, DONE)
        assert answer().status_code == 200
        assert held("GET", "/v1/models").status_code == 200


def test_a_full_queue_is_too_many_requests_and_takes_none_of_them(held):
    engine, submit = held.server.engine, held.server.engine.submit

    def one_only(request, on_piece):
        if engine.tickets:
            raise queue.Full
        return submit(request, on_piece)

    engine.submit = one_only
    found = held("POST", "/v1/completions", json={**ASKED, "n": 2})
    assert_limited(found, "waiting")
    assert engine.tickets[0].cancelled.is_set()


@pytest.mark.parametrize(
    ("error", "status", "fragment"),
    [
        (InputError("model='x': the adapter has been deleted; make another."), 400, "deleted"),
        (sqlite3.OperationalError("database is locked"), 503, "the store fails"),
        (ZeroDivisionError("a bug"), 500, "its log says why"),
    ],
)
def test_what_the_engine_raises_is_an_error(held, error, status, fragment):
    held.server.engine.error = error
    found = held("POST", "/v1/completions", json=ASKED)
    assert found.status_code == status
    assert fragment in found.json()["error"]["message"]
    assert "a bug" not in found.text
    assert held("GET", "/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("piece", "status"),
    [
        (Piece("", 0, "error", "the logits are not finite"), 500),
        (Piece("", 0, "cancelled"), 503),
    ],
)
def test_a_completion_that_fails_is_an_error(held, piece, status):
    answer = in_thread(held, "POST", "/v1/completions", json=ASKED)
    held.server.engine.wait_for(1)
    held.server.engine.answer(0, piece)
    assert answer().status_code == status


def test_a_tenants_searches_and_adapters_are_limited(tmp_path, model):
    with holding(tmp_path, Limits(max_jobs=1, max_adapters=2)) as held:
        make = {"json": {"examples": EXAMPLES}}
        first = held("POST", "/v1/adapters", **make)
        assert first.status_code == 202
        assert_limited(held("POST", "/v1/adapters", **make), "max_jobs=1")
        assert held("POST", "/v1/adapters", "bob", **make).status_code == 202
        own, _ = held.server.searches.jobs
        own.state, own.error = "failed", "for a reason"
        held.server.keeper.look()
        failed = held("GET", f"/v1/adapters/{first.json()['id']}").json()
        assert (failed["status"], failed["error"]) == ("failed", "for a reason")
        assert held("POST", "/v1/adapters", **make).status_code == 202
        held.server.searches.jobs[-1].state = "failed"
        held.server.keeper.look()
        full = held("POST", "/v1/adapters", **make)
        assert full.status_code == 403
        assert "max_adapters=2" in full.json()["error"]["message"]
        held("DELETE", f"/v1/adapters/{first.json()['id']}")
        assert held("POST", "/v1/adapters", **make).status_code == 202


def test_a_search_that_is_refused_or_deleted_leaves_nothing(held):
    make = {"json": {"examples": EXAMPLES}}
    held.server.searches.error = InputError("examples: are not to my liking.")
    refused = held("POST", "/v1/adapters", **make)
    assert refused.status_code == 400
    assert held("GET", "/v1/adapters").json()["data"] == []
    held.server.searches.error = None
    id = held("POST", "/v1/adapters", **make).json()["id"]
    (job,) = held.server.searches.jobs
    job.state, job.generation = "running", 3
    held.server.keeper.look()
    shown = held("GET", f"/v1/adapters/{id}").json()
    assert (shown["status"], shown["generation"]) == ("running", 3)
    used = held("POST", "/v1/completions", json={**ASKED, "model": id})
    assert (used.status_code, used.json()["error"]["code"]) == (409, "adapter_not_ready")
    assert held("GET", f"/v1/adapters/{id}/download").status_code == 409
    assert held("DELETE", f"/v1/adapters/{id}").status_code == 200
    assert job.state == "cancelled"
    held.server.keeper.look()
    assert held("GET", "/v1/adapters").json()["data"] == []


def test_a_search_deleted_through_another_server_is_cancelled(held):
    id = held("POST", "/v1/adapters", json={"examples": EXAMPLES}).json()["id"]
    assert held.server.store.delete("alice", id)  # as the other server does
    (job,) = held.server.searches.jobs
    job.state, job.generation = "running", 1
    held.server.keeper.look()
    assert job.state == "cancelled"


def test_an_engine_that_fails_ends_the_server_with_what_it_failed_with(tmp_path):
    with serving(tmp_path) as served:
        server = served.server
        assert served("GET", "/health", None).status_code == 200

        def fail():
            raise ZeroDivisionError("a bug")

        server.engine.step = fail
        with pytest.raises(ZeroDivisionError, match="a bug"):
            server.wait()
        health = served("GET", "/health", None)
        assert (health.status_code, health.headers["retry-after"]) == (503, "5")
        asked = {**ASKED, "model": server.catalogue.base}
        assert served("POST", "/v1/completions", json=asked).status_code == 503


def test_searches_that_fail_leave_the_completions_alone(tmp_path):
    with serving(tmp_path) as served:

        def fail(**options):
            raise ZeroDivisionError("a bug")

        served.server.searches.step = fail
        asked = {**ASKED, "model": served.server.catalogue.base}
        for _ in range(2):
            assert served("POST", "/v1/completions", json=asked).status_code == 200


def test_requests_that_are_refused_cost_no_tokens(tmp_path, model):
    from tests.serving import thin_run

    prompt = len(thin_run().policy.encode(PROMPT))
    with holding(tmp_path, Limits(tokens_per_minute=prompt + 4)) as held:
        held.server.engine.error = queue.Full()
        assert_limited(held("POST", "/v1/completions", json=ASKED), "waiting")
        assert_limited(held("POST", "/v1/completions", json=ASKED), "waiting")
