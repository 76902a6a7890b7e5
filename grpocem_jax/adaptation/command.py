"""What ``adapt.py`` does: reads prompts and examples, adapts, and shows what came of it."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import ml_collections
import numpy as np

from grpocem_jax import adaptation, report, rollouts
from grpocem_jax.adaptation import Adaptation, Text, TrainedRun, screens, tables
from grpocem_jax.config import SearchConfig
from grpocem_jax.runs import checkpoints
from grpocem_jax.runs.metrics import environment
from grpocem_jax.runs.screens import unit
from grpocem_jax.search.loop import History
from grpocem_jax.tasks import SourceConfig, example_of
from grpocem_jax.tasks.rows import file_rows
from grpocem_jax.training import evaluation
from grpocem_jax.training.data import check_length, load_data
from grpocem_jax.utils import cluster
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_file, write_json, writing
from grpocem_jax.utils.terminal import say, show, unread


def run(
    settings: ml_collections.ConfigDict | None,
    *,
    workdir: str | None,
    prompt: str | None = None,
    prompts: str | None = None,
    examples: str | None = None,
    heldout: str | None = None,
    evaluate: bool = False,
    save: str | None = None,
    model: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Runs the command; arguments are its flags, ``settings`` None those of the run.

    Returns:
      what ``--json`` prints.

    Raises:
      InputError: flags that contradict each other, and whatever loading and adapting raise.
    """
    if workdir == "" or (workdir is None and settings is None):
        raise InputError(
            "--workdir is missing; give a run directory with a trained adapter, or --config to "
            "start from its base model."
        )
    if workdir is None and evaluate:
        raise InputError(
            "--evaluate writes its tables into a run directory; give it with --workdir."
        )
    if save == "":
        raise InputError("--save='': is no folder; give one, or leave the flag out.")
    workdir, prompts, examples, heldout, save = (
        path and str(expand(path, f"--{name}"))
        for name, path in (
            ("workdir", workdir),
            ("prompts", prompts),
            ("examples", examples),
            ("heldout", heldout),
            ("save", save),
        )
    )
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
    processes = cluster.here()
    texts: list[Any] = []
    if not evaluate:
        # A launcher gives standard input to all processes, or to the first alone.
        optional = examples is not None
        texts = processes.first(lambda: _read_prompts(prompt, prompts, optional=optional))
    if workdir is not None:
        trained = adaptation.load_run(workdir, settings, model=model)
    else:
        trained = adaptation.load_base(cast(ml_collections.ConfigDict, settings), model=model)
    if evaluate and not os.access(str(workdir), os.W_OK):
        raise InputError(
            f"--workdir={workdir}: --evaluate writes evaluation.json and report/ there, which is "
            "not allowed; copy the run to a folder of yours."
        )
    if trained.config.search.fitness == "reward" and not evaluate:
        if examples is None:
            raise InputError(
                "config.search.fitness='reward' needs --examples: prompts of the task in "
                "search.task, with the columns its reward reads."
            )
        if not trained.config.search.task:
            raise InputError(
                "config.search.task='': name the task whose reward scores completions of "
                f"--examples: {', '.join(trained.config.data.tasks)}."
            )
    processes.require_same(_started_with(trained, texts, examples, heldout))
    # What cannot be used is refused before the first search.
    for text in texts:
        adaptation.count_tokens(trained, text)
    judge = _Judge(trained) if heldout is None else _judge(trained, Path(heldout))
    if save:
        folder = Path(save)
        processes.first(lambda: _make_folder(folder))
    say(screens.adapting(trained, workdir), sys.stderr)
    # Results are saved before they are shown, and shown also where they cannot be saved.
    unsaved: InputError | None = None
    if evaluate:
        result = _evaluate(trained)
        try:
            page = processes.first(lambda: _write_tables(str(workdir), result))
            say(f"report    {page}", sys.stderr)
        except InputError as error:
            unsaved = error
        if not as_json:
            show(tables.show(result, trained.config))
    else:
        results = []
        pairs = (
            _adapt_each(trained, texts)
            if examples is None
            else _adapt_to_file(trained, texts, Path(examples))
        )
        last = None
        for found, text in pairs:
            results.append(_record(trained, found, text, judge))
            if save and len(results) == 1:
                try:
                    processes.first(functools.partial(_save, trained, found, results[0], save))
                except InputError as error:
                    unsaved = error
            if not as_json:
                show(screens.adapted(results[-1], search=found is not last))
            last = found
        result = results[0]
        if prompts:
            result = {"results": results}
            if examples is None:
                result["summary"] = _summary(results)
                if not as_json and len(results) > 1:
                    show(screens.adapted_many(result["summary"]))
    if as_json:
        # In ASCII: what moves a cursor or turns the writing direction is an escape of JSON's own.
        print(json.dumps(result, allow_nan=False), flush=True)
    if unsaved is not None:
        raise unsaved
    return result


