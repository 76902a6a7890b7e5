"""``grpocem-compare``: what differs between runs, their gains, their curves, and what is no run."""

import json
import subprocess
import sys

import pytest

from grpocem_jax.compare import compare
from grpocem_jax.report import comparison
from grpocem_jax.report.page import ABSTAINED
from grpocem_jax.utils.errors import InputError
from tests.pages import HOSTILE, Page, config, gain, metric_lines, summary, write_run
from tests.runs import ROOT


@pytest.fixture
def runs(tmp_path):
    """Three runs: two that ended and differ in two settings, and one under way."""
    for name, rate, seed, before in (("a", 0.02, 0, 0.1), ("b", 0.5, 0, 0.2), ("c", 0.5, 7, 0.3)):
        folder = write_run(tmp_path / name, metrics=metric_lines(20 if name == "c" else 30))
        settings = config()
        settings["train"]["learning_rate"], settings["seed"] = rate, seed
        settings["logging"]["interval"] = seed + 1
        (folder / "config.json").write_text(json.dumps(settings))
        gains = {"qa": gain(before, before + 0.25, 0.05, 9), "overall": gain(before, 0.5, 0.1, 9)}
        (folder / "summary.json").write_text(json.dumps({**summary(), "heldout": gains}))
    (tmp_path / "c" / "summary.json").unlink()
    return [str(tmp_path / name) for name in "abc"]


def test_only_settings_that_differ_are_named_with_the_runs_that_have_them(runs):
    found = comparison.differing(comparison.read(runs))
    assert found == {"seed": ["0", "0", "7"], "train.learning_rate": ["0.02", "0.5", "0.5"]}
    text = comparison.show(comparison.read(runs))
    assert "  train.learning_rate: 0.02 (a); 0.5 (b, c)" in text


def test_gains_with_intervals_are_those_of_the_summaries_and_unfinished_runs_are_marked(runs):
    text = comparison.show(comparison.read(runs))
    lines = [line.split() for line in text.splitlines()]
    assert ["c", "UNFINISHED,", "20", "steps"] in lines
    start = lines.index(["overall"])
    assert lines[start + 1] == ["a", "0.100", "0.500", "+0.400", "[+0.300,", "+0.500]", "9"]
    assert lines[start + 2] == ["b", "0.200", "0.500", "+0.300", "[+0.200,", "+0.400]", "9"]
    assert lines[start + 3] == ["qa"]


def test_the_page_is_whole_and_has_the_numbers_of_all_runs(runs, tmp_path):
    out = tmp_path / "compare.html"
    compare(runs, out)
    page = Page(out)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "iframe"})
    assert page.tables["Settings that differ"] == [
        ["setting", "a", "b", "c"],
        ["seed", "0", "0", "7"],
        ["train.learning_rate", "0.02", "0.5", "0.5"],
    ]
    rows = page.tables["Gain in held-out reward, sampled; from and to: 95% interval"]
    assert ["qa, b", "0.2", "0.45", "0.25", "0.2", "0.3", "9"] in rows
    assert "Unfinished, so without held-out reward: c." in page.source
    # 0.4 - 0.1 = 0.3 of the first is not above 0.3 + 0.1 of the second.
    assert "the intervals overlap" in page.source
    for run in "abc":
        assert f"{run} over {20 if run == 'c' else 30} steps" in page.texts["curve_0-text"].replace(
            run.upper(), run
        )
    assert page.source.count("<svg") > 5


def test_names_are_the_shortest_part_of_the_path_that_tells_runs_apart(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("one", "two")]
    assert [run.name for run in comparison.read(list(map(str, folders)))] == ["one/run", "two/run"]


def test_runs_without_a_difference_or_an_end_say_so(tmp_path):
    left = ("summary.json", "metrics.jsonl")
    folders = [str(write_run(tmp_path / name, without=left)) for name in "ab"]
    out = tmp_path / "x.html"
    text = compare(folders, out)
    assert "settings that differ\n  none" in text
    assert "no run has ended" in text
    assert "No run has ended" in out.read_text()
    assert "No step was recorded" in out.read_text()


def test_runs_whose_held_out_rewards_all_abstained_are_not_called_unfinished(runs, tmp_path):
    abstained = json.dumps({**summary(), "heldout": {}, "heldout_greedy": {}})
    (tmp_path / "a" / "summary.json").write_text(abstained)
    out = tmp_path / "x.html"
    compare(runs, out)
    assert "no other run has held-out reward" in out.read_text()
    (tmp_path / "b" / "summary.json").write_text(abstained)
    text = compare(runs, out)
    assert text.count(ABSTAINED) == 2
    assert out.read_text().count(ABSTAINED) == 3
    assert "o run has ended" not in text + out.read_text()


@pytest.mark.parametrize("kind", ["empty", "file", "missing"])
def test_what_is_no_run_is_refused_in_one_sentence_that_names_all_of_it(runs, tmp_path, kind):
    odd = tmp_path / "odd"
    if kind == "empty":
        odd.mkdir()
    elif kind == "file":
        odd.touch()
    with pytest.raises(InputError, match=rf"{odd}: holds no run .*leave it out"):
        compare([*runs, str(odd)], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_one_run_twice_and_one_alone_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match="is given twice"):
        compare([runs[0], runs[0] + "/"], tmp_path / "x.html")
    with pytest.raises(InputError, match="1 folders to compare: give at least two"):
        compare(runs[:1], tmp_path / "x.html")
    with pytest.raises(InputError, match=r"--out=.*cannot be written"):
        compare(runs, tmp_path / "nowhere" / "x.html")


def test_hostile_names_and_files_are_inert(tmp_path):
    metrics = [{**line, f"rewards/{HOSTILE}/mean": 1.0} for line in metric_lines(3)]
    folders = [str(write_run(tmp_path / n, task=HOSTILE, metrics=metrics)) for n in ("<b>$x$", "y")]
    out = tmp_path / "x.html"
    compare(folders, out)
    page = Page(out)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "b"})
    (tmp_path / "y" / "summary.json").write_text(json.dumps({"heldout": {"qa": 3}}))
    with pytest.raises(InputError, match="is not as training writes it"):
        compare(folders, out)


def test_the_module_takes_runs_and_flags_in_any_order(runs, tmp_path):
    out = tmp_path / "x.html"
    command = [sys.executable, "-m", "grpocem_jax.compare", runs[0], "--out", str(out), runs[1]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 runs\n")
    assert out.exists()
