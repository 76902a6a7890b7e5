"""The walkthrough: every hop leads to a file that has what it names."""

import ast
import itertools
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
HOP = re.compile(r"^\d+\. \[([^\]]+)\]\(([^)]+)\) ((?:`[\w.]+`(?:, )?)+): \S")
LINES = (DOCS / "walkthrough.md").read_text(encoding="utf-8").splitlines()
HOPS = [line for line in LINES if re.match(r"\d", line)]


def defined(path):
    """Functions, classes and methods (as ``Class.method`` too) of a file, at any depth."""
    names = set()

    def visit(node, owner):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.update({child.name, f"{owner}.{child.name}"})
                visit(child, child.name)
            else:
                visit(child, owner)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return names


@pytest.mark.parametrize("line", HOPS)
def test_a_hop_names_what_its_file_has(line):
    hop = HOP.match(line)
    assert hop, line
    shown, link, names = hop.groups()
    path = (DOCS / link).resolve()
    assert path.as_posix().endswith("grpocem_jax/" + shown.replace("\\", ""))
    assert set(re.findall(r"`([\w.]+)`", names)) <= defined(path)


def test_there_are_five_walks_numbered_from_one():
    starts = [line for line in HOPS if line.startswith("1. ")]
    assert len(starts) == sum(line.startswith("## ") for line in LINES) == 5
    numbers = [int(line.split(".")[0]) for line in HOPS]
    assert all(b in (a + 1, 1) for a, b in itertools.pairwise(numbers))
