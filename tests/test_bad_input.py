"""Bad flags, prompts and files of texts: a status, one sentence, and nothing written over.

tests/test_bad_runs.py has damaged run directories, models and data; tests/test_config.py the values
of settings.
"""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

import grpocem_jax as gj
from grpocem_jax import adaptation
from grpocem_jax.config import commands
from grpocem_jax.training import loop as training
from grpocem_jax.utils.errors import InputError
from studies.fuzz import parse_command
from tests.command_line import TINY, assert_sentence
from tests.runs import PROMPT, ROOT, tiny_policy

pytestmark = pytest.mark.usefixtures("one_policy")


# Flags

LONG = "z" * 5000
FLAGS = [
    ("train", [], "--config is missing"),
    ("train", [TINY, "extra"], "'extra' is not a flag"),
    ("train", [TINY, "--nonsense"], "--nonsense: there is no such flag; see --help"),
    ("train", [TINY, "--line\nbreak"], "--line\\nbreak: there is no such flag"),
    ("train", [TINY, "--workdirr=x"], "did you mean --workdir?"),
    ("train", ["--config"], "is neither a file nor a config"),
    ("train", ["--config="], "neither a file nor a config"),
    ("train", ["--config=nothing"], "'nothing' is neither a file nor a config"),
    ("train", ["--config=/"], "'/' is neither a file nor a config"),
    ("train", [f"--config={LONG}"], "neither a file nor a config"),
    ("train", ["--config=tiny:fast"], "tiny cannot be used as a config"),
    ("train", ["--config=gpt2:fast"], "no recipe 'fast'"),
    ("train", [f"--config={ROOT}/README.md"], "is no Python file"),
    ("train", ["--config=setup.cfg\x1b[2J"], "\\x1b[2J"),
    ("train", [TINY, "--config.seed"], "--config.seed"),
    ("train", [TINY, "--config.seed="], "a whole number"),
    ("train", [TINY, "--config.seed=-1"], "config.seed=-1: must be from 0"),
    ("train", [TINY, "--config.seed=4294967296"], "at most 2147483647"),
    ("train", [TINY, "--config.seed=1.5"], "--config.seed=1.5"),
    ("train", [TINY, "--config.seed.x=1"], "no such field"),
    ("train", [TINY, "--config.sed=1"], "--config.sed: the config has no such field"),
    ("train", [TINY, "--config.grpo.groupsize=5"], '"group_size"'),
    (
        "train",
        [TINY, "--config.grpo.advantage=scaled"],
        "--config.grpo.advantage: is called grpo.advantages now",
    ),
    (
        "train",
        [TINY, "--config.grpo.aggregation=token"],
        "--config.grpo.aggregation: is called grpo.weights now",
    ),
    ("train", [TINY, "--config.data.tasks[0]=qa"], "data.tasks[0]: is no name of a field"),
    ("train", [TINY, "--config.seed[0]=1"], "--config.seed[0]: is no name of a field"),
    ("train", [TINY, "--config.--config.seed=4"], "--config.--config.seed: is no name of a field"),
    ("train", [TINY, "--config.=4"], "--config.: is no name of a field"),
    ("train", [TINY, "--config.train=3"], "its fields one by one"),
    ("train", [TINY, "--config.train.epochs=many"], "a whole number"),
    ("train", [TINY, f"--config.train.epochs={'9' * 5000}"], "--config.train.epochs"),
    ("train", [TINY, "--config.train.learning_rate=fast"], "a number"),
    ("train", [TINY, "--config.train.learning_rate=nan"], "finite"),
    ("train", [TINY, "--config.train.learning_rate=inf"], "finite"),
    ("train", [TINY, "--config.train.learning_rate=1e-60"], "float32"),
    ("train", [TINY, "--config.train.learning_rate=0"], "above 0"),
    ("train", [TINY, "--config.search.gate=maybe"], "True or False"),
    ("train", [TINY, "--config.data.bad_lines=ignore"], "one of 'error', 'skip'"),
    ("train", [TINY, "--config.data.tasks=(("], "config.data.tasks"),
    ("train", [TINY, "--config.data.tasks=('qa\x1b[31m',)"], "\\x1b[31m"),
    (
        "train",
        [TINY, "--config.adapter.sites=('mlp',)"],
        "config.adapter.sites='mlp': is no linear map",
    ),
    ("train", [TINY, "--config.adapter.sites=(" + "(" * 300], "adapter.sites"),
    ("train", [TINY, "--config.generation.stop=('',)"], "generation.stop: '' is in every text"),
    ("train", [TINY, "--config.logging.report_to=('wandb','wandb')"], "each once"),
    ("train", [TINY, "--config.model.source="], "config.model.source=''"),
    ("train", [TINY, "--config.model.source=~/nowhere"], "there is no such folder"),
    ("train", [TINY, "--config.model.source=random:"], "no such shape"),
    ("train", [TINY, f"--config.model.source=/{LONG}"], "there is no such folder"),
    ("train", [TINY, f"--config.model.source=random:{LONG}"], "no such shape"),
    ("train", [TINY, "--config.model.source=/\udcff"], "must be UTF-8"),
    ("train", [TINY, "--config.model.source=/\x9b31m\u202e"], "\\x9b31m\\u202e"),
    ("train", [TINY, "--config.data.qa.source=/nowhere"], "which is no folder"),
    ("train", [TINY, f"--config.data.qa.source=/{LONG}"], "which is no folder"),
    ("train", [TINY, "--config.data.qa.source=~nobody/x"], "data.qa.source"),
    ("train", [TINY, "--config.data.max_prompt_tokens=2147483647"], "the model's context is 128"),
    ("train", [TINY, "--config.train.batch_size=2147483640"], "a step takes"),
    ("train", [TINY, f"--workdir={ROOT}/README.md/run"], "cannot be written"),
    ("train", [TINY, "--workdir="], "--workdir='': is no folder"),
    ("train", [TINY, "--config.grpo.group_size=5"], "grpo.group_size=5 does not divide"),
    ("train", [TINY, "--num_processes=2"], "--coordinator_address (or JAX_COORDINATOR_ADDRESS)"),
    ("train", [TINY, "--process_id=two"], "--process_id=two"),
    (
        "train",
        [TINY, "--coordinator_address=h:1", "--num_processes=2", "--process_id=2"],
        "--process_id=2 does not fit --num_processes=2: the indices go from 0 to 1",
    ),
    ("train", [TINY, "--wait_s=0"], "--wait_s=0: must be from 1"),
    ("adapt", [TINY, "--nodistributed", "--process_id=0"], "leave --nodistributed out"),
    ("adapt", [], "--workdir is missing"),
    ("adapt", ["--config.seed=1"], "--config.seed"),
    ("adapt", ["--workdir=x", "--config.seed=1"], "holds no run whose settings could be changed"),
    ("adapt", ["--workdir", "x", "--prompt=x"], "holds no trained adapter"),
    ("export", ["--workdir=x", "--config.seed=1"], "holds no run whose settings could be changed"),
    ("compare", [], "0 folders to compare"),
    ("compare", ["/nowhere", "x"], "/nowhere, x: hold no run"),
    ("compare", ["a\x1b[2J", "x"], "\\x1b[2J"),
    ("compare", ["x", "y", "--out=x.png"], "--out=x.png: the page is HTML"),
    ("adapt", [TINY], "there is no prompt"),
    ("adapt", [TINY, "--workdir="], "--workdir is missing"),
    ("adapt", [TINY, "--evaluate"], "into a run directory"),
    ("adapt", [TINY, "--workdir=/nowhere", f"--prompt={PROMPT}"], "holds no trained adapter"),
    ("adapt", [TINY, f"--workdir={LONG}", f"--prompt={PROMPT}"], "holds no trained adapter"),
    ("adapt", [TINY, "--workdir=a\x1b]0;x\x07", "--prompt=x"], "\\x1b]0;x\\x07"),
    ("adapt", [TINY, "--workdir=x"], "there is no prompt"),
    ("adapt", [TINY, "--workdir=x", "--prompt=x", "--save="], "--save='': is no folder"),
    ("adapt", [TINY, "--evaluate=maybe"], "True or False"),
    ("adapt", [TINY, "--json=perhaps"], "True or False"),
    ("export", [], "--workdir is missing"),
    ("export", ["--workdir=x"], "--out is missing"),
    ("export", ["--workdir=/nowhere", "--out=made"], "holds no trained adapter"),
    ("export", ["--workdir=x", f"--out={ROOT}"], "exists already"),
    ("export", ["--workdir=x", "--out=made", "--private"], "--push_to_hub"),
    ("export", ["extra"], "'extra' is not a flag"),
    ("report", [], "--workdir is missing"),
    ("report", ["--workdir=/nowhere"], "holds no run"),
    ("report", ["--workdir=\x1b[2J\u2066"], "\\x1b[2J\\u2066"),
    ("report", ["--workdr=x"], "workdir"),
    ("experts", [], "--config is missing"),
    ("experts", [TINY, "--workdir="], "--workdir='': is no folder"),
    ("experts", [TINY, "--config.data.tasks=('mine',)"], "needs a section config.data.mine"),
    ("cem", [TINY, "--tokens=1"], "--tokens"),
    ("cem", [TINY, "--tokens=many"], "a whole number"),
    ("cem", [TINY, "--tokens=100000"], "--tokens=100000"),
    ("cem", [TINY, "--repetitions=0"], "--repetitions"),
    ("cem", [TINY, "--config.cem.population_size=1"], "population_size=1"),
    ("decode", [TINY, "--tokens=-1"], "--tokens"),
    ("grpo", [TINY, "--prompt_tokens=100000"], "lower one of them"),
    ("memory", ["--config.model.source=/nowhere"], "there is no such folder"),
    ("memory", [TINY, "--text_tokens=129"], "--text_tokens=129: the model's context is 128"),
    ("scaling", [TINY, "--plot="], "--plot=: its name must end in"),
    ("scaling", [TINY, "--plot=/nowhere/x.png"], "--plot=/nowhere/x.png: cannot be written"),
    ("scaling", [TINY, "--plot=x.mp3"], "--plot=x.mp3: its name must end in"),
]


