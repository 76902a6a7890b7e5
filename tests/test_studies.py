"""The study of adaptation: its document shows its figures, and a small part of it runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from studies import adaptation, common

ROOT = Path(__file__).parent.parent


def test_the_document_shows_the_figures_that_are_kept(tmp_path):
    results = json.loads((ROOT / adaptation.RESULTS).read_text())
    assert set(results) == set(adaptation.PARTS)
    doc = Path(shutil.copy(ROOT / "docs" / "adaptation.md", tmp_path))
    common.write(doc, adaptation.tables(results))
    assert doc.read_text() == (ROOT / "docs" / "adaptation.md").read_text()


def test_a_document_without_a_place_for_a_table_is_refused(tmp_path):
    doc = tmp_path / "doc.md"
    doc.write_text("<!-- tasks -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="0 places for the table gate"):
        common.write(doc, {"gate": "| |"})


def test_a_task_is_judged_with_and_without_the_gate(monkeypatch):
    monkeypatch.setattr(adaptation, "TASKS", ("classification",))
    study = adaptation.Study(adaptation.load(), 2)

    def adapt(items, seed, settings, space):
        return study.adapt(adaptation.demonstrations(items, "train"), seed, settings, space)

    methods = {"cem": {}, "random search": adaptation.RANDOM}
    small = {"population_size": 4, "generations": 2}
    rows = adaptation._task_rows(study, {"experts": methods}, adapt, **small)
    gated = ", gate at z = 1"
    names = [f"cem{gated}", "cem", f"random search{gated}", "random search"]
    assert [row["method"] for row in rows] == names
    assert {(row["task"], row["space"], row["n"]) for row in rows} == {
        ("classification", "experts", 2)
    }
    for row in rows:
        assert np.all(np.isfinite([row["likelihood"], row["reward"]]))
    assert rows[-1]["reward_over_random"] == rows[-1]["likelihood_over_random"] == (0.0, 0.0)
    assert rows[1]["likelihood"] != rows[-1]["likelihood"]