def _started_with(
    run: TrainedRun, texts: Sequence[Any], examples: str | None, heldout: str | None
) -> dict[str, Any]:
    """What must be the same in all processes, by name."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(run.offsets)):
        digest.update(leaf.tobytes())
    files = {"--examples": examples, "--heldout": heldout}
    hashes = {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if file is not None and is_file(file)
    }
    settings = {x: repr(y) for x, y in _flat("config", run.config).items()}
    versions = environment()["versions"]
    return {
        **settings,
        **{f"the version of {name}": value for name, value in versions.items()},
        **{f"the file of {name}": value for name, value in hashes.items()},
        "the adapter": digest.hexdigest(),
        "the prompts": list(texts),
    }


def _flat(name: str, value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {x: y for key, own in value.items() for x, y in _flat(f"{name}.{key}", own).items()}


def _write_tables(workdir: str, tables: dict[str, Any]) -> str:
    """Writes what ``--evaluate`` found into a run directory; where its page is."""
    with writing(f"--workdir={workdir}", "copy the run to another folder"):
        write_json(Path(workdir) / "evaluation.json", tables)
    return str(report.write(workdir))


def _save(run: TrainedRun, found: Adaptation, record: dict[str, Any], folder: str) -> None:
    """Saves the adapter found; there is one, also where it completes several prompts."""
    card = screens.adapted_card(run, record)
    with writing(f"--save={folder}", "give another folder"):
        checkpoints.save_adapter(
            Path(folder), found.offsets, run.policy.adapter_config(run.config.adapter), card
        )
    say(f"adapter saved in {folder}", sys.stderr)


def _adapt_each(run: TrainedRun, prompts: Sequence[Any]) -> Iterator[tuple[Adaptation, Any]]:
    """Adapts to each prompt by itself."""
    space = adaptation.make_space(run.policy, run.offsets, run.config.search)
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number}/{len(prompts)}" if len(prompts) > 1 else ""
        with _LiveView(where, run.config.search) as view:
            found = adaptation.adapt(run, prompt, space=space, on_chunk=view.show)
        yield found, prompt


def _adapt_to_file(
    run: TrainedRun, prompts: Sequence[Any], examples: Path
) -> Iterator[tuple[Adaptation, Any]]:
    """Adapts once, to all examples of a file, for all prompts."""
    subject: Any
    if run.config.search.fitness == "reward":
        subject = _items(run, examples)
    elif _are_of_task(run, examples):
        items = _items(run, examples)
        subject = [tables.reference_text(item) or Text(item.example.prompt) for item in items]
    else:
        subject = _texts(run, examples)
    with _LiveView("examples", run.config.search) as view:
        found = adaptation.adapt(run, subject, on_chunk=view.show)
    for prompt in prompts or [""]:
        yield found, prompt


def _are_of_task(run: TrainedRun, file: Path) -> bool:
    """Whether the rows of a file have the columns of ``search.task``, and more than its text."""
    if not run.config.search.task:
        return False
    task = run.config.task(run.config.search.task)
    return not task.is_free_text and set(task.columns) <= set(file_rows(file)[0].read())


def _items(run: TrainedRun, file: Path) -> list[rollouts.Item]:
    """The rows of a file as prompts of ``search.task``, with the columns that its reward reads."""
    task = run.config.task(run.config.search.task)
    source = run.config.data.sources.get(task.name, SourceConfig())
    form = rollouts.task_format(run.config, run.policy, task.name)
    chosen = [example_of(task, row, source, form) for row in file_rows(file)]
    return rollouts.encode(run.policy, task, chosen)


@dataclasses.dataclass
class _Judge:
    """What ``--heldout`` measures: log-likelihoods of texts, rewards of prompts, or both.

    What it said of an adapter is kept: one adapter may answer many prompts.
    """

    run: TrainedRun
    texts: Sequence[Text] = ()
    items: Sequence[rollouts.Item] = ()
    _known: dict[int, tuple[Any, float | None, np.ndarray | None]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def greedy(self) -> bool:
        """Whether completions are greedy: a likelihood is no matter of how they are drawn."""
        return self.run.config.search.fitness != "reward"

    def record(self, offsets: Any) -> dict[str, Any]:
        """The fields of ``--json`` on held-out text, before and with an adapter."""
        fields: dict[str, Any] = {}
        (_, nats, rewards), (_, own_nats, own_rewards) = map(
            self._measure, (self.run.offsets, offsets)
        )
        if nats is not None:
            fields |= {"heldout_before": nats, "heldout_after": own_nats}
        if rewards is not None and own_rewards is not None:
            name = self.run.config.search.task
            gains = evaluation.compare([name], [name] * len(rewards), rewards, own_rewards)
            gain = gains.get("overall")
            if self.greedy:
                for right in evaluation.accuracies([self.items[0].task], gains).values():
                    fields |= {
                        "heldout_accuracy_before": right.before,
                        "heldout_accuracy_after": right.after,
                        "heldout_accuracy_gain_ci95": list(right.gain_ci95),
                    }
                return fields
            fields |= {
                "heldout_reward_before": gain and gain.before,
                "heldout_reward_after": gain and gain.after,
                "heldout_reward_gain_ci95": gain and list(gain.gain_ci95),
            }
        return fields

    def _measure(self, offsets: Any) -> tuple[Any, float | None, np.ndarray | None]:
        run, nats, rewards = self.run, None, None
        if id(offsets) not in self._known:
            if self.texts:
                nats = float(np.mean(adaptation.log_likelihoods(run, offsets, self.texts)))
            if self.items:
                key = jax.random.key(run.config.seed)
                rewards, _ = evaluation.evaluate(
                    run.policy, offsets, self.items, key, run.config, greedy=self.greedy
                )
            # The adapter is kept as well, so that no other gets its id.
            self._known[id(offsets)] = (offsets, nats, rewards)
        return self._known[id(offsets)]


def _judge(run: TrainedRun, file: Path) -> _Judge:
    """Reads ``--heldout``, before any search.

    Rows with the columns of ``search.task`` are judged by the likelihood of their references where
    they have them, and by completions: by their reward where the fitness is one, else by how many
    are right where the task says so.  Rows of text are judged by likelihood alone.
    """
    items: list[rollouts.Item] = []
    texts: Sequence[Text | None]
    if run.config.search.fitness == "reward":
        try:
            items = _items(run, file)
            texts = [tables.reference_text(item) for item in items]
        except InputError as error:
            try:
                texts = _texts(run, file)
            except InputError:
                raise error from None
    elif _are_of_task(run, file):
        items = _items(run, file)
        texts = [tables.reference_text(item) for item in items]
        if not items[0].task.is_right_or_wrong:
            items = []
    else:
        texts = _texts(run, file)
    longest = run.config.data.max_prompt_tokens
    for number, item in enumerate(items, start=1):
        adaptation.check_room(run, len(item.tokens))
        if len(item.tokens) > longest:
            raise InputError(
                f"{file}: prompt {number} has {len(item.tokens)} tokens, but "
                f"config.data.max_prompt_tokens={longest}; shorten it, or raise that."
            )
    judged = [text for text in texts if text is not None]
    for text in judged:
        adaptation.encode(run.policy, text, run.config.search)
    return _Judge(run, judged if len(judged) == len(texts) else (), items)


def _record(run: TrainedRun, found: Adaptation, prompt: Any, judge: _Judge) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": prompt, **adaptation.summary(found)}
    record["fitness_unit"] = unit(run.config.search.fitness)
    record |= judge.record(found.offsets)
    # A prompt may fill the context and still be adapted to.
    fits = prompt != "" and adaptation.count_tokens(run, prompt) <= adaptation.room(run)
    for when, offsets in (("before", run.offsets), ("after", found.offsets)):
        record[f"text_{when}"] = adaptation.complete(run, offsets, [prompt])[0] if fits else None
    return record


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came of the searches for several prompts, together."""
    gains = [
        record["fitness_after"] - record["fitness_before"]
        for record in results
        if record["fitness_before"] is not None
    ]
    return {
        "prompts": len(results),
        "adapted": sum(record["adapted"] for record in results),
        "changed": sum(record["text_before"] != record["text_after"] for record in results),
        "mean_gain": float(np.mean(gains)) if gains else None,
        "fitness_unit": results[0]["fitness_unit"],
        "seconds": sum(record["seconds"] for record in results),
        "compile_seconds": sum(record["compile_seconds"] for record in results),
    }


