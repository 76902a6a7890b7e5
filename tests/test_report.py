"""The report page: its numbers, its words, what it does with hostile text, and in a browser."""

import functools
import itertools
import json
import math
import operator
import re
import types
from pathlib import Path

import numpy as np
import pytest

from grpocem_jax import adaptation, adapters, report
from grpocem_jax.adaptation import tables
from grpocem_jax.report import courses, plots, record, sites
from grpocem_jax.report import page as page_module
from grpocem_jax.search import loop
from grpocem_jax.training import evaluation
from grpocem_jax.utils.errors import InputError
from tests.browser import CONTRAST
from tests.pages import (
    CURVES,
    HOSTILE,
    TASKS,
    Page,
    metric_lines,
    offsets,
    summary,
    write_lines,
    write_run,
)

ROOT = Path(__file__).parent.parent


FILES = (
    "summary.json", "metrics.jsonl", "heldout.jsonl", "evaluation.json", "spectrum.safetensors",
    "adapter/adapter_model.safetensors",
)  # fmt: skip
PLOTS = {
    *CURVES, "heldout", "heldout_greedy", "reward", "memory", "data", "spectrum", "offsets",
    "cem_convergence", "adapted_heldout", "adapted_heldout_greedy",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return Page(run / "report" / "index.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run whose texts and names do what they can to break it."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    metrics = [{**line, f"rewards/{HOSTILE}/mean": 1.0} for line in metric_lines(3)]
    return report.write(write_run(folder, text=HOSTILE * 3, task=HOSTILE, metrics=metrics))


def numbers(rows):
    """The cells of a table without its header; a dash is NaN."""
    cells = [[cell.replace(",", "") for cell in row] for row in rows[1:]]
    return np.array([[math.nan if c == "–" else float(c) for c in row] for row in cells])


def titles(page):
    return {name: page.text(f"{name}-title") for name in PLOTS if f"{name}-title" in page.texts}


# Numbers


@pytest.mark.parametrize("panel", CURVES)
def test_the_table_of_a_curve_is_metrics_jsonl(page, panel):
    found = numbers(page.tables[titles(page)[panel]])
    lines = metric_lines()
    expected = [[line["step"], *(line[key] for key in CURVES[panel])] for line in lines]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_table_of_rewards_leaves_out_tasks_that_a_step_did_not_have(page):
    found = numbers(page.tables["Reward by task"])
    keys = ["step", "reward", *(f"rewards/{task}/mean" for task in TASKS)]
    expected = [[line.get(key, math.nan) for key in keys] for line in metric_lines()]
    assert np.isnan(expected).sum() == 30
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_memory_is_in_gigabytes(page):
    found = numbers(page.tables["Memory"])
    np.testing.assert_allclose(found[:, 1], [1.0 + step * 1e-9 for step in range(1, 61)], rtol=1e-5)


@pytest.mark.parametrize(
    ("panel", "key"), [("heldout", "heldout"), ("heldout_greedy", "heldout_greedy")]
)
def test_the_tables_of_held_out_reward_are_those_of_the_summary(page, panel, key):
    caption = f"{titles(page)[panel]}; from and to: 95% interval of the gain"
    rows = page.tables[caption]
    expected = [
        [g["before"], g["after"], g["gain"], *g["gain_ci95"], g["n"]]
        for g in summary()[key].values()
    ]
    assert [row[0] for row in rows[1:]] == [*TASKS, "overall"]
    np.testing.assert_allclose(numbers([row[1:] for row in rows]), expected, rtol=1e-5)


def test_the_tables_of_data_and_adapter_are_those_of_their_files(page):
    assert page.tables["Prompts by task"][1:] == [
        ["qa", "builtin", "1,234", "4"],
        ["sentiment", "/data/sentiment", "50", "4"],
    ]
    rows = page.tables["Offsets by layer"][1:]
    assert [row[0] for row in rows] == list(offsets())
    for row, x in zip(rows, offsets().values(), strict=True):
        expected = [6, np.sqrt(np.mean(x**2)), x.min(), np.median(x), x.max()]
        np.testing.assert_allclose([float(c) for c in row[1:]], expected, rtol=1e-5)
    # Six of eight values are trained: the sixth of the second site is 3 x 2.
    assert page.tables["Spectrum by layer"][2][1:] == ["8", "6", "16", "6", "2"]


def test_the_tables_of_adaptation_are_those_of_the_evaluation(page):
    caption = "CEM convergence: log-likelihood per token (nats)"
    assert page.tables[caption][1:] == [
        ["1", "-2", "-3", "4"],
        ["2", "-1.5", "-2.5", "4"],
        ["3", "-1.25", "–", "1"],
    ]
    (row,) = page.tables["Searches by task: means, with log-likelihoods per token in nats"][1:]
    assert row == ["qa", "-2.5", "-2.25", "0.5", "–", "–", "–", "–", "-1.5", "-1.75", "4"]


def test_a_curve_in_words_has_its_ends_and_extremes():
    text = courses.course("loss", np.arange(1, 6), np.array([0.031, math.nan, 0.5, 0.008, 0.012]))
    assert text == (
        "loss over 4 steps: 0.031 at first, 0.012 at last, lowest 0.008 at step 4, "
        "highest 0.5 at step 3."
    )


def test_every_plot_has_its_numbers_in_words(page):
    for panel, keys in CURVES.items():
        for key in keys:
            values = [line[key] for line in metric_lines()]
            text = page.text(f"{panel}-text")
            assert f"lowest {min(values):.3g}" in text
            assert f"highest {max(values):.3g}" in text
    assert "qa -0.300 to -0.350, gain -0.050 [-0.070, -0.030]" in page.text("heldout-text")
    assert "sentiment 0.500 and 1.000" in page.text("reward-text")
    searches = page.text("cem_convergence-text")
    assert "Best of a generation: -2.000 in the first generation, -1.250" in searches
    assert "CEM, 100 candidates a generation, over all offsets, with the gate" in searches
    assert "3 of them ended earlier" in searches
    assert "18 of 24 singular values at 3 sites" in page.text("spectrum-text")


def test_the_head_says_what_came_of_it_and_what_not_to_believe(page):
    head = " ".join(re.sub("<[^>]*>", " ", page.source[: page.source.index("<main")]).split())
    assert "from 0.100 to 0.325, a gain of +0.225 [+0.185, +0.265] (95% interval, 8 prompts" in head
    assert "training raised it. Lower than before: qa." in head
    # The greedy interval, 0.01 +- 0.04, includes zero.
    assert "the interval includes zero" in head
    assert "tiny one that comes with the package" in head
    assert "Built-in data, generated from templates: qa." in head
    assert "random weights" not in head
    for fact in (
        "714,000 parameters",
        "18 offsets of singular values at attn.c_proj",
        "cpu (cpu), float32",
        "jax 0.10.2",
    ):
        assert fact in head


def test_samples_have_their_texts_rewards_and_changes(page):
    text = page.text("samples")
    for number in range(4):
        assert f"fine prompt {number}" in text
        assert f"fine before {number}" in text
        assert f"fine after {number}" in text
    assert "Before reward -0.25" in text
    assert "After reward 0.125" in text
    assert "After reward –" in text
    assert "reward +0.125" in text


def judged(task, changes):
    """Lines of heldout.jsonl; a change of None is a completion without a reward after."""
    return [
        {
            "task": task,
            "prompt": f"{task} {number}",
            "greedy_before": "a",
            "greedy_after": "b",
            "greedy_reward_before": 0.25,
            "greedy_reward_after": None if change is None else 0.25 + change,
        }
        for number, change in enumerate(changes)
    ]


def test_samples_are_the_first_and_the_largest_changes_ranked_both_ways(tmp_path):
    count = page_module.SAMPLES + 2 * page_module.EXTREMES + 10
    changes = [0.0] * count
    changes[0], changes[1], changes[-1], changes[-2], changes[-3] = None, 0.25, -0.5, 0.75, 0.125
    run = read(tmp_path)
    run.heldout[:] = [*judged("one", changes), *judged("two", [0.5, -0.25])]
    tasks, found = page_module.samples(run)
    assert tasks == ["one", "two"]
    prompts = [sample.prompt for sample in found]
    assert prompts[: page_module.SAMPLES] == [f"one {n}" for n in range(page_module.SAMPLES)]
    assert {f"one {count - n}" for n in (1, 2, 3)} < set(prompts)
    assert len(found) < count
    best = [s.prompt for s in sorted(found, key=lambda s: s.gain_rank)]
    assert best[:4] == [f"one {count - 2}", "two 0", "one 1", f"one {count - 3}"]
    assert best[-1] == "one 0"
    worst = [s.prompt for s in sorted(found, key=lambda s: s.loss_rank)]
    assert worst[:2] == [f"one {count - 1}", "two 1"]
    assert worst[-1] == "one 0"
    assert [s.place for s in found] == list(range(len(found)))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_breaks_of_samples_are_line_breaks_and_other_controls_are_escapes(tmp_path, end):
    run = read(tmp_path, text=f"first{end}second\tthird")
    _, (sample, *_) = page_module.samples(run)
    assert sample.prompt == "first\nsecond\\tthird prompt 0"
    assert sample.after == "first\nsecond\\tthird after 0"


def test_the_head_has_command_commit_and_steps_per_second(tmp_path):
    lines = [
        {**line, "step_time": seconds, "num_tokens": 100 * line["step"]}
        for line, seconds in zip(metric_lines(3), (9.0, 0.5, 0.4), strict=True)
    ]
    folder = write_run(tmp_path / "run", metrics=lines)
    started = {"command": "grpocem-train --config '<b>'", "version": "9.8", "commit": "abc-dirty"}
    (folder / "run.json").write_text(json.dumps(started))
    facts = dict(page_module.facts(record.read(folder)))
    # The median step took 0.5 s, and each step has 100 tokens.
    assert facts["Speed"] == "2 steps per second (0.5 s each), 200 tokens per second"
    assert facts["Code"] == "grpocem_jax 9.8, commit abc-dirty"
    assert facts["Command"] == started["command"]
    source = report.write(folder).read_text()
    assert "&#39;&lt;b&gt;&#39;" in source


def test_the_overall_curve_is_beside_those_of_several_tasks(tmp_path):
    assert "overall" in drawn(courses.rewards(read(tmp_path))).svg
    single = [{k: v for k, v in x.items() if "rewards/sent" not in k} for x in metric_lines()]
    run = read(tmp_path / "single", metrics=single)
    assert "overall" not in drawn(courses.rewards(run)).svg


# Files


def test_the_page_is_whole_by_itself_and_each_plot_is_a_png_beside_it(run, page):
    names = {path.name for path in (run / "report").iterdir()}
    assert names == {"index.html", *(f"{name}.png" for name in PLOTS)}
    for name in PLOTS:
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    for tag, values in page.elements:
        assert tag not in ("script", "img", "iframe", "object", "embed")
        for key in ("src", "href", "xlink:href"):
            assert values.get(key, "#").startswith(("#", "data:,"))


def test_the_same_run_gives_the_same_bytes(run):
    before = {path: path.read_bytes() for path in (run / "report").iterdir()}
    report.write(run)
    assert {path: path.read_bytes() for path in (run / "report").iterdir()} == before


def test_identifiers_are_unique_and_references_resolve(page):
    names = [values["id"] for _, values in page.elements if "id" in values]
    assert len(names) == len(set(names))
    references = set(re.findall(r"url\(#([^)]+)\)", page.source))
    for _, values in page.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            references |= {values[key]} if key in values else set()
        for key in ("href", "xlink:href"):
            if values.get(key, "").startswith("#"):
                references.add(values[key][1:])
    assert references <= set(names)


def test_plots_have_only_colours_that_follow_the_page(page):
    drawn = page.source[page.source.index("<main") :]
    assert drawn.count("var(--hue0)") > 10
    assert re.findall(r"(?:fill|stroke): (?!none|var\(|url\()[^;\"]+", drawn) == []


# Hostile text


def test_hostile_text_is_inert_and_escapes_are_visible(hostile):
    page = Page(hostile)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img"}
    assert not any(key.startswith("on") for _, values in page.elements for key in values)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page.source)
    assert "&lt;script&gt;" in page.source
    assert r"\x1b[31m\u202e$x$ before 0" in page.text("samples")


# What is missing


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The page of a run of which only the config is there."""
    folder = write_run(tmp_path_factory.mktemp("bare") / "run", without=FILES)
    return Page(report.write(folder)), folder


@pytest.mark.parametrize(
    ("panels", "sentence"),
    [
        ([*CURVES, "reward", "memory"], "No step was recorded"),
        (["heldout", "heldout_greedy"], "there is no summary.json"),
        (["data"], "does not say how many prompts"),
        (["spectrum"], "no singular values"),
        (["offsets"], "no trained adapter"),
        (["cem_convergence"], "No adaptation was evaluated"),
        (["cem_convergence"], "grpocem-adapt --workdir {run} --evaluate"),
        (["samples"], "there is no heldout.jsonl"),
    ],
)
def test_a_panel_without_its_file_is_a_sentence(bare, panels, sentence):
    page, folder = bare
    for name in panels:
        assert sentence.format(run=folder) in page.text(name)


def test_a_page_without_plots_has_none_and_says_that_training_has_not_finished(bare):
    page, folder = bare
    assert [path.name for path in (folder / "report").iterdir()] == ["index.html"]
    assert "svg" not in {tag for tag, _ in page.elements}
    assert "Training has not finished" in page.source


def test_a_run_whose_rewards_all_abstained_is_not_called_unfinished(tmp_path):
    folder = write_run(tmp_path / "run")
    none = np.full(4, np.nan)
    gains = evaluation.compare(["qa"], ["qa"] * 4, none, none)
    for name in ("summary.json", "evaluation.json"):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**stored, "heldout": gains}))
    page = Page(report.write(folder))
    assert "not finished" not in page.source
    assert "no summary.json" not in page.source
    said = "all reward functions abstained"
    for panel in ("heldout", "adapted_heldout"):
        assert said in page.text(panel)
    found = page_module.conclusions(record.read(folder))
    # Greedy completions had rewards.
    assert [said in sentence for sentence in found] == [True, False]
    assert "held-out reward of sampled completions" in found[0]


def test_the_command_makes_the_page_again(run_command, bare):
    _, folder = bare
    page = folder / "report" / "index.html"
    before = page.read_bytes()
    page.unlink()
    status, out, err = run_command("report", "--workdir", folder)
    assert status == 0, err
    assert out.strip() == str(page)
    assert page.read_bytes() == before


def test_an_adapter_on_its_own_has_a_page(tmp_path):
    without = {*FILES, "config.json"} - {"adapter/adapter_model.safetensors"}
    page = Page(report.write(write_run(tmp_path / "run", without=without)))
    assert list(page.tables) == ["Offsets by layer", "Settings of the run"]


def read(folder, **options):
    return record.read(write_run(folder / "run", **options))


def drawn(panel):
    return plots.render(panel.name, panel.draw, height=panel.height)


def test_a_metric_that_is_missing_leaves_the_others_of_its_panel(tmp_path):
    lines = [{k: v for k, v in line.items() if k != "kl"} for line in metric_lines()]
    names = {"kl": "KL divergence", "entropy": "entropy"}
    panel = courses.curves(read(tmp_path, metrics=lines), "panel", "Panel", names)
    assert panel.table.columns == ["step", "entropy"]
    assert panel.text.endswith("metrics.jsonl has no kl.")
    assert drawn(panel).svg.count("entropy") == 1


def test_a_metric_that_is_not_there_is_a_sentence(tmp_path):
    left = ("policy_loss", "device_memory_peak_bytes")
    lines = [{k: v for k, v in line.items() if k not in left} for line in metric_lines()]
    run = read(tmp_path, metrics=lines)
    panel = courses.curves(run, "policy_loss", "Policy loss", {"policy_loss": "policy loss"})
    assert panel.draw is None
    assert panel.text == "There is nothing to draw: metrics.jsonl has no policy_loss."
    (memory,) = [p for s in page_module.sections(run) for p in s.panels if p.name == "memory"]
    assert memory.draw is None
    assert memory.text == "The backend of this run (cpu) does not report memory."


def test_a_single_step_is_drawn(tmp_path):
    run = read(tmp_path, metrics=metric_lines(1))
    panel = courses.curves(run, "loss", "Loss", {"policy_loss": "loss"})
    assert "over 1 step:" in panel.text
    assert "<use" in drawn(panel).svg
    assert "<use" in drawn(courses.rewards(run)).svg


def test_reward_on_validation_prompts_is_drawn_where_it_was_measured(tmp_path):
    metrics = metric_lines(6)
    without = drawn(courses.rewards(read(tmp_path / "without", metrics=metrics))).svg
    metrics[1]["eval_reward"], metrics[3]["eval_reward"], metrics[5]["eval_reward"] = 0.1, 0.4, 0.3
    panel = courses.rewards(read(tmp_path, metrics=metrics))
    assert (
        "Reward on validation prompts over 3 steps: 0.1 at first, 0.3 at last, lowest 0.1 at step "
        "2, highest 0.4 at step 4."
    ) in panel.text
    assert panel.table.columns[:3] == ["step", "all", "validation, all"]
    assert [row[2] for row in panel.table.rows[:3]] == ["–", "0.1", "–"]
    assert "validation, all" in drawn(panel).svg
    assert "validation, all" not in without


def test_random_weights_are_named(tmp_path):
    run = read(tmp_path)
    run.summary.update(random_weights=True, builtin_model=False, builtin_data={})
    (notice,) = page_module.notices(run)
    assert notice.startswith("The model has random weights")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run; give a folder"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        (
            "metrics.jsonl",
            '{"step": 1}\n{"step": ',
            "metrics.jsonl, line 2: cannot be read as JSON",
        ),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1: is no JSON object"),
        ("summary.json", "", "summary.json: cannot be read as JSON"),
        ("spectrum.safetensors", "text", "spectrum.safetensors: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, fragment):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        report.write(folder)
    assert fragment in str(error.value)


def test_a_page_that_cannot_be_written_leaves_the_run_whole(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    folder = write_run(tmp_path / "run")
    before = (folder / "summary.json").read_bytes()
    monkeypatch.setattr(page_module, "make", lambda run: ("", {}))
    monkeypatch.setattr(report, "write_bytes", full)
    with pytest.raises(InputError, match=r"\(No space left on device\), but the run is whole"):
        report.write(folder)
    assert (folder / "summary.json").read_bytes() == before


# Long runs


def test_a_long_run_is_thinned_and_says_so_but_keeps_its_extremes(tmp_path):
    lines = metric_lines(5000)
    lines[1233]["policy_loss"], lines[2341]["policy_loss"] = 99.0, -99.0
    page = Page(report.write(write_run(tmp_path / "run", metrics=lines)))
    (caption,) = [name for name in page.tables if name.startswith("Policy loss")]
    assert caption.endswith(
        "one of every 5 of 5,000 steps, and the lowest and highest; all are in metrics.jsonl"
    )
    found = numbers(page.tables[caption])
    assert found[:, 0].tolist() == sorted({*range(1, 5000, 5), 1234, 2342, 5000})
    assert "lowest -99 at step 2342, highest 99 at step 1234" in page.text("policy_loss-text")
    assert len(page.source) < 2_000_000


def test_a_moving_mean_skips_what_is_missing_and_shrinks_at_the_ends():
    values = np.array([1.0, 2.0, math.nan, 6.0, math.nan, math.nan, math.nan])
    expected = [1.5, 1.5, 4.0, 6.0, 6.0, math.nan, math.nan]
    np.testing.assert_allclose(courses.moving_mean(values, 3), expected)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("h.3.attn.c_proj", (3, "attn.c_proj")),
        ("layers.12.mlp/a", (12, "mlp.a")),
        ("head", (7, "head")),
    ],
)
def test_the_layer_is_the_number_in_the_name_of_a_site(site, expected):
    assert sites.layer_and_kind(site, 7) == expected


# What a run writes for the page


def test_singular_values_are_those_of_the_kernels_of_svf_sites_only(tiny):
    found = adapters.singular_values(tiny.factored, tiny.sites)
    assert list(found) == list(tiny.sites)
    for name, path in tiny.sites.items():
        kernel = functools.reduce(operator.getitem, path, tiny.params)
        expected = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    assert adapters.singular_values(tiny.params, tiny.sites) == {}


def adapted(best, mean):
    empty = np.zeros(len(best))
    history = loop.History(np.array(best), np.array(mean), empty, empty)
    search = types.SimpleNamespace(history=history)
    return adaptation.Adaptation({}, 0.0, 0.0, search)


def test_a_search_that_ended_early_counts_with_its_last_values():
    found = tables.convergence(
        [
            adapted([1.0, 3.0], [0.0, 1.0]),
            adapted([2.0, 4.0, 6.0], [-math.inf, 3.0, 4.0]),
            adaptation.Adaptation({}, 0.0, 0.0, None),
        ]
    )
    assert found == {
        "best": [1.5, 3.5, 4.5],
        "mean": [0.0, 2.0, 2.5],
        "running": [2, 2, 1],
    }
    assert tables.convergence([]) == {"best": [], "mean": [], "running": []}


def test_records_pair_each_prompt_with_its_own_texts_and_rewards():
    task, example = types.SimpleNamespace(name="qa"), types.SimpleNamespace(prompt="Q")
    items = [types.SimpleNamespace(task=task, example=example)] * 2
    before = evaluation.Judged(
        np.array([0.5, np.nan]), [["a", "b"], ["c", "d"]], np.array([1.0, -1.0]), [["e"], ["f"]]
    )
    after = before._replace(rewards=np.array([0.75, 0.25]), texts=[["g", "h"], ["i", "j"]])
    first, second = evaluation.records(items, before, after)
    assert first == {
        "task": "qa", "prompt": "Q",
        "reward_before": 0.5, "completion_before": "a",
        "greedy_reward_before": 1.0, "greedy_before": "e",
        "reward_after": 0.75, "completion_after": "g",
        "greedy_reward_after": 1.0, "greedy_after": "e",
    }  # fmt: skip
    assert second["reward_before"] is None
    assert second["completion_after"] == "i"


# In a browser


def test_the_browser_asks_for_nothing_else_and_reports_no_error(hostile, visit):
    shown = visit(hostile)
    assert shown.problems == []
    assert shown.requests == [hostile.as_uri()]
    assert shown.evaluate("window.harmed") is None


def test_every_panel_is_drawn_with_something_in_it(run, visit):
    boxes = visit(run / "report" / "index.html").evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('.panel svg')].map(svg => [
            svg.closest('.panel').id,
            [svg, ...svg.querySelectorAll('path, use, text')].map(
                x => x.getBoundingClientRect()).map(box => Math.max(box.width, box.height)),
        ]))"""
    )
    assert boxes.keys() == PLOTS
    for name, (whole, *parts) in boxes.items():
        assert whole > 300, name
        assert sum(size > 0 for size in parts) > 10, name