@pytest.mark.parametrize(("name", "arguments", "fragment"), FLAGS)
def test_a_flag_that_cannot_be_used_is_named(name, arguments, fragment, refused, tmp_path):
    if name == "train" and not any(x.startswith("--workdir") for x in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'new'}"]
    assert fragment in refused(name, *arguments)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_ends_a_run_with_a_sentence(call, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/data/metrics\x1b[2J.jsonl")

    monkeypatch.setattr(training, "load_policy", full)
    status, out, err = call("train", TINY, f"--workdir={tmp_path / 'new'}")
    said = "/data/metrics\\x1b[2J.jsonl: No space left on device; mend that and run it again."
    assert (status, out, err) == (2, "", f"error: {said}\n")


# Prompts and files of them

LINE = json.dumps({"text": PROMPT}).encode() + b"\n"
PROMPTS = [
    ("", "the prompt is empty"),
    (" \n\t\u2003", "the prompt is empty"),
    ("half \ud83d of a pair", "character 5 is '\\ud83d'"),
    ("\udcff", "not UTF-8 text"),
    ("word " * 1024, "longer than the limit of 127"),
    ("x" * 100_000, "longer than the limit of 127"),
    ("\U0001f9c1" * 500, "longer than the limit of 127"),
    ("\x1b[2J\x9b31m\u202e" * 50, "longer than the limit of 127"),
]


@pytest.mark.parametrize(("prompt", "fragment"), PROMPTS)
def test_a_prompt_that_cannot_be_used_is_named(prompt, fragment, refused, workdir, call):
    where = f"--workdir={workdir}"
    assert fragment in refused("adapt", TINY, where, f"--prompt={prompt}")
    run = adaptation.load_run(workdir)
    if "allow" not in fragment:  # the run's own settings leave more room
        with pytest.raises(InputError, match=re.escape(fragment)):
            gj.adapt(run, prompt)


def test_a_prompt_from_elsewhere_that_is_not_utf8_is_named(refused, workdir, monkeypatch):
    def pipe(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))

    where = f"--workdir={workdir}"
    pipe(b"Review: \xff bad")
    assert "standard input is not UTF-8 (byte 8)" in refused("adapt", TINY, where)
    pipe(b"")
    assert "the prompt is empty" in refused("adapt", TINY, where)


@pytest.mark.parametrize("prompt", [3, None, b"bytes", ["nested"], ("a", 3)])
def test_what_is_no_text_is_named(prompt, workdir):
    run = adaptation.load_run(workdir)
    for action in (lambda: gj.adapt(run, [prompt]), lambda: gj.complete(run, {}, [prompt])):
        with pytest.raises(InputError, match="give a string, or a list of messages") as error:
            action()
        assert_sentence(str(error.value))
    with pytest.raises(InputError, match="nothing to adapt to"):
        gj.adapt(run, [] if prompt is None else 3)
    for one in ("Review", gj.Text("Review: The", " soup.")):
        for action in (gj.complete, gj.log_likelihoods, gj.adaptation.vote):
            with pytest.raises(InputError, match="is one text; give a list of them"):
                action(run, run.offsets, one)


@pytest.mark.parametrize("settings", [{"gate": False}, {}, "gate"])
def test_settings_of_a_search_that_are_no_record_are_named(settings, workdir):
    run = adaptation.load_run(workdir)
    with pytest.raises(
        InputError, match=r"must be a SearchConfig; .* dataclasses\.replace"
    ) as error:
        gj.adapt(run, PROMPT, settings=settings)
    assert_sentence(str(error.value))


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.jsonl", None, "give an existing file"),
        ("a.xlsx", LINE, "give an existing file that ends in .jsonl"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.jsonl", LINE + b'{"text": "', "line 2 is not valid JSON"),
        ("a.jsonl", LINE + b"3\n", "line 2 holds a int"),
        ("a.jsonl", LINE + b"[" * 100_000, "line 2 is not valid JSON"),
        ("a.jsonl", LINE + b'{"n": ' + b"9" * 5000 + b"}", "line 2 is not valid JSON"),
        ("a.jsonl", LINE + b'{"text": "\xff"}', "line 2 is not UTF-8 text (byte 10)"),
        ("a.jsonl", LINE + b'{"text": "a\0b"}', "line 2 has a NUL byte"),
        ("a.jsonl", LINE + b'{"text": "\\ud800"}', "line 2 has half of a surrogate pair"),
        ("a.jsonl", LINE + b'{"text": " "}', "line 2 has no text"),
        ("a.jsonl", LINE + b'{"txt": "Review: a b"}', "line 2 has no text"),
        ("a.jsonl", LINE + b'{"prompt": "Review: a", "completion": 3}', "line 2 has no text"),
        ("a.json", b"[\n" + LINE + LINE + b"]", "begins as a JSON array and is not a valid one"),
        ("a.txt", PROMPT.encode("utf-16"), "line 1 is not UTF-8 text"),
        ("a.txt", b"Review: \0\n", "line 1 has a NUL byte"),
        ("a.txt", b"Review: \xe9t\xe9\n", "line 1 is not UTF-8 text"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("\x1b[2J\u202e.txt", b"\0", "\\x1b[2J\\u202e.txt"),
    ],
)
def test_a_file_of_texts_that_cannot_be_used_is_named(
    name, content, fragment, refused, workdir, tmp_path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    given = ("adapt", TINY, f"--workdir={workdir}", "--config.search.gate=False")
    assert fragment in refused(*given, f"--prompts={tmp_path / name}")
    for flag in ("examples", "heldout"):
        assert fragment in refused(*given, f"--{flag}={tmp_path / name}", f"--prompt={PROMPT}")


# Anything at all


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    text=st.text(max_size=60) | st.text(st.characters(max_codepoint=300), max_size=60)
)
def test_any_text_is_adapted_to_or_refused(text):
    run = _loaded()
    try:
        tokens, scored = adaptation.encode(run.policy, text, run.config.search)
    except InputError as error:
        assert_sentence(str(error))
    else:
        assert 2 <= len(tokens) == len(scored) <= 127
        assert 0 <= tokens.min() <= tokens.max() < run.policy.model.vocab_size


@functools.cache
def _loaded():
    loaded, config = tiny_policy()
    return adaptation.TrainedRun(config, loaded, loaded.zero)


@pytest.mark.parametrize("length", [2, 3, 16, 17, 126, 127])
def test_prompts_of_every_length_that_fits_are_taken(length):
    run = _loaded()
    text = " the" * length
    assert len(adaptation.encode(run.policy, text, run.config.search)[0]) == length
    with pytest.raises(InputError, match="longer than the limit of 127"):
        adaptation.encode(run.policy, " the" * 1024, run.config.search)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    field=st.sampled_from(
        ["seed", "train.learning_rate", "data.tasks", "model.source", "search.gate"]
    ),
    value=st.text(st.characters(exclude_characters="\0"), max_size=20),
)
def test_any_value_of_a_flag_is_taken_or_refused(field, value):
    try:
        parse_command(["train", TINY, f"--config.{field}={value}"])
    except InputError as error:
        assert_sentence(str(error))


