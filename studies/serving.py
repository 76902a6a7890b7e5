"""Mixed load on a server that is killed at random moments: is anything lost, wrong or growing?

    python -m studies.serving [--minutes 60] [--kills 10] [--clients 8] [--broken 0.01] [--json]

Clients complete prompts with the base model and with adapters, streamed and whole; search for
adapters, upload, list and delete them; and one request in a hundred is broken: cut off, no HTTP, or
left while it is answered.  At random moments the server is killed with SIGKILL and started again.
Every greedy answer must be the first one that its model gave to its prompt, and at the end every
adapter that was acknowledged must be there and answer as before.  Ends with status 1 where one is
lost, an answer is wrong, the server failed to answer (500), or memory grew by more than 5% between
the second and the last quarter of the server's longest life.
"""

import collections
import contextlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from grpocem_jax.config import commands
from grpocem_jax.utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
BOUND = 0.05
"""Growth of memory, as a share of it, that passes."""

LIFE_S, INTERVAL_S = 300, 0.25
"""The shortest life that shows whether memory grows, and between looks at it."""

WORDS = ("soup", "tea", "room", "sea", "story", "song", "town", "road")
PROMPTS = [f"Review: The {word} was {x}.\nSentiment:" for word in WORDS for x in ("cold", "good")]
LABELS = ("positive", "negative") * 8
EXAMPLES = [f"{prompt} {x}." for prompt, x in zip(PROMPTS, LABELS, strict=True)]
SMALL = "--slots=16 --rows=16 --max_prompt=32 --max_new_tokens=16 --users=8".split()
LIMITS = ("--requests_per_minute=1000000", "--tokens_per_minute=1000000000", "--max_jobs=16")


class Server:
    """The command in a process of its own, again and again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = _free_port()
        self.lives: list[list[float]] = []
        self.start()

    def start(self) -> None:
        """Starts it and waits until it answers."""
        store, serve = self.folder / "store", "from grpocem_jax import cli; cli.serve()"
        own = ("--config=tiny", f"--store={store}", f"--port={self.port}")
        self.process = subprocess.Popen(
            [sys.executable, "-c", serve, *own, *SMALL, *LIMITS],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "server.err").open("a"),
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if re.match("serving ", line):
                break
        else:
            raise InputError(f"the server does not start; see {self.folder / 'server.err'}.")
        self.lives.append([])

    def kill(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.communicate()

    def note_memory(self) -> None:
        """Notes the resident memory."""
        path = Path(f"/proc/{self.process.pid}/statm")
        pages = int(path.read_text(encoding="ascii").split()[1])
        self.lives[-1].append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    @property
    def growth(self) -> float | None:
        """Of memory between the second and the last quarter of the longest life.

        None where that was less than `LIFE_S`, as programs are still being compiled.
        """
        life = max(self.lives, key=len)
        quarter = len(life) // 4
        if len(life) < LIFE_S / INTERVAL_S:
            return None
        second, last = life[quarter : 2 * quarter], life[-quarter:]
        return sum(last) / sum(second) - 1


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Load:
    """What the clients know together, and what they counted."""

    def __init__(self, port: int, broken: float):
        self.port, self.broken = port, broken
        self.lock = threading.Lock()
        self.answers: dict[tuple[str, str], str] = {}
        self.acknowledged: set[str] = set()
        self.deleted: set[str] = set()
        self.archive: bytes = b""
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[Any] = []
        self.ended = threading.Event()

    def count(self, what: str) -> None:
        """Counts one more."""
        with self.lock:
            self.counts[what] += 1

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """A connection of its own."""
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            yield made
        finally:
            made.close()

    def ask(
        self, method: str, path: str, body: Any = None, media: str = "application/json"
    ) -> tuple[int, bytes]:
        """A whole request; status and body."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        with self.connection() as connection:
            connection.request(method, path, content, {"Content-Type": media})
            response = connection.getresponse()
            answer = response.read()
        self.count(f"status {response.status}")
        if response.status >= 500 and response.status != 503:
            self.wrong.append((method, path, answer.decode()))
        return response.status, answer

    def models(self) -> list[str]:
        """The base and the adapters that are there."""
        with self.lock:
            return ["builtin", *self.acknowledged]

    def client(self, seed: int) -> None:
        """What one client does until the end."""
        rng = random.Random(seed)
        work = (self.complete, self.stream, self.search, self.upload, self.delete, self.list)
        while not self.ended.is_set():
            try:
                if rng.random() < self.broken:
                    self.break_off(rng)
                else:
                    rng.choices(work, (70, 12, 6, 4, 4, 4))[0](rng)
            except (OSError, http.client.HTTPException):
                self.count("cut off")
                time.sleep(0.1)
            except Exception as error:  # of what the server sent
                self.wrong.append(f"{type(error).__name__}: {error}")

    def judge(self, model: str, prompt: str, text: str) -> None:
        """Compares an answer with the first to the same question."""
        with self.lock:
            expected = self.answers.setdefault((model, prompt), text)
            self.counts["answers"] += 1
        if text != expected:
            self.wrong.append((model, prompt, expected, text))

    def complete(self, rng: random.Random, model: str | None = None) -> None:
        """A whole greedy completion."""
        model, prompt = model or rng.choice(self.models()), rng.choice(PROMPTS)
        asked = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12}
        status, answer = self.ask("POST", "/v1/completions", asked)
        if status == 200:
            self.judge(model, prompt, json.loads(answer)["choices"][0]["text"])
        elif status == 404 and model not in self.deleted:
            self.wrong.append(f"{model} is not there")

    def stream(self, rng: random.Random) -> None:
        """A streamed one."""
        model, prompt = rng.choice(self.models()), rng.choice(PROMPTS)
        asked = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12}
        status, answer = self.ask("POST", "/v1/completions", {**asked, "stream": True})
        events = answer.decode().split("\n\n")
        if status != 200 or "data: [DONE]" not in events:
            return
        chunks = [json.loads(x[6:]) for x in events if x.startswith("data: {")]
        if all("choices" in chunk for chunk in chunks):
            self.judge(model, prompt, "".join(x["choices"][0]["text"] for x in chunks))

    def search(self, rng: random.Random) -> None:
        """A search, followed until it ends."""
        asked = {
            "examples": rng.sample(EXAMPLES, 4),
            "method": rng.choice(("gradient", "gradient", "cem", "experts")),
            "generations": rng.randint(1, 10),
        }
        status, answer = self.ask("POST", "/v1/adapters", asked)
        while status in (200, 202) and not self.ended.is_set():
            found = json.loads(answer)
            if found["status"] == "ready":
                self.acknowledge(found["id"])
            if found["ended_at"] is not None:
                self.count(f"search {found['status']}")
                return
            time.sleep(0.2)
            status, answer = self.ask("GET", f"/v1/adapters/{found['id']}")

    def acknowledge(self, id: str) -> None:
        """Remembers an adapter that the server has said to keep."""
        with self.lock:
            self.acknowledged.add(id)
            self.counts["acknowledged"] += 1
        status, content = self.ask("GET", f"/v1/adapters/{id}/download")
        if status == 200:
            self.archive = content

    def upload(self, rng: random.Random) -> None:
        """An adapter that was downloaded before."""
        del rng
        if self.archive:
            path, media = "/v1/adapters/upload", "application/zip"
            status, answer = self.ask("POST", path, self.archive, media)
            if status == 201:
                self.acknowledge(json.loads(answer)["id"])

    def delete(self, rng: random.Random) -> None:
        """Deletes an adapter where there are many."""
        with self.lock:
            if len(self.acknowledged) < 20:
                return
            id = rng.choice(sorted(self.acknowledged))
            self.acknowledged.discard(id)
            self.deleted.add(id)
        self.ask("DELETE", f"/v1/adapters/{id}")

    def list(self, rng: random.Random) -> None:
        """All adapters."""
        del rng
        with self.lock:
            expected = set(self.acknowledged)
        status, answer = self.ask("GET", "/v1/adapters?limit=1000")
        if status == 200:
            found = {x["id"] for x in json.loads(answer)["data"]}
            lost = expected - found - self.deleted
            if lost:
                self.wrong.append(f"{sorted(lost)} are not listed")

    def break_off(self, rng: random.Random) -> None:
        """A request that is cut off, no HTTP, or left while it is answered."""
        self.count("broken")
        asked = {"model": "builtin", "prompt": PROMPTS[0], "max_tokens": 16, "stream": True}
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(
                rng.choice((whole, whole[: rng.randint(1, len(whole))], rng.randbytes(200)))
            )
            time.sleep(rng.uniform(0, 0.05))


