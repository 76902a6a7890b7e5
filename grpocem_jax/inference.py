"""What ``adapt.py`` does: reads prompts and examples, adapts, and shows what came of it."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from grpocem_jax import adaptation, checkpoints, report, rollouts, screens, tables
from grpocem_jax.adaptation import Adaptation, Text, TrainedRun
from grpocem_jax.data import load_data
from grpocem_jax.errors import InputError
from grpocem_jax.files import is_file, write_json, writing
from grpocem_jax.search.loop import History
from grpocem_jax.tasks import SourceConfig, example_of
from grpocem_jax.tasks.rows import file_rows
from grpocem_jax.terminal import visible


def run(
    settings: ml_collections.ConfigDict,
    *,
    workdir: str | None,
    prompt: str | None = None,
    prompts: str | None = None,
    examples: str | None = None,
    heldout: str | None = None,
    evaluate: bool = False,
    save: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Runs the command; arguments are its flags.

    Returns:
      what ``--json`` prints.

    Raises:
      InputError: flags that contradict each other, and whatever loading and adapting raise.
    """
    if not workdir:
        raise InputError("--workdir is missing; give a run directory with a trained adapter.")
    if save == "":
        raise InputError("--save='': is no folder; give one, or leave the flag out.")
    given = [f"--{n}" for n, v in (("prompt", prompt), ("prompts", prompts)) if v is not None]
    if evaluate and (given or examples or heldout or save):
        extra = given or [n for n, v in (("--examples", examples), ("--heldout", heldout)) if v]
        raise InputError(
            f"--evaluate takes its prompts from the config; leave out {(extra or ['--save'])[0]}."
        )
    if len(given) > 1:
        raise InputError("--prompt and --prompts are both given; give one of them.")
    if save and not examples and prompts:
        raise InputError("--save needs one adapter, but --prompts makes one for each prompt.")
    texts: list[str] = []
    if not evaluate:
        texts = _read_prompts(prompt, prompts, optional=examples is not None)
    trained = adaptation.load_run(workdir, settings)
    if evaluate and not os.access(workdir, os.W_OK):
        raise InputError(
            f"--workdir={workdir}: --evaluate writes evaluation.json and report/ there, which is "
            "not allowed; copy the run to a folder of yours."
        )
    if trained.config.cem.fitness == "reward" and not evaluate:
        if examples is None:
            raise InputError(
                "config.cem.fitness='reward' needs --examples: prompts of the task in cem.task, "
                "with the columns its reward reads."
            )
        if not trained.config.cem.task:
            raise InputError(
                "config.cem.task='': name the task whose reward scores completions of --examples: "
                f"{', '.join(trained.config.data.tasks)}."
            )
    # What cannot be used is refused before the first search.
    for text in texts:
        adaptation.count_tokens(trained, text)
    judged = [] if heldout is None else _texts(Path(heldout))
    for judge in judged:
        adaptation.encode(trained.policy, judge, trained.config.cem)
    if save:
        _make_folder(Path(save))
    print(visible(screens.adapting(trained, workdir)), file=sys.stderr, flush=True)
    if evaluate:
        result = _evaluate(trained)
    else:
        results = []
        pairs = (
            _adapt_each(trained, texts)
            if examples is None
            else _adapt_to_file(trained, texts, Path(examples))
        )
        for found, text in pairs:
            results.append(_record(trained, found, text, judged))
            if not as_json:
                print(visible(screens.adapted(results[-1])), flush=True)
        result = {"results": results} if prompts else results[0]
        if save:
            config = trained.policy.adapter_config(trained.config.adapter)
            card = screens.adapted_card(trained, results[-1])
            with writing(f"--save={save}", "give another folder"):
                checkpoints.save_adapter(Path(save), found.adapter, config, card)
            print(visible(f"adapter saved in {save}"), file=sys.stderr)
    if as_json:
        # In ASCII: what moves a cursor or turns the writing direction is an escape of JSON's own.
        print(json.dumps(result, allow_nan=False))
    elif evaluate:
        print(visible(tables.show(result, trained.config)))
    if evaluate:
        with writing(f"--workdir={workdir}", "copy the run to another folder"):
            write_json(Path(workdir) / "evaluation.json", result)
        print(visible(f"report    {report.write(workdir)}"), file=sys.stderr)
    return result


def _adapt_each(run: TrainedRun, prompts: Sequence[str]) -> Iterator[tuple[Adaptation, str]]:
    """Adapts to each prompt by itself."""
    space = adaptation.make_space(run.policy, run.adapter, run.config.cem)
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number}/{len(prompts)}" if len(prompts) > 1 else ""
        view = _LiveView(where, run.config.cem.generations)
        yield adaptation.adapt(run, prompt, space=space, on_chunk=view.show), prompt
        view.close()


