"""Nothing from outside is run, and nothing of it reaches a terminal as more than text."""

import ast
import errno
import io
import itertools
import json
import os
import shutil
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from grpocem_jax import adaptation, grpo
from grpocem_jax.adaptation import Adaptation
from grpocem_jax.adaptation import command as inference
from grpocem_jax.config.files import load_config
from grpocem_jax.training import evaluation, step
from grpocem_jax.training import loop as training
from grpocem_jax.utils import terminal
from grpocem_jax.utils.terminal import one_line, visible
from tests.runs import PROMPT, ROOT, get_config

pytestmark = pytest.mark.usefixtures("one_policy")

PACKAGES = ("grpocem_jax", "configs", "benchmarks", "studies")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
MODULES |= {"subprocess", "pty", "commands", "torch"}
FUNCTIONS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"exec_module", "import_module", "system", "popen", "spawn", "load_module", "run_path"}
ALLOWED = {
    # A config is a Python file, and the docs say that it is code.
    ("grpocem_jax/config/files.py", "exec_module"),
    # Functions of the user's own, named in a config.
    ("grpocem_jax/utils/user_code.py", "import_module"),
    # Names of this package, looked up when they are used.
    ("grpocem_jax/__init__.py", "import_module"),
    # Comparisons with PyTorch, in processes of their own; never in the product.
    ("benchmarks/common.py", "import_module"),
    ("benchmarks/peers.py", "torch"),
    ("benchmarks/peers_peft.py", "torch"),
    ("benchmarks/peers_trl.py", "torch"),
    # The clients of the benchmark over HTTP, in a process of their own.
    ("benchmarks/serve.py", "subprocess"),
    ("studies/distributed.py", "subprocess"),
    ("studies/kills.py", "subprocess"),
    ("studies/serving.py", "subprocess"),
    # An optional package, and only where a config names it.
    ("grpocem_jax/search/evosax.py", "import_module"),
    # git, which says of which commit a checkout is.
    ("grpocem_jax/runs/metrics.py", "subprocess"),
    # This Python, which says a sentence where JAX aborts a process.
    ("grpocem_jax/utils/cluster.py", "subprocess"),
    # The training commands and nvidia-smi, in processes of their own.
    ("benchmarks/gpu.py", "subprocess"),
    # transformers runs the exported folder where PyTorch is installed, to compare logits.
    ("grpocem_jax/export/model.py", "torch"),
}


def unsafe(path):
    """What a file has that runs code or reads what could."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").split(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
                yield node.func.id
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield node.func.attr
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and value:
                    yield keyword.arg
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and value is None:
                    yield f"{keyword.arg}, which is not a plain False"


def test_no_code_is_unpickled_evaluated_fetched_or_given_to_a_shell():
    found = {
        (str(path.relative_to(ROOT)), name)
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*.py")
        for name in unsafe(path)
    }
    assert found == ALLOWED


def test_what_is_forbidden_is_found(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nfrom subprocess import run\neval('1')\nimport os\nos.system('ls')\n"
        "f(trust_remote_code=True)\nf(allow_pickle=x)\nnp.load(p, allow_pickle=False)\n"
    )
    assert list(unsafe(path)) == [
        "pickle", "subprocess", "eval", "system", "trust_remote_code",
        "allow_pickle, which is not a plain False",
    ]  # fmt: skip


# The terminal

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\r\b\x00\x7f\u2028"


@hypothesis.given(st.text())
def test_shown_text_has_no_control_and_says_what_was_there(text):
    shown = one_line(text)
    assert all(c.isprintable() for c in shown)
    assert text.isprintable() == (shown == text)
    assert visible(text).split("\n") == [one_line(line) for line in text.split("\n")]
    shown.encode()  # no half of a surrogate pair, so that every stream takes it


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("how", [terminal.say, terminal.show])
def test_what_a_terminal_cannot_show_is_an_escape(how, encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    how("é 日本 \U0001f600 …")
    shown = raw.getvalue().decode(encoding).rstrip("\r\n")
    # Whatever is not an escape is as it was.
    assert shown.encode("latin-1", "backslashreplace").decode("unicode_escape") == "é 日本 😀 …"
    assert ("日" in shown) == (encoding == "utf-8")
    assert ("é" in shown) == (encoding == "utf-8")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_what_a_run_shows_may_fail_and_a_result_may_not(number, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Full())
    terminal.say("step 3")
    with pytest.raises(OSError, match=os.strerror(number)):
        terminal.show("the result")


def assert_plain(text):
    """Nothing but printable characters and line breaks."""
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_adaptation_shows_is_text(as_json, original, tmp_path, monkeypatch, capsys):
    """Prompt, completion, and the names of files and folders."""
    name = HOSTILE.replace("\0", "")
    workdir = shutil.copytree(original, tmp_path / name)
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": PROMPT + HOSTILE}))
    completions = itertools.cycle(["before", HOSTILE])
    monkeypatch.setattr(adaptation, "complete", lambda *_: [next(completions)])
    monkeypatch.setattr(
        adaptation,
        "adapt",
        lambda run, *_, **__: Adaptation(run.offsets, -1.0, -1.0, None, HOSTILE),
    )
    inference.run(
        get_config(),
        workdir=str(workdir),
        prompts=str(tmp_path / f"{name}.jsonl"),
        examples=str(tmp_path / f"{name}.jsonl"),
        save=str(tmp_path / "saved" / name),
        as_json=as_json,
    )
    out, err = capsys.readouterr()
    assert_plain(out + err)
    assert one_line(name) in err
    if as_json:
        (record,) = json.loads(out)["results"]
        assert (record["prompt"], record["text_after"]) == (PROMPT + HOSTILE, HOSTILE)
    else:
        assert f"after    >{one_line(HOSTILE)}\n" in out


def test_what_training_shows_is_text(tmp_path, monkeypatch, capsys):
    """Data, completions, and the names of the data's folder and of the run's."""
    name = HOSTILE.replace("\0", "")
    data = tmp_path / f"data{name}"
    data.mkdir()
    rows = [json.dumps({"text": f"The {i} {HOSTILE} cat"}) for i in range(8)]
    (data / "train.jsonl").write_text("\n".join([*rows, "\x1b[2J"]))
    (data / "test.jsonl").write_text("\n".join(json.dumps({"text": f"A {i} cat"}) for i in "ab"))

    def train(run):
        rewards = np.zeros((1, 1))
        batch = grpo.Batch(*[None] * 5, advantages=rewards[..., None], weights=None)
        run.show(
            1, step.Prepared(run.items[:1], [[HOSTILE]], rewards, batch, {}, 0, True, np.arange(1))
        )
        for file in (run.metrics, run.completions, run.checkpoints):
            file.close()
        return run.state

    def judge(policy, offsets, items, key, config):
        texts = [[HOSTILE] for _ in items]
        return evaluation.Judged(np.zeros(2), texts, np.zeros(2), texts)

    monkeypatch.setattr(training.Run, "train", train)
    monkeypatch.setattr(evaluation, "judge", judge)
    config = load_config("tiny")
    changes = {
        "data.tasks": ("general",),
        "data.bad_lines": "skip",
        "data.general.source": str(data),
    }
    config.update_from_flattened_dict(changes)
    summary = training.train(config, tmp_path / f"run{name}")
    out, err = capsys.readouterr()
    assert_plain(out + err)
    assert one_line(name) in out
    assert f">{one_line(HOSTILE)}" in err
    assert "1 bad and passed over (the first: " in out
    assert summary["data"]["general"]["bad_lines"] == 1