def test_samples_are_filtered_by_task_and_sorted_by_change(tmp_path, visit):
    folder = write_run(tmp_path / "run")
    write_lines(folder / "heldout.jsonl", [*judged("a", [0.0, 0.5]), *judged("b", [-0.5, 0.25])])
    shown = visit(report.write(folder))

    def prompts():
        """Prompts from the top, of what can be seen."""
        return shown.evaluate(
            """() => [...document.querySelectorAll('.sample')].filter(x => x.offsetParent)
                .sort((x, y) => x.getBoundingClientRect().top - y.getBoundingClientRect().top)
                .map(x => x.querySelector('.prompt').innerText.replace(/^Prompt: */, ''))"""
        )

    assert [x.strip() for x in prompts()] == ["a 0", "a 1", "b 0", "b 1"]
    shown.get_by_label("largest gain first").check()
    assert [x.strip() for x in prompts()] == ["a 1", "b 1", "a 0", "b 0"]
    shown.get_by_label("b", exact=True).check()
    assert [x.strip() for x in prompts()] == ["b 1", "b 0"]
    shown.get_by_label("largest loss first").check()
    assert [x.strip() for x in prompts()] == ["b 0", "b 1"]
    assert shown.problems == []


def test_labels_of_ticks_can_be_read_on_a_phone(run, visit):
    sizes = visit(run / "report" / "index.html", 375).evaluate(
        """() => [...document.querySelectorAll('.panel svg text')].map(x =>
            parseFloat(getComputedStyle(x).fontSize)
            * x.ownerSVGElement.getBoundingClientRect().width
            / x.ownerSVGElement.viewBox.baseVal.width)"""
    )
    assert len(sizes) > 50
    assert min(sizes) >= 11.5


