"""Nonsense sent to the server: an error in JSON each time, and the server goes on."""

import io
import json
import socket
import string
import zipfile

import pytest

from tests.serving import EXAMPLES, PROMPT

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies
few = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**53, 2**64, -(2**64), 10**400, 1e308, 5e-324, -0.0, 0.1, 2.5, True]
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\x00", "\ud800", "￿", "\u202e", "a" * 5000, "{}", "null", PROMPT]),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, TEXTS, st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CHAT = [{"role": "user", "content": "Was it cold?"}]
ROWS = [{"text": x, "label": "positive"} for x in ("good", "bad", "cold", "warm")]
VALID = {
    "/v1/completions": {"model": "", "prompt": PROMPT, "max_tokens": 2},
    "/v1/chat/completions": {"model": "", "messages": CHAT, "max_tokens": 2},
    "/v1/adapters": {"examples": EXAMPLES, "generations": 1},
}
FIELDS = {
    "/v1/completions": (
        "model prompt max_tokens temperature top_p n stop seed stream stream_options user logprobs "
        "echo suffix best_of logit_bias presence_penalty frequency_penalty"
    ).split(),
    "/v1/chat/completions": (
        "model messages max_tokens max_completion_tokens temperature top_p n stop seed stream "
        "stream_options tools tool_choice response_format logprobs top_logprobs metadata"
    ).split(),
    "/v1/adapters": (
        "examples prompt prompts reward method generations seed name budget model"
    ).split(),
}


@pytest.fixture(scope="module")
def send(served):
    """Sends a body; what comes back is an answer, or an error as OpenAI's."""

    def send(path, content, media="application/json"):
        headers = {} if media is None else {"Content-Type": media}
        found = served("POST", path, content=content, headers=headers)
        assert found.status_code < 500, found.text
        if found.status_code >= 400:
            assert_error(found)
        elif "/adapters" in path:
            served("DELETE", f"/v1/adapters/{found.json()['id']}")
        return found

    yield send
    asked = VALID["/v1/completions"] | {"model": served.server.catalogue.base, "temperature": 0}
    assert served("POST", "/v1/completions", json=asked).status_code == 200
    assert served("GET", "/health").status_code == 200
    stats = served.server.engine.stats
    assert (stats.active, stats.queued) == (0, 0)


def assert_error(found):
    assert found.headers["content-type"] == "application/json"
    body = json.loads(found.content)
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message.endswith("."), message
    assert len(message) < 700, message
    assert message.isprintable(), ascii(message)


def valid(served, path):
    body = dict(VALID[path])
    if "model" in body:
        body["model"] = served.server.catalogue.base
    return body


@few
@hypothesis.given(path=st.sampled_from([*VALID]), value=VALUES)
def test_any_json(send, path, value):
    assert send(path, json.dumps(value)).status_code == 400


@few
@hypothesis.given(data=st.data())
def test_a_request_with_fields_of_any_kind(served, send, data):
    path = data.draw(st.sampled_from([*VALID]))
    names = st.sampled_from(FIELDS[path])
    changes = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    send(path, json.dumps({**valid(served, path), **changes}))


@few
@hypothesis.given(name=TEXTS, value=LEAVES)
def test_a_field_that_nobody_knows(served, send, name, value):
    hypothesis.assume(name not in FIELDS["/v1/completions"] and value is not None)
    body = {**valid(served, "/v1/completions"), name: value}
    found = send("/v1/completions", json.dumps(body))
    assert found.status_code == 400
    assert "no such field" in found.json()["error"]["message"]


@few
@hypothesis.given(path=st.sampled_from([*VALID]), content=st.binary(max_size=200))
def test_any_bytes(send, path, content):
    assert send(path, content).status_code == 400


@few
@hypothesis.given(path=st.sampled_from([*VALID]), share=st.floats(0, 0.999))
def test_a_body_that_is_cut_short(served, send, path, share):
    whole = json.dumps(valid(served, path))
    assert send(path, whole[: int(share * len(whole))]).status_code == 400


