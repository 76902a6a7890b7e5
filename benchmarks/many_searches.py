"""Many users who adapt at once, against one after another.

    python -m benchmarks.many_searches [--config tiny] [--users 32] [--examples 8] [--json]

Each user has some examples of one task, prompts with their references, and searches by the
gradient. One after another they call `grpocem_jax.adaptation.adapt`; at once,
`grpocem_jax.serving.searches` advances them together. The two take turns: some users one after
another, then some generations of all at once, until both are through. What they find is compared.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks import common
from grpocem_jax import adaptation
from grpocem_jax.adaptation import Adaptation, Text, TrainedRun
from grpocem_jax.runs import metrics
from grpocem_jax.serving.searches import Searches
from grpocem_jax.tasks import SourceConfig, load_examples
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError

TURNS = 8


class _Spent(NamedTuple):
    """Seconds of the clock, of all processors together, and of compilation."""

    wall: float
    cpu: float
    compilation: float


class _Stopwatch:
    """Adds up what some calls take."""

    def __init__(self) -> None:
        self.spent = _Spent(0.0, 0.0, 0.0)

    def __call__(self, function: Callable[[], Any]) -> Any:
        clock = CompileClock.start()
        wall, cpu = time.perf_counter(), time.process_time()
        found = function()
        own = (time.perf_counter() - wall, time.process_time() - cpu, clock.seconds)
        clock.stop()
        self.spent = _Spent(*(a + b for a, b in zip(self.spent, own, strict=True)))
        return found


def user_texts(run: TrainedRun, task: str, users: int, count: int) -> list[list[Text | str]]:
    """Examples of a task for each user: prompts with references, or texts where it has none.

    Raises:
      InputError: a task that the config lacks, or with too few examples.
    """
    if task not in run.config.data.tasks:
        raise InputError(f"--task={task!r}: must be one of {', '.join(run.config.data.tasks)}.")
    own = run.config.task(task)
    drawn = load_examples(
        own,
        run.config.data.sources.get(task, SourceConfig()),
        split="train",
        count_tokens=lambda text: len(run.policy.encode(text)),
        max_prompt_tokens=run.config.data.max_prompt_tokens,
        max_samples=users * count,
        seed=run.config.seed,
    ).examples
    if len(drawn) < users * count:
        raise InputError(
            f"--task={task!r}: has {len(drawn)} examples, fewer than --users={users} x "
            f"--examples={count}; lower one of them."
        )
    completions = [own.completion(example) for example in drawn]
    texts: list[Text | str] = [
        Text(example.prompt, completion) if completion else example.prompt
        for example, completion in zip(drawn, completions, strict=True)
    ]
    return [texts[i * count : (i + 1) * count] for i in range(users)]


def compare(
    run: TrainedRun, asked: Sequence[Sequence[Text | str]], *, method: str, repetitions: int
) -> tuple[dict[str, list[_Spent]], list[Adaptation], list[Adaptation]]:
    """Lets all users adapt one after another and at once, and both again.

    Returns:
      what each repetition took, ``alone`` and ``together``, the first of them with compilation; and
      what was found last.
    """
    searches = Searches(run, users=len(asked))
    settings = searches.settings_of(method)
    spent: dict[str, list[_Spent]] = {"alone": [], "together": []}
    for _ in range(1 + repetitions):
        alone, together = _Stopwatch(), _Stopwatch()
        found: list[Adaptation] = []

        def one_after_another(users: Sequence[int], found: list[Adaptation] = found) -> None:
            for user in users:
                key = jax.random.key(user)
                found.append(adaptation.adapt(run, asked[user], key=key, settings=settings))

        jobs = together(
            lambda: [searches.submit(x, method=method, seed=i) for i, x in enumerate(asked)]
        )
        for users in np.array_split(np.arange(len(asked)), TURNS):
            alone(functools.partial(one_after_another, [int(x) for x in users]))
            together(lambda: [searches.step() for _ in range(settings.generations // TURNS)])
        while together(searches.step):
            pass
        spent["alone"].append(alone.spent)
        spent["together"].append(together.spent)
    results = [job.result for job in jobs]
    failed = [job.error for job in jobs if job.result is None]
    if failed:
        raise InputError(f"a job failed: {failed[0]}")
    return spent, found, [x for x in results if x is not None]


def measure(
    settings: Any, *, users: int, examples: int, task: str, method: str, repetitions: int
) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark; returns the text to show and the JSON record."""
    # A program found on disk would hide what compilation takes.
    jax.config.update("jax_enable_compilation_cache", False)
    run = adaptation.load_base(settings)
    asked = user_texts(run, task, users, examples)
    spent, alone, together = compare(run, asked, method=method, repetitions=repetitions)
    timings = {name: common.summarize([x.wall for x in own[1:]]) for name, own in spent.items()}
    cpu = {name: common.summarize([x.cpu for x in own[1:]]).median for name, own in spent.items()}
    first = {name: own[0].wall for name, own in spent.items()}
    distances = [
        max(float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in zip((x.offsets for x in alone), (x.offsets for x in together), strict=True)
    ]
    same = sum(x.returned == y.returned for x, y in zip(alone, together, strict=True))
    speedup = timings["alone"].median / timings["together"].median
    processor = cpu["alone"] / cpu["together"]
    environment = metrics.environment()
    labels = {"alone": "one after another", "together": "at once"}
    rows: list[tuple[str, ...]] = [("", "seconds", "spread", "CPU s", "first", "compilation")]
    for name, label in labels.items():
        cells = common.timing_cells(timings[name], 2)
        own = (f"{cpu[name]:.1f}", f"{first[name]:.1f}", f"{spent[name][0].compilation:.1f}")
        rows.append((label, *cells, *own))
    searched = next((x.search for x in together if x.search is not None), None)
    count = searched.generations if searched else 0
    lines = [
        f"{users} users, {examples} examples of {task} each, {count} generations by {method}",
        f"model     {run.policy.pretrained.source}, {run.policy.dtype}",
        f"machine   {environment['device_count']} x {environment['device']}, "
        f"JAX {environment['versions']['jax']}",
        "",
        common.table(rows),
        "",
        f"adapt_speedup       {speedup:.2f} times",
        f"by processor time   {processor:.2f} times",
        f"with compilation    {first['alone'] / first['together']:.2f} times",
        f"same verdict        {same} of {users}",
        f"offsets differ by   {np.median(distances):.1e} as a rule, {max(distances):.1e} at most",
    ]
    record = {
        "adapt_speedup": speedup,
        "adapt_speedup_cpu": processor,
        "adapt_speedup_with_compilation": first["alone"] / first["together"],
        "users": users,
        "examples": examples,
        "task": task,
        "method": method,
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "cpu_seconds": cpu,
        "first_seconds": first,
        "compile_seconds": {name: own[0].compilation for name, own in spent.items()},
        "same_verdict": same,
        "largest_difference": max(distances),
        "model": run.policy.pretrained.source,
    }
    return "\n".join(lines), record


if __name__ == "__main__":
    common.define_flags("tiny")
    flags.DEFINE_integer("repetitions", 3, "Timed repetitions, after one to warm up.", 1)
    flags.DEFINE_integer("users", 32, "Users who adapt.", 1)
    flags.DEFINE_integer("examples", 8, "Examples of each.", 1)
    flags.DEFINE_string("task", "sentiment", "Whose examples they are.")
    flags.DEFINE_string("method", "gradient", "gradient, cem or experts.")
    common.run(
        lambda flag: measure(
            flag.config,
            users=flag.users,
            examples=flag.examples,
            task=flag.task,
            method=flag.method,
            repetitions=flag.repetitions,
        )
    )
