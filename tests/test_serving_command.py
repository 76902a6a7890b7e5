"""The command as users start it: served, killed, started again."""

import dataclasses
import http.client
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from grpocem_jax.serving.tenants import Keys
from tests.runs import ROOT, thin_model, write_run
from tests.serving import EXAMPLES, PROMPT, SMALL, http_client, thin_run

for _name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(_name, reason=f"{_name} is not installed; it is of the extra serve")

SERVE = "from grpocem_jax import cli; cli.serve()"
FLAGS = "--slots=2 --rows=2 --queue=4 --max_prompt=32 --max_new_tokens=8 --users=2 --port=0".split()


class Process:
    """The command in a process of its own."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-c", SERVE, *FLAGS, "--config=tiny", f"--store={folder}"]
        command += [f"--config.model.source={thin_model()}", *arguments]
        self.child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        found = None
        for line in self.child.stdout:
            found = re.search(r"^serving +(\S+) at http://(\S+):(\d+)$", line)
            if found:
                break
        assert found, self.child.communicate()
        self.model, self.host, self.port = found[1], found[2], int(found[3])

    def __call__(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def end(self, number):
        """Sends a signal; gives status, stdout and stderr."""
        self.child.send_signal(number)
        out, err = self.child.communicate(timeout=60)
        return self.child.returncode, out, err


def test_a_killed_server_starts_again_with_what_it_acknowledged(tmp_path):
    first = Process(tmp_path / "store")
    try:
        greedy = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
        base = first("POST", "/v1/completions", {"model": first.model, **greedy})
        made = first("POST", "/v1/adapters", {"examples": EXAMPLES, "generations": 5, "seed": 1})
        id = made["id"]
        while first("GET", f"/v1/adapters/{id}")["status"] != "ready":
            time.sleep(0.05)
        ready = first("GET", f"/v1/adapters/{id}")
        own = first("POST", "/v1/completions", {"model": id, **greedy})
        long = first(
            "POST", "/v1/adapters", {"examples": EXAMPLES, "generations": 200, "method": "cem"}
        )
    finally:
        first.end(signal.SIGKILL)
    second = Process(tmp_path / "store")
    try:
        assert second("GET", f"/v1/adapters/{id}") == ready
        for model, before in ((second.model, base), (id, own)):
            again = second("POST", "/v1/completions", {"model": model, **greedy})
            assert again["choices"] == before["choices"]
        interrupted = second("GET", f"/v1/adapters/{long['id']}")
        assert interrupted["status"] == "interrupted"
        assert "ask for it again" in interrupted["error"]
    finally:
        status, _, err = second.end(signal.SIGTERM)
    assert status == 0
    # The thin model is not the one that the library of the config is of.
    (warning,) = err.splitlines()
    assert "no searches by experts" in warning


def test_two_servers_on_one_folder_know_each_others_adapters(served):
    from grpocem_jax.serving.server import Server

    first = served.server
    options = dataclasses.replace(first.options, port=0)
    id = served.adapter(generations=1)["id"]
    asked = {"model": id, "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    own = served("POST", "/v1/completions", json=asked).json()["choices"]
    with Server(thin_run(), options) as second:
        other = served._replace(server=second)
        assert other("POST", "/v1/completions", json=asked).json()["choices"] == own
        there = other.adapter(generations=2)["id"]
        assert served("GET", f"/v1/adapters/{there}").json()["status"] == "ready"
        assert served("POST", "/v1/completions", json={**asked, "model": there}).status_code == 200
        assert served("DELETE", f"/v1/adapters/{id}").json()["deleted"]
        gone = other("POST", "/v1/completions", json=asked)
        assert gone.json()["error"]["code"] == "model_not_found"
    assert served("GET", f"/v1/adapters/{there}").json()["status"] == "ready"


def test_a_key_is_made_and_shown_once(call, tmp_path):
    status, out, err = call("serve", "--keys", tmp_path / "keys.json", "--add_key", "alice")
    assert status == 0, err
    assert Keys(tmp_path / "keys.json").find(out.strip()).name == "alice"
    assert "alice" in err
    assert out.strip() not in err


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ["--workdir is missing"]),
        (["--add_key=alice"], ["--keys is missing"]),
        (["--add_key=A", "--keys=keys.json"], ["--add_key='A'", "lower-case"]),
        (["--config=tiny", "--port=70000"], ["port=70000"]),
        (["--config=tiny", "--slots=0"], ["slots=0"]),
        (["--config=tiny", "--max_jobs=-1"], ["max_jobs=-1"]),
        (["--config=tiny", "--store=s3://me/served"], ["--store='s3://me/served'", "a folder"]),
        (["--config=tiny", "--host=0.0.0.0"], ["--host='0.0.0.0'", "--keys"]),
        (["--config=tiny", "--host=nowhere.invalid"], ["--host='nowhere.invalid'", "no address"]),
        (["--config=tiny", "--host=192.0.2.1", "--keys=keys.json"], ["192.0.2.1", "cannot be"]),
        (["--config=tiny", "--port=0", "--keys=none.json"], ["--keys=none.json", "--add_key"]),
        (["--workdir=nowhere"], ["nowhere"]),
    ],
    ids=" ".join,
)
def test_flags_that_cannot_be_used_are_refused(
    refused, arguments, fragments, tmp_path, monkeypatch
):
    (tmp_path / "keys.json").write_text('{"keys": []}')
    monkeypatch.chdir(tmp_path)
    sentence = refused("serve", *arguments)
    for fragment in fragments:
        assert fragment in sentence


def test_a_port_that_is_taken_is_refused(refused, tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}" in refused("serve", "--config=tiny", f"--port={port}")


def test_a_run_is_served_under_its_name_with_its_base(tmp_path):
    """What the run trained is one model, what it trained on another."""
    from grpocem_jax import adaptation
    from grpocem_jax.serving.options import Options
    from grpocem_jax.serving.server import Server
    from tests.runs import random_offsets, tiny_policy

    policy, _ = tiny_policy()
    offsets = random_offsets(policy.zero, seed=3, scale=1.0)
    run = adaptation.load_run(write_run(tmp_path / "mine", offsets=offsets))
    options = Options(
        port=0, slots=2, rows=2, max_prompt=16, max_new_tokens=4, store=str(tmp_path / "store")
    )
    wanted = [adaptation.complete(run, x, [PROMPT])[0] for x in (run.offsets, run.policy.zero)]
    with Server(run, options, name="mine") as server, http_client() as http:
        listed = http.get(f"{server.url}/v1/models").json()["data"]
        assert [x["id"] for x in listed] == ["mine", "builtin"]
        found = []
        for model in ("mine", "builtin"):
            asked = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
            answer = http.post(f"{server.url}/v1/completions", json=asked).json()
            found.append(answer["choices"][0]["text"])
        # The built-in model has experts.
        asked = {"examples": EXAMPLES, "method": "experts", "generations": 1}
        id = http.post(f"{server.url}/v1/adapters", json=asked).json()["id"]
        while http.get(f"{server.url}/v1/adapters/{id}").json()["ended_at"] is None:
            time.sleep(0.05)
        mixed = http.get(f"{server.url}/v1/adapters/{id}").json()
    assert found == wanted
    assert mixed["status"] == "ready", mixed
    assert mixed["asked"]["method"] == "experts"
    assert len(set(wanted)) == 2


def test_serve_in_python_waits_until_it_is_ended(tmp_path, monkeypatch):
    import grpocem_jax as gj
    from grpocem_jax.serving.server import Server

    seen = []

    def wait(server):
        with http_client() as http:
            seen.append(http.get(f"{server.url}/health").json()["model"])

    monkeypatch.setattr(Server, "wait", wait)
    options = {name: SMALL[name] for name in ("slots", "rows", "max_prompt", "max_new_tokens")}
    gj.serve(thin_run(), name="mine", port=0, store=str(tmp_path), **options)
    assert seen == ["mine"]
    with pytest.raises(gj.InputError, match=r"slot: is no option; they are .*slots"):
        gj.serve(thin_run(), slot=3)
    for name in ("model", "adapter-" + "0" * 24):  # the thin model's folder
        with pytest.raises(gj.InputError, match="rename the folder"):
            gj.serve(thin_run(), name=name, port=0, store=str(tmp_path))
