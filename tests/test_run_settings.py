"""A run's folder is enough: its settings, changed by flags, where it looked for modules; commands
to paste; what a path of an adapter is relative to."""

import inspect
import json
import shlex
import sys
from pathlib import Path

import ml_collections
import pytest
from absl import flags

import grpocem_jax as gj
from grpocem_jax import adaptation
from grpocem_jax.config import commands, parse_config
from grpocem_jax.config import files as config_files
from grpocem_jax.runs import checkpoints, rundir
from grpocem_jax.runs import screens as run_screens
from grpocem_jax.training import screens
from grpocem_jax.utils.errors import InputError
from tests.runs import get_config, random_offsets, tiny_policy, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run with 'quotes' and:colon")


@pytest.fixture
def parse(monkeypatch):
    """The settings that a command line gives a command which takes those of a run."""

    def parse(*arguments):
        before = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", ["adapt", *map(str, arguments)])
        config = commands.define_config(of_run=True)
        flags.DEFINE_string("workdir", None, "")
        try:
            commands.parse_flags(sys.argv)
            return config.value
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)

    return parse


def test_without_config_the_settings_are_those_of_the_run(parse, run):
    expected = parse_config(get_config(**{"seed": 5}))
    (run / "config.json").write_text(json.dumps(get_config(**{"seed": 5}).to_dict()))
    for given in ([f"--workdir={run}"], ["--workdir", run], [f"-workdir={run}"]):
        assert parse_config(parse(*given)) == expected


@pytest.mark.parametrize("first", [True, False])
def test_flags_change_the_settings_of_the_run(parse, run, first):
    changes = [
        "--config.search.generations=7",
        "--config.search.budget_s=2.5",  # None in the run
        "--config.search.buckets=(16,32)",
        "--noconfig.search.gate",
        "--config.data.qa.source=/elsewhere",
    ]
    where = [f"--workdir={run}"]
    found = parse_config(parse(*(where + changes if first else changes + where)))
    search = found.search
    assert (search.generations, search.budget_s, search.buckets, search.gate) == (
        7,
        2.5,
        (16, 32),
        False,
    )
    assert found.data.sources["qa"].source == "/elsewhere"
    assert found.data.tasks == get_config().data.tasks


def test_config_takes_the_place_of_the_settings_of_the_run(parse, run):
    (run / "config.json").write_text(json.dumps(get_config(**{"seed": 5}).to_dict()))
    assert parse("--config=tiny", f"--workdir={run}").seed == 0
    assert parse(f"--workdir={run}", "--config", "tiny", "--config.seed=3").seed == 3
    assert parse(f"--config={run / 'config.json'}").seed == 5


def test_a_config_of_a_run_without_settings_is_named(parse, run):
    (run / "config.json").write_text("[3]")
    with pytest.raises(InputError, match=r"config\.json: is no JSON object"):
        parse(f"--workdir={run}")


def test_options_of_an_adapter_keep_their_lists(run):
    settings = get_config().to_dict()
    settings["adapter"]["options"] = {"ranks": [1, 2]}
    (run / "config.json").write_text(json.dumps(settings))
    loaded = config_files.load_config(str(run / "config.json"))
    assert loaded.adapter.options.to_dict() == {"ranks": [1, 2]}
    assert loaded.adapter.sites == ("attn.c_proj",)


def test_a_run_finds_the_modules_beside_the_config_it_was_made_with(tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    (code / "fitness_beside_a_config.py").write_text("def mine(m, p, a, t, k): return t\n")
    (code / "own.py").write_text(
        "import grpocem_jax as gj\n\n\ndef get_config():\n    config = gj.load_config('tiny')\n"
        "    config.search.fitness = 'fitness_beside_a_config:mine'\n    return config\n"
    )
    path, known = list(sys.path), list(config_files._code_folders)
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setattr(config_files, "_code_folders", known)
    settings = gj.load_config(str(code / "own.py"))
    with rundir.claim(tmp_path / "run", settings.to_dict(), {"model": "a"}) as stored:
        assert str(code) in stored[config_files.CODE]
    # Another process, which has not seen the config.
    monkeypatch.setattr(sys, "path", [each for each in path if each != str(code)])
    monkeypatch.setattr(config_files, "_code_folders", [])
    monkeypatch.delitem(sys.modules, "fitness_beside_a_config", raising=False)
    loaded = gj.load_config(str(tmp_path / "run" / "config.json"))
    assert parse_config(loaded).search.fitness == "fitness_beside_a_config:mine"
    # A folder that has gone is passed over.
    moved = code.rename(tmp_path / "moved")
    monkeypatch.setattr(sys, "path", list(path))
    gj.load_config(str(tmp_path / "run" / "config.json"))
    assert moved.is_dir()
    assert str(code) not in sys.path[len(path) :]


def test_a_run_keeps_the_command_that_started_it(tmp_path, monkeypatch):
    settings = {"seed": 1}
    monkeypatch.setattr(sys, "argv", ["/env/bin/grpocem-train", "--config", "my config.py"])
    with rundir.claim(tmp_path, settings, {"model": "a"}) as stored:
        assert stored["command"] == "grpocem-train --config 'my config.py'"
    monkeypatch.setattr(sys, "argv", ["train.py", "--other"])
    with rundir.claim(tmp_path, settings, {"model": "a"}) as again:
        assert again == stored


def test_what_the_closing_lines_print_can_be_pasted(parse, run):
    printed = screens._next_commands(run)
    for line in printed:
        name, *arguments = shlex.split(line)
        assert Path(name).name in ("grpocem-adapt", "grpocem-export")
        assert arguments[:2] == ["--workdir", str(run)]
    settings = parse(*shlex.split(printed[1])[1:3], "--config.search.support=8")
    assert isinstance(settings, ml_collections.ConfigDict)
    assert not any("CONFIG" in line or "TEXT" in line for line in printed)


@pytest.mark.parametrize("active", [True, False])
def test_a_command_is_named_by_its_path_where_its_environment_is_not_active(
    tmp_path, monkeypatch, active
):
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "grpocem-adapt"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder) if active else "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert (
        run_screens.installed("grpocem-adapt") == ("" if active else "env/bin/") + "grpocem-adapt"
    )
    monkeypatch.chdir("/")
    expected = "grpocem-adapt" if active else str(folder / "grpocem-adapt").removeprefix("/")
    assert run_screens.installed("grpocem-adapt") == expected


def test_paths_of_adapters_are_relative_to_the_current_directory(run, monkeypatch):
    loaded, config = tiny_policy()
    offsets = random_offsets(loaded.zero, 3)
    described = loaded.adapter_config(config.adapter)
    monkeypatch.chdir(run.parent)
    checkpoints.save_adapter("saved", offsets, described, "")
    found = adaptation.load_run(run.name, adapter="saved").offsets
    same = gj.load_adapter("saved", loaded.zero)
    for name, value in offsets.items():
        assert (found[name] == value).all()
        assert (same[name] == value).all()
    checkpoints.save_adapter(Path(run.name) / "best_adapter", offsets, described, "")
    with pytest.raises(InputError) as error:
        adaptation.load_run(run.name, adapter="best_adapter")
    there = str(Path(run.name, "best_adapter"))
    assert f"relative to the current directory, so give {there!r}" in str(error.value)
    with pytest.raises(InputError, match=r"there is no adapter.*correct it"):
        adaptation.load_run(run.name, adapter="nowhere")


@pytest.mark.parametrize("function", [gj.load_run, gj.load_adapter, gj.export_model])
def test_functions_that_take_an_adapters_folder_document_their_arguments(function):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert f"\n  {name}: " in text
