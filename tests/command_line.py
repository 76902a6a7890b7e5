"""Commands in this process, through `commands.run` as the scripts do, on a run nobody trained.

Fixtures for the test modules that name this one as a plugin.
"""

import hashlib
import json
import re
import runpy
import shutil
import sys

import pytest
from absl import flags

from grpocem_jax import cli, compare
from grpocem_jax.config import commands
from grpocem_jax.export import __main__ as export_main
from grpocem_jax.search import loop
from grpocem_jax.training import loop as training
from tests.runs import ROOT, no_search, write_run

TINY = "--config=tiny"


def benchmark(name):
    """Runs a benchmark as a script; another test may have imported it as a module."""
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")


COMMANDS = {
    "train": cli.train,
    "adapt": cli.adapt,
    "export": export_main.main,
    "compare": compare.main,
    "serve": cli.serve,
    "report": lambda: runpy.run_module("grpocem_jax.report", run_name="__main__"),
    "experts": lambda: runpy.run_path(
        str(ROOT / "grpocem_jax" / "experts.py"), run_name="__main__"
    ),
    "cem": lambda: benchmark("cem"),
    "decode": lambda: benchmark("decode"),
    "grpo": lambda: benchmark("grpo"),
    "memory": lambda: benchmark("memory"),
    "many_searches": lambda: benchmark("many_searches"),
    "scaling": lambda: benchmark("scaling"),
}


def assert_sentence(text):
    """One sentence, and nothing that a terminal obeys."""
    assert text.endswith((".", "?")), text
    assert all(c.isprintable() for c in text), ascii(text)
    assert not re.search(r"[.!?] +[A-Z][a-z]", text), text
    assert "Traceback" not in text


def tree(folder):
    """Names and contents of everything in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """What a training leaves behind, with an adapter that nobody trained; not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("original") / "run")
    gain = {"before": 0.1, "after": 0.2, "gain": 0.1, "gain_ci95": [0.0, 0.2], "n": 4}
    summary = {
        **{key: {"qa": gain, "overall": gain} for key in ("heldout", "heldout_greedy")},
        **{"steps": 1, "trainable_parameters": 408, "model": "builtin", "random_weights": False},
        **{"builtin_model": True, "builtin_data": {"qa": True}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"model": "a", "data": "b", "id": "c"}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    return folder


@pytest.fixture
def workdir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def run_command(capsys, monkeypatch):
    """A command in this process: status, stdout and stderr."""

    def run_app(main, flags_parser):
        sys.exit(main(flags_parser(sys.argv)))

    monkeypatch.setattr(commands.app, "run", run_app)

    def run_command(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        before = set(flags.FLAGS)
        try:
            COMMANDS[name]()
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture
def call(run_command, monkeypatch, tmp_path):
    """As `run_command`, of a command that must not search or train."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(loop, "maximize", no_search)
    monkeypatch.setattr(training.Run, "train", no_search)
    monkeypatch.setattr(sys, "stdin", None)
    return run_command


@pytest.fixture
def refused(call, tmp_path):
    """The sentence with which a command ends; it changed no file."""

    def refused(name, *arguments):
        before = tree(tmp_path)
        status, out, err = call(name, *arguments)
        assert status == 2, err
        assert out == ""
        *_, last = err.splitlines()
        assert last.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert_sentence(last)
        assert tree(tmp_path) == before
        return last

    return refused
