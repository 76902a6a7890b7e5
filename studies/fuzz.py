"""Feeds the readers damaged files and senseless values, and stops at the first that crashes one.

    python -m studies.fuzz --minutes 60 [--seed N] [--only TARGET --start NUMBER]

Whatever comes, a reader must succeed or raise `InputError` with one line.  Anything else, or more
than a minute for one input, is a crash: target, seed, number and input are printed, and the exit
status is 1.  An input is a function of target, seed and number alone.
"""

import dataclasses
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags

from grpocem_jax import adaptation, grpo, report, tasks
from grpocem_jax.config import commands, parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.models import hub
from grpocem_jax.report import record
from grpocem_jax.rollouts import policy
from grpocem_jax.runs import checkpoints, rundir
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import visible

PIECES = (
    b"null", b"-1", b"0", b"1e999", b"1e-45", b"NaN", b"true", b'""', b"[]", b"{}", b"\x00",
    b"\xff", b"\xc3", b"\x1b[2J", b"\n", b"\r", b'"', b"'", b",", b":", b"\\ud800", b"\\u0000",
    b"9" * 25, b"9" * 5000, b"[" * 3000, b"A" * 5000, "\u202e\x9b".encode(),
)  # fmt: skip
"""What has broken parsers before."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 10**30, 10**400, 0.0, -0.5, 0.5, 1.0, 1e300, 1e-45,
    float("nan"), float("inf"), "", "x", "builtin", "skip", "a\0b", "\ud800", "\x1b[2J", "../" * 9,
    "z" * 5000, "~nobody", "random:", (), [], {}, (1,), ("qa",), (None,), ((1,),), {"a": {"b": 1}},
    {"a.b": 1}, ["x", 3], b"bytes",
)  # fmt: skip
"""What no setting should be, and what some may."""

POSITION = {"step": 0, "metrics_bytes": 3}
GAIN = {"before": 0.1, "after": 0.2, "gain": 0.1, "gain_ci95": [0.0, 0.2], "n": 4}
ROWS = [
    {"text": f"film {i}", "label": i % 2, "prompt": f"p{i}", "context": "c", "question": "q",
     "answers": ["a"]}
    for i in range(6)
]  # fmt: skip


Input = tuple[str, Callable[[], Any]]
"""What is read, for the message, and what reads it."""


class TooSlow(BaseException):
    """No answer within a minute; no `Exception`, so that no reader takes it for its own."""


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few places changed, cut out, repeated, or replaced by one of `PIECES`."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 8, 100)))
        new = rng.choice((b"", data[start:end] * 2, rng.randbytes(4), *3 * [rng.choice(PIECES)]))
        data = data[:start] + new + data[end:]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def mutate_tree(rng: random.Random, value: Any) -> Any:
    """A tree of dicts and lists with one place changed, left out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        if (kind := rng.random()) < 0.05:
            return {other: x for other, x in value.items() if other != name}
        if kind < 0.1:
            return {**value, f"{name}{rng.choice('sx_.')}": rng.choice(VALUES)}
        return {**value, name: mutate_tree(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], mutate_tree(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def mutate_line(rng: random.Random, line: bytes) -> bytes:
    """A line of JSON as it is, or with one place changed."""
    if rng.random() < 0.5:
        return line
    return json.dumps(mutate_tree(rng, json.loads(line)), default=repr).encode()


def damage(rng: random.Random, path: Path) -> str:
    """Changes a file, as bytes or, JSON, as a tree too; returns what came of it."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.6:
        data = json.dumps(mutate_tree(rng, json.loads(data)), default=repr).encode()
    elif path.suffix == ".jsonl" and rng.random() < 0.6:
        data = b"\n".join(mutate_line(rng, line) for line in data.splitlines())
    else:
        data = mutate(rng, data)
    path.write_bytes(data)
    return f"{path}: {data[:2000]!r}"


class Readers:
    """The targets: functions that make one input and read it, and return it for the message.

    Args:
      folder: where their files lie.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = load_config("tiny").to_dict()
        self.fields = [
            f"{name}.{field}" if isinstance(part, dict) else name
            for name, part in self.settings.items()
            for field in (part if isinstance(part, dict) else [""])
        ]
        config = parse_config(load_config("tiny"))
        self.policy = policy.load_policy(config)
        self.state = grpo.init_state({"a": jnp.arange(8.0)}, grpo.adamw())
        self._write()

    def _write(self) -> None:
        """The files that are damaged, all of them small."""
        folder, run = self.folder, self.folder / "run"
        shutil.copytree(hub.BUILTIN, folder / "model")
        shutil.copytree(adaptation.LIBRARY, folder / "library")
        shutil.copytree(adaptation.LIBRARY / "qa", run / "adapter")
        files.write_json(run / "config.json", self.settings)
        files.write_json(run / "run.json", {"model": "a", "data": "b", "id": "c"})
        gains = {"qa": GAIN, "overall": GAIN}
        data = {"qa": {"source": "builtin", "train": 4, "heldout": 4, "bad_lines": 0}}
        summary = {"heldout": gains, "heldout_greedy": gains, "steps": 1, "data": data}
        files.write_json(run / "summary.json", summary)
        line = {"step": 1, "reward": 0.5, "kl": 0.0, "rewards/qa/mean": 0.5, "loss": None}
        (run / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 3)
        stored = checkpoints.Checkpoints(folder / "saved")
        stored.save(self.state, jax.random.key(0), POSITION)
        stored.close()
        (folder / "jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (folder / "txt").write_text("one two\n\n = Title =\nthree\n")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "parquet")

    def _damaged(self, rng: random.Random, name: str, pattern: str = "**/*") -> tuple[Path, str]:
        """A copy of one of the folders with one file damaged."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / name, copy)
        return copy, damage(rng, rng.choice(sorted(x for x in copy.glob(pattern) if x.is_file())))

    def overrides(self, rng: random.Random) -> Input:
        """Values of flags, and now and then their names."""
        value = rng.choice((*VALUES, rng.choice(PIECES).decode(errors="replace")))
        argument = f"--config.{rng.choice(self.fields)}={value}"
        if rng.random() < 0.2:
            argument = mutate(rng, argument.encode(errors="replace")).decode(errors="replace")
        return repr(argument), lambda: parse_command(["fuzz", "--config=tiny", argument])

    def config(self, rng: random.Random) -> Input:
        """Settings as a dict."""
        tree = mutate_tree(rng, json.loads(json.dumps(self.settings)))

        def read() -> None:
            try:
                given = ml_collections.ConfigDict(tree)
            except (AttributeError, TypeError, ValueError):
                return  # no config to begin with
            parsed = parse_config(given)
            for name in parsed.data.tasks:
                parsed.task(name)

        return ascii(tree), read

    def data(self, rng: random.Random) -> Input:
        """Rows of a task, read in both ways, to tokens."""
        kind = rng.choice(("jsonl", "txt", "parquet"))
        (self.folder / "data").mkdir(exist_ok=True)
        path = self.folder / "data" / f"{kind}.{kind}"
        shutil.copy(self.folder / kind, path)
        said = damage(rng, path)
        task = tasks.TASKS[rng.choice(("sentiment", "qa", "general"))]
        if rng.random() < 0.2:
            task = dataclasses.replace(task, columns={"prompt": ""}, template="{prompt}", own=True)
        labels = () if task.own else ("negative", "positive")
        source = tasks.SourceConfig(str(path.parent), train_split=kind, label_names=labels)
        bad_lines = rng.choice(("error", "skip"))

        def read() -> None:
            loaded = tasks.load_examples(
                task,
                source,
                split="train",
                count_tokens=lambda text: len(self.policy.tokenizer.encode(text)),
                max_prompt_tokens=64,
                max_samples=5,
                seed=0,
                bad_lines=bad_lines,
            )
            assert 0 < len(loaded.examples) <= 5

        return f"{task.name}, {bad_lines}, {said}", read

    def run_directory(self, rng: random.Random) -> Input:
        """What adaptation, continuing and the report read."""
        copy, said = self._damaged(rng, "run")
        uses = (
            lambda: adaptation.load_run(copy),
            lambda: rundir.check_settings(copy, self.settings),
            lambda: record.read(copy),
            lambda: report.write(copy),
        )
        return said, rng.choices(uses, (10, 10, 10, 1))[0]

    def checkpoint(self, rng: random.Random) -> Input:
        """Orbax's files; a damaged checkpoint must not be used."""
        copy, said = self._damaged(rng, "saved")

        def read() -> None:
            stored = checkpoints.Checkpoints(copy)
            found, _ = stored.restore_latest(self.state)
            stored.close()
            if found is not None:
                np.testing.assert_array_equal(found[0].offsets["a"], self.state.offsets["a"])
                assert found[2] == POSITION

        return said, read

    def library(self, rng: random.Random) -> Input:
        """Adapters in safetensors."""
        copy, said = self._damaged(rng, "library")
        base = self.policy.pretrained.sha256
        zero = self.policy.zero
        return said, lambda: checkpoints.load_library(copy, zero, base_sha256=base)

    def model(self, rng: random.Random) -> Input:
        """A model's folder: settings, weights, tokenizer."""
        copy, said = self._damaged(rng, "model")

        def read() -> None:
            tokenizer = hub.load_model(str(copy)).tokenizer
            tokenizer.decode(tokenizer.encode(" Any text: \u00e9 \U0001f9c1 \0 \x9b 12\n"))

        return said, read


TARGETS = ("overrides", "config", "data", "run_directory", "checkpoint", "library", "model")


def parse_command(argv: list[str]) -> None:
    """Reads a command line and its config, and leaves no flag behind."""
    before, kept = set(flags.FLAGS), sys.argv
    sys.argv = argv
    try:
        config = commands.define_config()
        commands.parse_flags(argv)
        parse_config(config.value)
    finally:
        sys.argv = kept
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def read_one(readers: Readers, name: str, seed: int, number: int) -> str:
    """Makes and reads an input; returns what crashed and how to see it again, "" for nothing."""
    said, read = getattr(readers, name)(random.Random(f"{seed} {name} {number}"))
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(60)
    problem = ""
    try:
        read()
    except InputError as error:
        if not str(error):
            problem = "InputError without a sentence"
    except KeyboardInterrupt:
        raise
    except BaseException:
        problem = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    again = f"--only {name} --seed {seed} --start {number}"
    return problem and f"{problem}\ncrash     {again}\ninput     {said}"


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow


def fuzz(
    seconds: float, *, seed: int, only: str | None = None, start: int = 0
) -> tuple[Counter[str], str]:
    """Reads inputs for a while, the same time for each target, or until one crashes.

    Returns:
      the number of inputs by target, and what crashed, "" for nothing.
    """
    names = (only,) if only else TARGETS
    counts: Counter[str] = Counter(dict.fromkeys(names, 0))
    spent = dict.fromkeys(names, 0.0)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        while (now := time.monotonic()) < end:
            name = min(names, key=lambda name: spent[name])
            crash = read_one(readers, name, seed, start + counts[name])
            if crash:
                return counts, crash
            counts[name] += 1
            spent[name] += time.monotonic() - now
    return counts, ""


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    given = flags.FLAGS
    counts, crash = fuzz(60 * given.minutes, seed=given.seed, only=given.only, start=given.start)
    for name, count in counts.items():
        print(f"{name:<14}{count:>9,} inputs")
    print(visible(crash) or "no crash")
    sys.exit(bool(crash))


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 60.0, "How long.", 0.0)
    flags.DEFINE_integer("seed", 0, "Of the inputs.", 0)
    flags.DEFINE_enum("only", None, TARGETS, "One target instead of all.")
    flags.DEFINE_integer("start", 0, "Number of the first input.", 0)
    commands.run(main)
