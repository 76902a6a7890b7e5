"""Run directories with made-up numbers for the report pages, and a page taken apart."""

import html.parser
import json

import numpy as np
from safetensors.numpy import save_file

from grpocem_jax.config.files import load_config

TASKS = ["qa", "sentiment"]
HOSTILE = (
    "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>\x1b[31m\u202e$x$"
)
CURVES = {
    "policy_loss": ["policy_loss"],
    "kl_entropy": ["kl", "entropy"],
    "zero_variance": ["frac_reward_zero_std"],
    "grad_norm": ["grad_norm"],
    "learning_rate": ["learning_rate"],
    "completion_length": ["completions/mean_length"],
}


def gain(before, after, half, n):
    return {
        "before": before,
        "after": after,
        "gain": after - before,
        "gain_ci95": [after - before - half, after - before + half],
        "n": n,
    }


def metric_lines(steps=60):
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "reward": rng.normal(), "device_memory_peak_bytes": 10**9 + step}
        line |= {key: rng.normal() for keys in CURVES.values() for key in keys}
        # A step need not have prompts of every task.
        line |= {f"rewards/{task}/mean": rng.normal() for task in TASKS[: 1 + step % 2]}
        lines.append(line)
    return lines


def summary(name="sentiment"):
    overall = gain(0.1, 0.325, 0.04, 8)
    gains = {"qa": gain(-0.3, -0.35, 0.02, 4), name: gain(0.5, 1.0, 0.1, 4), "overall": overall}
    return {
        "heldout": gains,
        "heldout_greedy": {**gains, "overall": gain(0.1, 0.11, 0.04, 8)},
        "data": {
            "qa": {"source": "builtin", "train": 1234, "heldout": 4},
            name: {"source": "/data/" + name, "train": 50, "heldout": 4},
        },
        "builtin_model": True,
        "random_weights": False,
        "builtin_data": {"qa": True, name: False},
        "steps": 60,
        "model": "builtin",
        "total_parameters": 714_000,
        "platform": "cpu",
        "device": "cpu",
        "seconds": 100.0,
        "train_seconds": 60.0,
        "compile_seconds": 20.0,
        "python": "3.11",
        "versions": {"jax": "0.10.2"},
    }


def evaluated():
    search = {"fitness_before": -2.5, "fitness_after": -2.25, "adapted": 0.5, "searches": 4}
    return {
        **{key: summary()[key] for key in ("heldout", "heldout_greedy")},
        "adaptation": {"qa": {**search, "heldout_before": -1.5, "heldout_after": -1.75}},
        "convergence": {
            "best": [-2.0, -1.5, -1.25],
            "mean": [-3.0, -2.5, None],
            "running": [4, 4, 1],
        },
        "cem": {
            "fitness": "likelihood",
            "support": 0,
            "method": "cem",
            "population_size": 100,
            "space": "full",
            "gate": True,
        },
    }


def config():
    return load_config("tiny").to_dict()


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def offsets():
    rng = np.random.default_rng(1)
    return {f"h.{i}.attn.c_proj": rng.normal(size=6).astype(np.float32) for i in range(3)}


def spectra():
    return {
        name: np.float32([8, 7, 6, 5, 4, 3, 2, 1]) * (1 + i) for i, name in enumerate(offsets())
    }


def write_run(folder, *, without=(), metrics=None, task="sentiment", text="fine"):
    """A run directory with every file but those of ``without``."""
    (folder / "adapter").mkdir(parents=True)
    heldout = [
        {
            "task": name,
            "prompt": f"{text} prompt {number}",
            **{f"reward_{when}": 0.5 for when in ("before", "after")},
            **{f"completion_{when}": text for when in ("before", "after")},
            "greedy_before": f"{text} before {number}",
            "greedy_after": f"{text} after {number}",
            "greedy_reward_before": -0.25 * number,
            "greedy_reward_after": None if number else 0.125,
        }
        for name in ("qa", task)
        for number in range(4)
    ]
    for name, content in {
        "config.json": config(),
        "summary.json": summary(task),
        "evaluation.json": evaluated(),
    }.items():
        (folder / name).write_text(json.dumps(content))
    write_lines(folder / "metrics.jsonl", metric_lines() if metrics is None else metrics)
    write_lines(folder / "heldout.jsonl", heldout)
    save_file(offsets(), folder / "adapter" / "adapter_model.safetensors")
    save_file(spectra(), folder / "spectrum.safetensors")
    for name in without:
        (folder / name).unlink()
    return folder


class Page(html.parser.HTMLParser):
    """A page taken apart: elements, tables by caption, texts of elements by identifier."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.tables, self.texts = [], {}, {}
        self._open, self._table = [], None
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.elements.append((tag, values))
        if tag in ("meta", "link", "img", "br"):
            return
        self._open.append((tag, values.get("id")))
        if tag == "table":
            self._table = {"caption": "", "rows": []}
        elif tag == "tr":
            self._table["rows"].append([])
        elif tag in ("th", "td"):
            self._table["rows"][-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass
        if tag == "table":
            self.tables[self._table["caption"]] = self._table["rows"]
            self._table = None

    def handle_data(self, data):
        for _, name in self._open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data
        tag = self._open[-1][0] if self._open else ""
        if tag == "caption":
            self._table["caption"] += data
        elif tag in ("th", "td"):
            self._table["rows"][-1][-1] += data

    def text(self, name):
        return " ".join(self.texts[name].split())
