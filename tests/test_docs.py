"""The documents: made files are up to date, names and links lead somewhere."""

import importlib
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from docs import generate
from grpocem_jax.config import Config, parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.tasks import TASKS

ROOT = Path(__file__).parent.parent
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "studies").glob("*.md")]
)


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent that is not a package
        return False


def resolve(name):
    """What the package has under a dotted name; a folder may have the name of a function."""
    parts = name.removeprefix("grpocem_jax.").split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(["grpocem_jax", *parts[:length]])
        if _is_module(module):
            found = importlib.import_module(module)
            for part in parts[length:]:
                found = getattr(found, part)
            return found
    raise AttributeError(name)


def named(text):
    """Dotted names in code font: functions, and settings, which begin with ``config.``."""
    names = set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)(?:=[^`]*)?`", text))
    names = {name for name in names if not name.endswith((".md", ".py", ".c_proj"))}
    settings = {name for name in names if name.startswith("config.")}
    return names - settings, settings


def test_the_reference_of_settings_is_what_the_records_and_configs_make():
    written = generate.TARGET.read_text(encoding="utf-8")
    assert written == generate.reference(), "run make docs"


def test_the_reference_has_every_setting_with_its_meaning_and_the_configs_values():
    text = generate.reference()
    assert "| `seed` | int | from 0 to 2147483647 | Fixes data order" in text
    row = next(line for line in text.splitlines() if line.startswith("| `learning_rate` |"))
    assert row.endswith("| `0.02` | `5e-05` | `0.01` |")
    assert "source `'rajpurkar/squad'`<br>subset `'plain_text'`" in text
    assert "| `budget_s` | float or None |" in text


def blocks(text):
    """Python code of a document."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("code", blocks(EXTENDING))
def test_code_on_extending_runs_and_its_config_holds(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(code, "extending.md", "exec"), names)
    if "get_config" in names:
        (task,) = parse_config(names["get_config"]()).data.tasks
        assert task == "reviews"


def test_the_own_task_of_the_readme_is_a_folder_that_holds(tmp_path, monkeypatch):
    (reward,) = [code for code in blocks(README) if "def right" in code]
    (config,) = [code for code in blocks(README) if "def get_config" in code]
    # A name that no other test imports.
    config = config.replace("my_rewards", "rewards_of_the_readme")
    (tmp_path / "rewards_of_the_readme.py").write_text(reward, encoding="utf-8")
    (tmp_path / "my_config.py").write_text(config, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (own,) = parse_config(load_config("my_config.py")).task("reviews").rewards
    assert own.function(["", ""], ["yes", "no"], sentiment=["yes", "yes"]) == [1.0, -1.0]


def settings_named(text):
    """Settings in code font or as flags: ``section.field`` of a section of the config."""
    found = re.findall(r"(?:`config\.|`|config\.)((\w+)\.(\w+))", text)
    sections = {name for name, kind in Config.__annotations__.items() if kind is not int}
    others = ("forward", "jsonl", "py", "safetensors")  # of files, and a function of `Model`
    return sorted({(s, field) for _, s, field in found if s in sections and field not in others})


def test_settings_that_are_named_for_users_are_there():
    for section, field in settings_named(EXTENDING + FAQ + README):
        fields = Config.__annotations__[section].__annotations__
        own_task = section == "data" and field in (*TASKS, "TASK", "reviews")
        assert field in fields or own_task, (section, field)


def test_functions_and_settings_that_the_method_names_are_there():
    functions, settings = named(METHOD)
    for name in functions:
        assert resolve(name) is not None, name
    for name in settings:
        section, field = name.removeprefix("config.").split(".")
        assert field in Config.__annotations__[section].__annotations__, name


def test_functions_and_equations_of_the_report_name_each_other():
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (.*) \|$", METHOD, re.MULTILINE)
    assert len(rows) == 7
    for numbers, functions in rows:
        docs = ""
        for name in re.findall(r"`([\w.]+)`", functions):
            docs += inspect.getdoc(resolve(name)) + inspect.getmodule(resolve(name)).__doc__
        for number in numbers.split(", "):
            assert re.search(rf"\beqs?\. [\d, and-]*\b{number}\b", docs, re.IGNORECASE), number


def test_the_list_of_dependencies_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {"run": project["dependencies"], **project["optional-dependencies"]}
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    listed = {}
    for section in text.split("\n## ")[1:]:
        title = section.splitlines()[0]
        group = "run" if title == "To run" else title.split("`")[1]
        rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", section, re.MULTILINE)
        listed[group] = [name for name, _ in rows]
    expected = {
        group: sorted(re.match(r"[\w-]+", entry).group() for entry in entries)
        for group, entries in asked.items()
    }
    assert listed == expected


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_and_headings_lead_to_one(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    links += re.findall(r'(?:src|href|srcset)="([^"#]+)"', text)
    for link in links:
        assert "://" in link or (path.parent / link).exists(), link
    for link, heading in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        target = (path.parent / link) if link else path
        lines = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
        assert heading in anchors