def _evaluate(run: TrainedRun) -> dict[str, Any]:
    check_length(run.config, run.policy)
    data = load_data(run.config, run.policy)
    lines = "\n".join(f"data      {line}" for line in data.lines)
    say(lines, sys.stderr)
    with _LiveView("searches", run.config.search) as view:
        result = tables.adapted_tables(
            run,
            data.train,
            data.heldout,
            key=jax.random.key(run.config.seed),
            progress=view.count,
        )
    config = run.config
    records = (config.search, config.cem, config.gradient)
    settings = {name: value for record in records for name, value in vars(record).items()}
    return {**result, "cem": settings | {"options": dict(config.search.options)}}


def _read_prompts(prompt: str | None, file: str | None, *, optional: bool) -> list[Any]:
    if prompt is not None:
        return [prompt]
    if file is not None:
        read = _rows(Path(file))
        if any(completion for _, completion in read):
            raise InputError(
                f"{file}: a prompt has a completion; prompts are completed by the model, so leave "
                "them out, or give the file as --examples."
            )
        return [prompt for prompt, _ in read]
    if optional or sys.stdin is None or sys.stdin.isatty():
        if optional:
            return []
        raise InputError(
            "there is no prompt; give --prompt, --prompts, --evaluate, or pipe one in."
        )
    try:
        return [piped_text(sys.stdin.buffer.read())]
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on standard input is not UTF-8 (byte {error.start}); convert it."
        ) from None


