"""Who may do what: every endpoint, with every wrong key and with other tenants' adapters."""

import json

import pytest

from grpocem_jax.serving.tenants import PUBLIC
from tests.serving import PROMPT, serving

WRONG = {
    "none": {},
    "empty": {"Authorization": ""},
    "no scheme": {"Authorization": "{alice}"},
    "another scheme": {"Authorization": "Basic {alice}"},
    "no key": {"Authorization": "Bearer"},
    "unknown": {"Authorization": "Bearer gj-" + "0" * 43},
    "shortened": {"Authorization": "Bearer {alice:.45}"},
    "lengthened": {"Authorization": "Bearer {alice}x"},
    "lower case": {"Authorization": "Bearer {lower}"},
    "two": {"Authorization": "Bearer {alice} {bob}"},
    "hash": {"Authorization": "Bearer {hash}"},
    "another header": {"X-Api-Key": "{alice}"},
    "not ascii": {"Authorization": b"Bearer \xff\xfe"},
    "long": {"Authorization": "Bearer " + "g" * 4000},
}


@pytest.fixture(scope="module")
def adapters(served):
    """A ready adapter of each tenant."""
    return {x: served.adapter(x, generations=1)["id"] for x in ("alice", "bob", PUBLIC)}


def endpoints(model, id):
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 1}
    chat = {"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    upload = {"content": b"no zip", "headers": {"Content-Type": "application/zip"}}
    return [
        ("POST", "/v1/completions", {"json": asked}),
        ("POST", "/v1/completions", {"json": {**asked, "stream": True}}),
        ("POST", "/v1/chat/completions", {"json": chat}),
        ("GET", "/v1/models", {}),
        ("GET", f"/v1/models/{model}", {}),
        ("POST", "/v1/adapters", {"json": {"examples": ["a b c d"], "generations": 1}}),
        ("POST", "/v1/adapters/upload", upload),
        ("GET", "/v1/adapters", {}),
        ("GET", f"/v1/adapters?after={id}", {}),
        ("GET", f"/v1/adapters/{id}", {}),
        ("GET", f"/v1/adapters/{id}/events", {}),
        ("GET", f"/v1/adapters/{id}/download", {}),
        ("DELETE", f"/v1/adapters/{id}", {}),
        ("GET", "/page/settings", {}),
        ("GET", "/metrics", {}),
    ]


def test_all_routes_are_tried(served, adapters):
    """A route that is added has to be added to `endpoints`; two are for everyone."""
    app = served.server._http.config.app
    there = {(x, route.path) for route in app.routes for x in route.methods - {"HEAD"}}
    tried = {
        (method, route.path)
        for method, path, _ in endpoints("builtin", adapters["alice"])
        for route in app.routes
        if method in route.methods and route.path_regex.fullmatch(path.partition("?")[0])
    }
    assert there - tried == {("GET", "/health"), ("GET", "/")}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_key_opens_nothing(served, adapters, wrong):
    from hashlib import sha256

    keys = {**served.keys, "lower": served.keys["alice"].lower()}
    keys["hash"] = sha256(served.keys["alice"].encode()).hexdigest()
    headers = {
        name: value if isinstance(value, bytes) else value.format_map(keys)
        for name, value in WRONG[wrong].items()
    }
    before = served("GET", "/v1/adapters").json()
    for method, path, options in endpoints(adapters["alice"], adapters["alice"]):
        given = {**options, "headers": {**options.get("headers", {}), **headers}}
        found = served(method, path, None, **given)
        assert found.status_code == 401, (method, path, found.text)
        error = found.json()["error"]
        assert error["type"] == "authentication_error"
        assert error["code"] == "invalid_api_key"
        assert found.headers["www-authenticate"] == "Bearer"
        for key in served.keys.values():
            assert key not in found.text
    assert served("GET", "/v1/adapters").json() == before


@pytest.mark.parametrize(("tenant", "other"), [("alice", "bob"), ("bob", "alice"), (PUBLIC, "bob")])
def test_another_tenants_adapter_is_not_there(served, adapters, tenant, other):
    """Nor does an answer tell that it is: it is that to an id that nobody has."""
    id, nobody = adapters[other], "adapter-" + "0" * 24
    with_id = [e for e in endpoints(id, id) if id in json.dumps(str(e))]
    without = [e for e in endpoints(nobody, nobody) if nobody in json.dumps(str(e))]
    assert len(with_id) == 9
    for (method, path, options), (_, empty, none) in zip(with_id, without, strict=True):
        found, like = served(method, path, tenant, **options), served(method, empty, tenant, **none)
        assert found.status_code == 404, (method, path, found.text)
        assert found.text.replace(id, nobody) == like.text
    for path in ("/v1/models", "/v1/adapters"):
        assert id not in served("GET", path, tenant).text
    assert served("GET", f"/v1/adapters/{id}", other).json()["status"] == "ready"


def test_public_adapters_are_seen_and_used_by_all_and_deleted_by_their_owner(
    served,
    adapters,
):
    id = adapters[PUBLIC]
    for method, path, options in endpoints(id, id):
        if path in ("/v1/adapters/upload", "/metrics", "/v1/adapters") or method == "DELETE":
            continue
        assert served(method, path, "bob", **options).status_code == 200, path
    refused = served("DELETE", f"/v1/adapters/{id}", "bob")
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert served("GET", f"/v1/adapters/{id}", "alice").json()["public"]
    own = served.adapter(PUBLIC, generations=1)["id"]
    assert served("DELETE", f"/v1/adapters/{own}", PUBLIC).json()["deleted"]
    assert served("GET", f"/v1/adapters/{own}", "bob").status_code == 404


def test_a_tenant_deletes_its_own_adapter(served):
    id = served.adapter("bob", generations=1)["id"]
    folder = served.server.store.folder / "adapters" / "bob" / id
    assert folder.is_dir()
    asked = {"model": id, "prompt": PROMPT, "max_tokens": 1}
    assert served("POST", "/v1/completions", "bob", json=asked).status_code == 200
    deleted = served("DELETE", f"/v1/adapters/{id}", "bob")
    assert deleted.json() == {"id": id, "object": "adapter", "deleted": True}
    assert not folder.exists()
    assert served("DELETE", f"/v1/adapters/{id}", "bob").status_code == 404
    gone = served("POST", "/v1/completions", "bob", json=asked)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_metrics_are_for_the_operator_and_health_is_for_everyone(served, adapters):
    assert served("GET", "/metrics", "alice").status_code == 403
    text = served("GET", "/metrics", PUBLIC).text
    assert 'grpocem_adapters{state="ready"}' in text
    assert 'grpocem_requests_total{route="GET /metrics",status="403"}' in text
    for secret in (*served.keys.values(), adapters["bob"], "alice"):
        assert secret not in text
    health = served("GET", "/health", None)
    assert health.status_code == 200
    assert health.json()["status"] == "ok"


def test_a_path_that_leads_out_of_the_store_is_no_adapter(served):
    for path in ("..%2f..%2fetc", "%2e%2e", "alice%2fadapter", "adapter-%00", "*", "a" * 3000):
        found = served("GET", f"/v1/adapters/{path}/download")
        assert found.status_code == 404
        assert "error" in found.json()


def test_the_document_has_every_route_and_every_flag_with_its_default(served):
    import dataclasses

    from grpocem_jax.serving.options import Limits, Options
    from tests.runs import ROOT

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for route in served.server._http.config.app.routes:
        path = route.path.replace("{id:path}", "{id}")
        for method in route.methods - {"HEAD"}:
            assert f"`{method} {path}`" in text, (method, path)
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    for record in (Options, Limits):
        for field in dataclasses.fields(record):
            found = [row for row in rows if f"`--{field.name}`" in row]
            if field.name == "keys":
                assert f"`--{field.name}`" in text
                continue
            (row,) = found
            default = "served/" if field.name == "store" else f"{field.default}".removesuffix(".0")
            assert default in row, row


def test_a_server_without_keys_answers_to_this_machines_names_alone(tmp_path):
    """Another name in Host is that of a web page that has been led here."""
    with serving(tmp_path, keys="") as served:
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("localhost", 200),
            ("[::1]:1", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example:8000", 403),
            ("LOCALHOST:8000", 200),
            ("evil.example/localhost", 403),
            ("localhost@evil.example", 403),
            ("evil.example@localhost", 403),
            ("localhost:x", 403),
            ("[::1", 403),
            ("::1", 403),
            ("a]b", 403),
            ("", 403),
        ):
            found = served("GET", "/v1/adapters", None, headers={"Host": host})
            assert found.status_code == status, (host, found.text)