def _adapt_to_file(
    run: TrainedRun, prompts: Sequence[str], examples: Path
) -> Iterator[tuple[Adaptation, str]]:
    """Adapts once, to all examples of a file, for all prompts."""
    view = _LiveView("examples", run.config.cem.generations)
    if run.config.cem.fitness == "reward":
        task = run.config.task(run.config.cem.task)
        source = run.config.data.sources.get(task.name, SourceConfig())
        chosen = [example_of(task, row, source) for row in file_rows(examples)]
        items = rollouts.encode(run.policy, task, chosen)
        found = adaptation.adapt(run, items, on_chunk=view.show)
    else:
        found = adaptation.adapt(run, _texts(examples), on_chunk=view.show)
    view.close()
    for prompt in prompts or [""]:
        yield found, prompt


def _record(
    run: TrainedRun, found: Adaptation, prompt: str, judged: Sequence[Text]
) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": prompt, **adaptation.summary(found)}
    if judged:
        for when, adapter in (("before", run.adapter), ("after", found.adapter)):
            values = adaptation.log_likelihoods(run, adapter, judged)
            record[f"heldout_{when}"] = float(np.mean(values))
    # A prompt may fill the context and still be adapted to.
    fits = prompt != "" and adaptation.count_tokens(run, prompt) <= adaptation.room(run)
    for when, adapter in (("before", run.adapter), ("after", found.adapter)):
        record[f"text_{when}"] = adaptation.complete(run, adapter, [prompt])[0] if fits else None
    return record


def _evaluate(run: TrainedRun) -> dict[str, Any]:
    data = load_data(run.config, run.policy)
    lines = "\n".join(f"data      {line}" for line in data.lines)
    print(visible(lines), file=sys.stderr, flush=True)
    view = _LiveView("searches", 0)
    result = tables.adapted_tables(
        run,
        data.train,
        data.heldout,
        key=jax.random.key(run.config.seed),
        progress=view.count,
    )
    view.close()
    return {**result, "cem": dataclasses.asdict(run.config.cem)}


def _read_prompts(prompt: str | None, file: str | None, *, optional: bool) -> list[str]:
    if prompt is not None:
        return [prompt]
    if file is not None:
        read = _texts(Path(file))
        if any(text.completion for text in read):
            raise InputError(
                f"{file}: a prompt has a completion; prompts are completed by the model, so leave "
                "them out, or give the file as --examples."
            )
        return [text.prompt for text in read]
    if optional or sys.stdin is None or sys.stdin.isatty():
        if optional:
            return []
        raise InputError(
            "there is no prompt; give --prompt, --prompts, --evaluate, or pipe one in."
        )
    try:
        return [sys.stdin.buffer.read().decode("utf-8").rstrip("\n")]
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on standard input is not UTF-8 (byte {error.start}); convert it."
        ) from None


def _texts(file: Path) -> list[Text]:
    """The texts of a file: column text, or prompt and perhaps completion."""
    texts = []
    for row in file_rows(file):
        values = row.read()
        prompt = values.get("prompt", values.get("text"))
        completion = values.get("completion", "")
        if not isinstance(prompt, str) or not isinstance(completion, str) or not prompt.strip():
            raise InputError(
                f"{row.where} has no text: every row needs a string as text, or as prompt and "
                "perhaps completion."
            )
        texts.append(Text(prompt if completion else prompt.rstrip("\n"), completion))
    return texts


def _make_folder(folder: Path) -> None:
    """Makes the folder of ``--save``, so that it cannot fail after the search."""
    there = [name for name in checkpoints.ADAPTER_FILES if is_file(folder / name)]
    if there:
        raise InputError(f"--save={folder}: holds {there[0]} already; give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--save={folder}: cannot be made ({reason}); give another folder."
        ) from None


class _LiveView:
    """Progress on stderr: one line that is rewritten on a terminal, a line now and then in a file.

    The search calls `show` between chunks of generations; nothing is asked of the device for it.
    """

    def __init__(self, title: str, generations: int):
        self.title, self.generations = title, generations
        self.end = "\r" if sys.stderr.isatty() else "\n"
        self.width = 0
        # Of many prompts a file gets the last line of each.
        self.sparse = self.end == "\n" and title.startswith("prompt")

    def show(self, done: int, history: History) -> None:
        if self.sparse and done < self.generations:
            return
        held = history.held_back[-1]
        gate = "" if np.isnan(held) else f"  held-back gain at least {held:+.3f}"
        title = f"{self.title}  " if self.title else ""
        self._print(
            f"{title}generation {done}/{self.generations}  best {history.best[-1]:.3f}  "
            f"mean {history.mean[-1]:.3f}  sigma {history.std[-1]:.3f}{gate}"
        )

    def count(self, done: int, of: int) -> None:
        if self.end == "\r" or done % max(1, of // 20) == 0 or done == of:
            self._print(f"{self.title} {done}/{of}")

    def close(self) -> None:
        if self.end == "\r" and self.width:
            print(file=sys.stderr)

    def _print(self, line: str) -> None:
        padding = " " * max(0, self.width - len(line))
        self.width = len(line)
        print(line + padding, end=self.end, file=sys.stderr, flush=True)