@few
@hypothesis.given(
    path=st.sampled_from([*VALID]),
    depth=st.sampled_from([33, 500, 5_000, 100_000]),
    shape=st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")]),
    closed=st.booleans(),
    field=st.sampled_from(["", "prompt", "examples", "messages", "stop", "model"]),
)
def test_a_body_that_is_deep(send, path, depth, shape, closed, field):
    content = shape[0] * depth + "0" + (shape[1] * depth if closed else "")
    content = f'{{"{field}": {content}}}' if field else content
    assert send(path, content).status_code == 400


@pytest.mark.parametrize(
    "number",
    ["1" * 5000, "-" + "9" * 4301, "1e999", "-1e999", "1e-999", "NaN", "Infinity", "0x10", "1_0"],
    ids=lambda x: x[:9],
)
@pytest.mark.parametrize("field", ["max_tokens", "temperature", "top_p", "n", "seed", "prompt"])
def test_numbers_that_are_huge_or_none(served, send, field, number):
    body = json.dumps({**valid(served, "/v1/completions"), field: 123456789})
    found = send("/v1/completions", body.replace("123456789", number))
    assert found.status_code == (200 if (field, number) == ("temperature", "1e-999") else 400)


@few
@hypothesis.given(
    path=st.sampled_from([*VALID, "/v1/adapters/upload"]),
    media=st.one_of(
        st.none(),
        st.text(string.printable.strip() + " ", max_size=30).map(str.strip),
        st.sampled_from(["text/plain", "multipart/form-data; boundary=x", "application/jsonp"]),
    ),
)
def test_a_content_type_of_another_kind(served, send, path, media):
    hypothesis.assume((media or "").partition(";")[0].strip().lower() != "application/json")
    content = json.dumps(valid(served, path)) if path in VALID else b"zip"
    assert send(path, content, media).status_code == 415


@pytest.mark.parametrize("media", ["application/json; charset=utf-8", "Application/JSON"])
def test_a_content_type_written_otherwise(served, send, media):
    body = json.dumps(valid(served, "/v1/completions"))
    assert send("/v1/completions", body, media).status_code == 200


@pytest.fixture(scope="module")
def packed(served):
    id = served.adapter(generations=1)["id"]
    return served("GET", f"/v1/adapters/{id}/download").content


@few
@hypothesis.given(data=st.data())
def test_an_upload_with_other_bytes(send, packed, data):
    """Cut, changed at some places, or with bytes in between: refused, as hash or form differ.

    What only the zip has, such as a file's date, may differ.
    """
    content = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(content)))
    send("/v1/adapters/upload", bytes(content), "application/zip")
    refused = send("/v1/adapters/upload", bytes(content[: cut // 2]), "application/zip")
    assert refused.status_code == 400


@few
@hypothesis.given(
    names=st.lists(TEXTS.filter(lambda x: x.isascii()), max_size=4),
    content=st.binary(max_size=100),
)
def test_a_zip_of_other_files(send, names, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(f"{number}{name}", content)
        archive.writestr("adapter_model.safetensors", content)
        archive.writestr("adapter_config.json", content)
    found = send("/v1/adapters/upload", file.getvalue(), "application/zip")
    assert found.status_code == 400


@few
@hypothesis.given(
    path=st.text(string.ascii_letters + string.digits + "/%._-~", max_size=40),
    method=st.sampled_from("GET POST PUT DELETE PATCH OPTIONS HEAD".split()),
)
def test_any_path(served, path, method):
    found = served(method, f"/{path}")
    assert found.status_code in (200, 307, 404, 405), found.text
    if found.status_code >= 400 and method != "HEAD":
        assert_error(found)


@few
@hypothesis.given(query=st.dictionaries(st.sampled_from(["limit", "after", "x"]), TEXTS))
def test_any_query(served, query):
    query = {name: value.encode("utf-8", "replace") for name, value in query.items()}
    found = served("GET", "/v1/adapters", params=query)
    assert found.status_code in (200, 400, 404), found.text
    if found.status_code >= 400:
        assert_error(found)


@few
@hypothesis.given(content=st.binary(max_size=300), head=st.booleans())
def test_bytes_that_are_no_http(served, content, head):
    host, port = served.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        if head:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        connection.sendall(content)
    assert served("GET", "/health", None).status_code == 200