# Processes


def test_scripts_end_bad_input_with_a_sentence_and_status_2(tmp_path):
    """As the commands above, with absl's own start and end."""
    for script, flag in (("train.py", "--config.seed=-1"), ("adapt.py", "--workdir=\x1b[2J\u202e")):
        result = subprocess.run(
            [sys.executable, script, TINY, flag, *(["--prompt=x"] if "adapt" in script else [])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "HOME": str(tmp_path)},
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert_sentence(line)


def test_a_closed_pipe_and_a_late_interrupt_end_without_a_traceback():
    broken = "def main(argv): raise BrokenPipeError(32, 'Broken pipe')\n"
    late = "def main(argv): pass\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    for main, status, sentence in (
        (broken, 2, "what reads the output"),
        (late, -signal.SIGINT, ""),
    ):
        # What is registered first is called last, as JAX's own.
        start = "from grpocem_jax.config import commands\ncommands.run(main)"
        code = f"import atexit, os, signal\n{main}{start}"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == status, result.stderr
        assert sentence in result.stderr
        assert "Traceback" not in result.stderr


def test_what_a_cut_off_checkpoint_prints_is_left_out_and_nothing_else(capsys):
    for text in ("Event loop is closed", "something else"):
        commands._excepthook(RuntimeError, RuntimeError(text), None)
    assert capsys.readouterr().err == "RuntimeError: something else\n"