def run(folder: Path, *, seconds: float, kills: int, clients: int, broken: float, seed: int) -> Any:
    """Serves, loads and kills; what was counted."""
    rng = random.Random(seed)
    server = Server(folder)
    load = Load(server.port, broken)
    threads = [threading.Thread(target=load.client, args=(seed + n,)) for n in range(clients)]
    began = time.monotonic()
    moments = sorted(rng.uniform(0, seconds) for _ in range(kills))
    try:
        for thread in threads:
            thread.start()
        while (now := time.monotonic() - began) < seconds or moments:
            time.sleep(INTERVAL_S)
            if moments and now >= moments[0]:
                del moments[0]
                server.kill()
                server.start()
            server.note_memory()
        load.ended.set()
        for thread in threads:
            thread.join()
        for model in load.models():
            load.complete(rng, model)
    finally:
        load.ended.set()
        server.kill()
    return {
        "seconds": time.monotonic() - began,
        "kills": kills,
        "growth": server.growth,
        "acknowledged_at_the_end": len(load.acknowledged),
        "wrong": len(load.wrong),
        "examples_of_wrong": [str(x)[:300] for x in load.wrong[:5]],
        **dict(sorted(load.counts.items())),
    }


def main(argv: Sequence[str]) -> None:
    """Runs the study and prints its figures."""
    del argv
    values = flags.FLAGS
    folder = Path(values.workdir or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found = run(
        folder,
        seconds=60 * values.minutes,
        kills=values.kills,
        clients=values.clients,
        broken=values.broken,
        seed=values.seed,
    )
    lines = [f"{name:<26}{value}" for name, value in found.items()]
    print(json.dumps(found) if values.json else "\n".join(lines), flush=True)
    if found["wrong"] or (found["growth"] or 0) > BOUND:
        raise InputError(f"see {folder}: an answer is wrong or missing, or memory grew.")


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 60.0, "How long.", 0.0)
    flags.DEFINE_integer("kills", 10, "How often the server is killed.", 0)
    flags.DEFINE_integer("clients", 8, "Clients at a time.", 1)
    flags.DEFINE_float("broken", 0.01, "Share of broken requests.", 0.0, 1.0)
    flags.DEFINE_integer("seed", 0, "Of moments and requests.")
    flags.DEFINE_string("workdir", None, "Folder of the store; by default a temporary one.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
    commands.run(main)
