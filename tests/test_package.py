"""The distributions: what wheel and source archive hold, and what an installed wheel offers."""

import ast
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from grpocem_jax.config import files as config_files
from grpocem_jax.config.files import load_config
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]
print(build_meta.build_wheel(folder), build_meta.build_sdist(folder), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive, built from a copy: a build writes into its folder."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info")
    copy = folder / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=lambda place, names: (
            {n for n in names if n.startswith(".") and n != ".dockerignore"} | ignored(place, names)
        ),
    )
    result = subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=copy, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    wheel, sdist = result.stderr.split()[-2:]
    return folder / wheel, folder / sdist


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[0]) as archive:
        yield archive


def files(folder, top):
    """Files below a folder of the repository, as a distribution should name them."""
    return {
        f"{top}/{path.relative_to(ROOT / folder)}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_the_configs_and_nothing_else(wheel):
    info = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    held = {name for name in wheel.namelist() if not name.startswith(info)}
    assert held == files("grpocem_jax", "grpocem_jax") | files("configs", "grpocem_jax/configs")
    assert "grpocem_jax/builtin/model/model.safetensors" in held
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_source_archive_holds_what_a_developer_needs(built):
    with tarfile.open(built[1]) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder in ("benchmarks", "configs", "docs", "examples", "grpocem_jax", "studies", "tests"):
        assert files(folder, folder) <= held
    assert {"LICENSE", "Makefile", "requirements.lock", "train.py", "adapt.py"} <= held


def test_the_commands_are_functions_of_the_package(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    scripts = dict(parser["console_scripts"])
    names = ("train", "adapt", "export", "compare", "serve")
    assert set(scripts) == {f"grpocem-{name}" for name in names}
    for script, target in scripts.items():
        assert callable(importlib.metadata.EntryPoint(script, target, "console_scripts").load())


def test_the_wheel_says_which_pythons_it_runs_on(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= {
        *classifiers
    }


def test_an_installed_wheel_runs_by_a_configs_name(built, tmp_path):
    """From another folder, without the repository on the path; its configs are those inside."""
    subprocess.run([sys.executable, "-m", "zipfile", "-e", built[0], tmp_path / "site"], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "from grpocem_jax import cli; from grpocem_jax.config import files as config_files;"
        "assert 'site' in str(config_files.config_folder());"
        "cli.train()"
    )
    flags = ["--config=tiny", "--workdir=run", "--config.grpo.group_size=5"]
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, tmp_path / "site", *flags],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Refused for its settings: the config was found, and no time is spent on training.
    assert "grpo.group_size=5 does not divide train.batch_size=64" in result.stderr
    assert result.returncode == 2


def imported(folder):
    """Top-level modules that the code of a folder imports, without the standard library."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - {"grpocem_jax"} - sys.stdlib_module_names


def normal(name):
    return re.match(r"[\w-]+", name).group().replace("_", "-").lower()


def test_what_the_package_imports_it_declares_and_nothing_else():
    owners = importlib.metadata.packages_distributions()
    used = {normal(owners.get(module, [module])[0]) for module in imported("grpocem_jax")}
    required = {normal(entry) for entry in PROJECT["dependencies"]}
    optional = {normal(e) for extra in PROJECT["optional-dependencies"].values() for e in extra}
    assert required <= used <= required | optional


@pytest.mark.parametrize("name", ["tiny", "gpt2", "gpt2:tuned"])
def test_a_config_is_found_by_name_as_by_file(name, monkeypatch, tmp_path):
    stem, *argument = name.split(":")
    file = ":".join([str(ROOT / "configs" / f"{stem}.py"), *argument])
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(file)


def test_a_file_goes_before_a_name(monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny").model.source == "builtin"  # a folder is no config
    source = "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()\n"
    (tmp_path / "gpt2").with_suffix(".py").write_text(source, encoding="utf-8")
    assert load_config("gpt2.py").data.get("qa") is None  # which the one in the package has


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (
            None,
            "config that comes with the package; those are gpt2, llama, smollm2, tiny",
        ),
        ("x = 1", "no attribute 'get_config'"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config(): return {}", "returns dict, not a ConfigDict"),
        ("def get_config(): raise ValueError('choose a or b.')", "ValueError: choose a or b."),
        ("def get_config(): raise ValueError", "ValueError: no message"),
        ("def get_config(): exit(0)", "SystemExit: 0"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "E: no message"),
        ("def get_config(): return missing", "NameError"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, text, fragment):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert str(error.value).startswith((str(path), repr(str(path))))
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_modules_beside_a_config_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "beside_a_config.py").write_text("def reward(): return 7\n")
    source = "import beside_a_config, grpocem_jax as gj\ndef get_config():\n"
    source += "    assert beside_a_config.reward() == 7\n    return gj.load_config('tiny')\n"
    (tmp_path / "far" / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_config("far/mine.py")
    assert user_code.load_function("beside_a_config:reward", field="config.x")() == 7
    # What comes with the package has nothing beside it: `import tiny` stays an error.
    assert str(config_files.config_folder()) not in sys.path


def test_a_file_that_is_not_python_is_no_config(tmp_path):
    (tmp_path / "config.txt").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is no Python file"):
        load_config(str(tmp_path / "config.txt"))


def test_the_folder_of_the_configs_is_in_the_checkout_or_in_the_package():
    assert (config_files.config_folder() / "tiny.py").is_file()


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [
                    alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")
                ]
            for name in names:
                assert not re.match(r"tests\.(\w+\.)*(test_|conftest)", name), (path.name, name)