@pytest.mark.parametrize("width", [360, 700, 1280])
def test_no_width_needs_scrolling_sideways(hostile, visit, width):
    shown = visit(hostile, width)
    shown.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == width


STYLES = """() => {
    const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
    return {
        page: of('body', 'backgroundColor'), ground: of('.panel', 'backgroundColor'),
        text: of('.panel h3', 'color'), caption: of('figcaption', 'color'),
        link: of('summary', 'color'), label: of('svg text', 'fill'),
        curve: of('#learning_rate svg path[style*="hue0"]', 'stroke'),
    };
}"""


def test_light_and_dark_differ_and_both_can_be_read(run, visit):
    found = {}
    for scheme in ("light", "dark"):
        shown = visit(run / "report" / "index.html", scheme=scheme)
        found[scheme] = shown.evaluate(STYLES)
        ground = found[scheme]["ground"]
        for name, least in {
            "text": 7,
            "caption": 4.5,
            "link": 4.5,
            "label": 4.5,
            "curve": 3,
        }.items():
            contrast = shown.evaluate(CONTRAST, [found[scheme][name], ground])
            assert contrast >= least, (scheme, name)
    assert all(found["light"][name] != found["dark"][name] for name in found["light"])


def test_the_keyboard_reaches_the_content_and_the_tables(run, visit):
    shown = visit(run / "report" / "index.html")
    shown.keyboard.press("Tab")
    focused = "document.activeElement.getBoundingClientRect().top"
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert shown.evaluate(focused) >= 0
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "content"
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Numbers of Sampled at T = 1"
    shown.keyboard.press("Enter")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.getAttribute('role')") == "region"
    assert shown.evaluate(f"{focused} >= 0")


def test_a_screen_reader_finds_landmarks_headings_and_what_plots_say(run, visit):
    shown = visit(run / "report" / "index.html")
    for role in ("banner", "main", "contentinfo"):
        assert shown.get_by_role(role).count() == 1
    assert shown.get_by_role("navigation", name="Sections").count() == 1
    levels = shown.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].map(x => Number(x.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    plot = shown.get_by_role("img", name="Policy loss", exact=True)
    assert plot.count() == 1
    described = plot.get_attribute("aria-describedby")
    assert shown.locator(f"#{described}").inner_text().startswith("Policy loss over 60 steps: ")