def piped_text(content: bytes) -> str:
    """The text of a stream, without what is the stream's own, as of the lines of a ``.txt`` file.

    That is a byte order mark, and the end of the last line, which ``echo`` writes.  Lines end in
    a line feed, also where the stream has carriage returns there.  Everything else is of the text,
    as all of a flag, of a string in JSON and of a cell is.

    Raises:
      UnicodeDecodeError: not UTF-8.
    """
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n")


def _texts(run: TrainedRun, file: Path) -> list[Text]:
    """The texts of a file as the model sees them."""
    write = run.policy.prompt_format.write
    return [Text(write(prompt), completion) for prompt, completion in _rows(file)]


def _rows(file: Path) -> list[tuple[Any, str]]:
    """The texts of a file: column text, or prompt and perhaps completion."""
    texts: list[tuple[Any, str]] = []
    for row in file_rows(file):
        values = row.read()
        prompt = values.get("prompt", values.get("text"))
        completion = values.get("completion", "")
        is_text = bool(prompt.strip()) if isinstance(prompt, str) else isinstance(prompt, list)
        if not is_text or not isinstance(completion, str):
            raise InputError(
                f"{row.where} has no text: every row needs a string as text, or as prompt and "
                "perhaps completion."
            )
        texts.append((prompt, completion))
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

    The search calls `show` between chunks of generations.  In between, where a generation takes
    long, a thread shows how long it has been under way, and how long those before took; nothing is
    asked of the device for it.  Used as a context.
    """

    interval_s = 1.0, 30.0
    """Seconds between such lines, on a terminal and in a file."""

    def __init__(self, title: str, settings: SearchConfig):
        self.title, self.generations = title, settings.generations
        self.unit = unit(settings.fitness)
        self.terminal = sys.stderr.isatty()
        self.end = "\r" if self.terminal else "\n"
        self.width = 0
        # Of many prompts a file gets the last line of each.
        self.sparse = not self.terminal and title.startswith("prompt")
        self.done, self.line = 0, ""
        self.stage = "by halves" if settings.gate else ""
        self.started = self.reported = time.monotonic()
        self.lock, self.closed = threading.Lock(), threading.Event()

    def __enter__(self) -> "_LiveView":
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.thread.join()
        if self.terminal and self.width:
            with unread(sys.stderr):
                print(file=sys.stderr)

    def show(self, done: int, history: History) -> None:
        if done <= self.done:  # the halves have passed the gate
            self.stage, self.started = "by all", self.reported
        self.line = (
            f"best {history.best[-1]:.3f}  mean {history.mean[-1]:.3f} ({self.unit})"
            # A gradient has none.
            + (f"  sigma {history.std[-1]:.3f}" if history.std[-1] else "")
        )
        self.done, self.reported = done, time.monotonic()
        if self.sparse and done < self.generations:
            return
        self._print(f"{self._title()}generation {done}/{self.generations}  {self.line}")

    def count(self, done: int, of: int) -> None:
        self.done, self.reported = done, time.monotonic()
        if self.terminal or done % max(1, of // 20) == 0 or done == of:
            self._print(f"{self.title} {done}/{of}")

    def under_way(self, now: float) -> str:
        """What can be said of the generation under way: how long, of about how long."""
        waited = now - self.reported
        if not self.done:
            return f"{self._title()}under way for {waited:.0f} s, compilation included"
        each = (self.reported - self.started) / self.done
        return (
            f"{self._title()}{waited:.0f} s since generation {self.done}/{self.generations}, at "
            f"about {each:.0f} s for each  {self.line}"
        )

    def _watch(self) -> None:
        interval = self.interval_s[0 if self.terminal else 1]
        while not self.closed.wait(interval):
            now = time.monotonic()
            if now - self.reported >= interval and self.title != "searches":
                self._print(self.under_way(now))

    def _title(self) -> str:
        return "".join(f"{part}  " for part in (self.title, self.stage) if part)

    def _print(self, line: str) -> None:
        with self.lock, unread(sys.stderr):
            if self.terminal:  # a longer line could not be rewritten
                line = line[: shutil.get_terminal_size().columns - 1]
            padding = " " * max(0, self.width - len(line)) if self.terminal else ""
            self.width = len(line)
            print(line + padding, end=self.end, file=sys.stderr, flush=True)
