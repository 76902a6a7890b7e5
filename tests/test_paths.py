"""Paths: ``~`` is the home directory wherever one is taken, and there may be no home directory."""

import json
import os
import pwd
import shutil
import tempfile

import jax
import pytest

from grpocem_jax import adapters, report
from grpocem_jax.config import commands
from grpocem_jax.config.files import load_config
from grpocem_jax.models import hub
from grpocem_jax.tasks import TASKS, SourceConfig, load_examples
from grpocem_jax.training import loop as training
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT

pytest_plugins = ["tests.command_line"]

TINY = "--config=tiny"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory, and a working directory in which a folder named ``~`` would be seen."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


@pytest.fixture
def homeless(monkeypatch):
    """No HOME, and a user id that the system does not know."""

    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_path_is_expanded_or_refused(home, homeless, monkeypatch):
    with pytest.raises(InputError, match=r"^--out='~/x': no home directory is known for '~'"):
        files.expand("~/x", "--out")
    monkeypatch.setenv("HOME", str(home))
    assert files.expand("~/x/y", "--out") == home / "x" / "y"
    assert files.expand("a/~/b", "--out").parts == ("a", "~", "b")
    with pytest.raises(InputError, match="is known for '~nobody-of-that-name'"):
        files.expand("~nobody-of-that-name/x", "--out")


def test_models_and_data_are_found_at_home(home):
    shutil.copytree(hub.BUILTIN, home / "model")
    (home / "train.csv").write_text("text,label\nfine,1\n")
    found = hub.load_model("~/model")
    assert (found.kind, found.source) == ("folder", "~/model")
    assert hub.load_model("random:~/model").kind == "random"
    source = SourceConfig("~", label_names=("bad", "good"))
    options = {"count_tokens": len, "max_prompt_tokens": 99, "max_samples": 9, "seed": 0}
    assert len(load_examples(TASKS["sentiment"], source, split="train", **options).examples) == 1


def test_a_config_file_is_found_at_home(home):
    shutil.copy(ROOT / "configs" / "tiny.py", home / "mine.py")
    assert load_config("~/mine.py").model.source == "builtin"


def test_runs_pages_and_exports_lie_at_home(home, workdir, call):
    shutil.copytree(workdir, home / "run")
    assert call("report", "--workdir=~/run")[0] == 0
    assert (home / "run" / "report" / "index.html").is_file()
    assert report.write("~/run") == home / "run" / "report" / "index.html"
    status, _, err = call("export", "--workdir=~/run", "--out=~/exported")
    assert (status, (home / "exported" / "model.safetensors").is_file()) == (0, True), err
    status, _, err = call("export", "--workdir=~/run", "--out=~/exported")
    assert (status, "exists already" in err) == (2, True)


@pytest.mark.parametrize("flag", ["prompts", "examples", "heldout"])
def test_files_of_texts_are_looked_for_at_home(home, workdir, flag, call):
    prompt = [] if flag == "prompts" else ["--prompt=Hello"]
    status, _, err = call("adapt", TINY, f"--workdir={workdir}", *prompt, f"--{flag}=~/none.txt")
    assert status == 2
    assert f"{home}/none.txt: give an existing file" in err


def test_what_was_saved_at_home_is_seen(home, workdir, call):
    shutil.copytree(workdir / "adapter", home / "adapted")
    options = (TINY, f"--workdir={workdir}", "--prompt=Review: a", "--save=~/adapted")
    status, _, err = call("adapt", *options)
    assert (status, "holds adapter_model.safetensors already" in err) == (2, True), err
    space = ("--config.search.space=experts", "--config.search.experts=~/library")
    status, _, err = call("adapt", TINY, f"--workdir={workdir}", "--prompt=Review: a", *space)
    assert (status, f"{home}/library" in err) == (2, True), err


def test_a_training_is_made_at_home(home, monkeypatch):
    def stop(workdir, settings):
        raise InputError(f"would be made in {workdir}.")

    monkeypatch.setattr(training.rundir, "check_settings", stop)
    with pytest.raises(InputError, match=f"would be made in {home}/runs/a"):
        training.train(load_config("tiny"), "~/runs/a")


@pytest.fixture
def jax_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_home_nothing_is_cached_and_a_line_says_so(homeless, capsys, jax_cache):
    assert files.cache_folder() is None
    assert adapters.cached_svd() is adapters.svd
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        commands.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before
    assert "no home directory" in capsys.readouterr().err


def test_a_home_in_which_nothing_can_be_made_has_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert files.cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "caches" / "grpocem_jax"


def test_the_folder_for_compiled_programs_may_lie_at_home(home, monkeypatch, jax_cache):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/programs")
    commands.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(home / "programs")


def test_some_home_is_there_inside_the_block_alone(homeless):
    with files.some_home():
        assert os.path.expanduser("~") == tempfile.gettempdir()
    assert "HOME" not in os.environ
    assert os.path.expanduser("~") == "~"


# A base model that moved


def moved(workdir, home):
    """A run whose base model was in a folder that is not there any more; where it is now."""
    shutil.copytree(hub.BUILTIN, home / "now")
    settings = json.loads((workdir / "config.json").read_text())
    settings["model"]["source"] = str(home / "before")
    (workdir / "config.json").write_text(json.dumps(settings))
    return home / "now"


def test_a_base_model_that_moved_is_given_by_a_flag(home, workdir, call):
    place = moved(workdir, home)
    status, _, err = call("export", f"--workdir={workdir}", f"--out={home}/out")
    assert status == 2
    assert f"model.source='{home}/before'" in err
    assert "give its place with --model." in err
    assert not (home / "out").exists()
    status, _, err = call("export", f"--workdir={workdir}", f"--out={home}/out", f"--model={place}")
    assert (status, (home / "out" / "model.safetensors").is_file()) == (0, True), err


def test_the_model_at_the_new_place_must_be_the_one_trained_on(home, workdir, call):
    place = moved(workdir, home)
    for source in (f"random:{place}", str(home / "nowhere")):
        status, _, err = call(
            "export", f"--workdir={workdir}", f"--out={home}/x", f"--model={source}"
        )
        assert status == 2
        assert "whose weights are not those" in err or "there is no such folder" in err


def test_a_run_goes_on_with_a_model_that_moved():
    settings = load_config("tiny").to_dict()
    elsewhere = {**settings, "model": {**settings["model"], "source": "/elsewhere"}}
    trained = training.rundir.trained_settings
    assert trained(settings) == trained(elsewhere)
    assert trained(settings) != trained({**settings, "model": {**settings["model"], "dtype": "x"}})
