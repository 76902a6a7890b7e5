"""The public API: every name is there, the parts need no Flax, and README's example runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import grpocem_jax

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_there_and_documented():
    for name in grpocem_jax.__all__:
        assert getattr(grpocem_jax, name).__doc__, name


def test_imports_lists_and_lazy_names_of_the_package_agree():
    tree = ast.parse(Path(grpocem_jax.__file__).read_text(encoding="utf-8"))
    (lazy,) = [node for node in tree.body if isinstance(node, ast.If)]  # TYPE_CHECKING

    def imported(body):
        found = [node for node in body if isinstance(node, ast.ImportFrom)]
        found = [node for node in found if node.module != "typing"]
        return {
            a.name: a.name if n.module == "grpocem_jax" else n.module.removeprefix("grpocem_jax.")
            for n in found
            for a in n.names
        }

    assert imported(lazy.body) == grpocem_jax._LAZY
    names = [*imported(tree.body), *imported(lazy.body)]
    assert sorted(names) == sorted(grpocem_jax.__all__)


@pytest.fixture(scope="module")
def fresh():
    """What a new process prints: names that completion shows, and what the parts have imported."""
    code = (
        "import sys, grpocem_jax; print(*dir(grpocem_jax));"
        "import grpocem_jax.grpo, grpocem_jax.models.sampling;"
        "import grpocem_jax.adapters.svf, grpocem_jax.search.evosax;"
        "print(sorted({'flax', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_completion_shows_names_that_are_not_imported_yet(fresh):
    names, _ = fresh
    assert set(grpocem_jax.__all__) <= set(names.split())


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = grpocem_jax.nonsense


def test_adapters_sampling_grpo_and_cem_import_no_flax_and_no_transformers(fresh):
    _, imported = fresh
    assert imported == "[]"


def test_the_example_of_the_readme_runs():
    codes = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [code for code in codes if "load_model" in code]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    gradient = names["gradient"]
    assert set(gradient) == {f"h.{i}.attn.c_proj" for i in range(4)}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
    value = names["log_likelihood"](names["offsets"])
    assert -5.0 < float(value) < -0.1


def test_imports_point_down_the_layout():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    layout = text[text.index("    grpocem_jax/\n") : text.index("Imports point down this")]
    names = [re.match(r" {6}(?:\S+(?:\.py|/) ?)+", line) for line in layout.splitlines()]
    layers = [re.findall(r"(\w+)(?:\.py|/)", found.group()) for found in names if found]
    level = {name: depth for depth, layer in enumerate(layers) for name in layer}
    package = ROOT / "grpocem_jax"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert modules == set(level)
    upward = []
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if own == "__init__" or not isinstance(node, ast.ImportFrom):
                continue
            parts = (node.module or "").split(".")
            if parts[0] == "grpocem_jax":
                used = [parts[1]] if parts[1:] else [alias.name for alias in node.names]
                upward += [(own, name) for name in used if level[name] < level[own]]
    assert upward == []
