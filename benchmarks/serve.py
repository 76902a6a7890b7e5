"""What serving many adapters at once costs, and what batching gains.

    python -m benchmarks.serve [--config configs/tiny.py] [--slots 64] [--tokens 64] [--json]
    python -m benchmarks.serve --parts peft --config.model.source=random:gpt2

Of random prompts, none of whose completions ends early, in four parts: ``engine``, a closed loop
over `grpocem_jax.serving.Engine`; ``peft``, the same work by PEFT where it is installed; ``adapt``,
the searches of many users, see `benchmarks.many_searches`; and ``http``, closed and open loops
against the server itself, see `benchmarks.load`.  What is compared runs in turn, and ratios are
medians over the rounds.  What cannot be measured is null, and the screen says why.
"""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import common, load, many_searches
from benchmarks.decode import check_length
from benchmarks.serve_engine import RESIDENT, Bench, Load, Part, make_policy, measure_engine
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.runs.trained import TrainedRun
from grpocem_jax.serving import Request
from grpocem_jax.serving.text import Writer, vocabulary
from grpocem_jax.utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

PARTS = ("engine", "peft", "adapt", "http")

RATIOS = (
    *("own_over_shared", "own_over_plain", "resident_2000_over_1"),
    *("concurrent_speedup", "continuous_speedup", "peft_speedup", "adapt_speedup"),
)
"""The first keys of the record, null where a part was left out or could not be measured."""


def measure_peft(bench: Bench) -> Part:
    """The same prompts by PEFT, a LoRA of rank 1 for each row at the sites of the adapter."""
    peers, missing = common.find_peers("peers_peft")
    if peers is None:
        return Part([f"peft_speedup is null: {missing}."], {}, {})
    policy, slots, length = bench.policy, bench.slots, bench.length
    prompts = common.random_tokens(bench.subject, slots, bench.prompt_length)
    sites = list(bench.subject.attached.sites)
    model = peers.with_adapters(common.peer_model(bench.subject), sites, count=slots)
    names = [str(number) for number in range(slots)]
    mixed, one = (peers.generate(model, prompts, x, length) for x in (names, ["0"] * slots))
    threads = peers.choose_threads(peers.generate(model, prompts, names, min(length, 4)))
    engine = bench.engine(policy, policy.zero, rows=slots, load=bench.adapter)
    engine.warm_up()

    def own(names: Sequence[str | None]) -> list[str]:
        tickets = [
            engine.submit(Request(tokens=tokens, adapter=name, max_new_tokens=length))
            for tokens, name in zip(prompts, names, strict=True)
        ]
        while engine.step():
            pass
        return ["".join(piece.text for piece in ticket.pieces()) for ticket in tickets]

    # While no adapter has an effect, both complete the prompts alike.
    written = [_written(policy, tokens) for tokens in mixed()]
    same = sum(x == y for x, y in zip(written, own([None] * slots), strict=True))
    peers.draw(model)
    work = {"own": lambda: own(names), "peft_mixed": mixed, "peft_one": one}
    spent = common.clocked_rounds(work, bench.repetitions)
    timings = {name: common.summarize([x.wall for x in own]) for name, own in spent.items()}
    ratios = {
        name: common.times_as_fast(
            [getattr(x, clock) for x in spent["own"]], [getattr(x, clock) for x in spent[other]]
        )
        for name, other, clock in (
            ("peft_speedup", "peft_mixed", "wall"),
            ("peft_speedup_cpu", "peft_mixed", "processor"),
            ("peft_one_speedup", "peft_one", "wall"),
        )
    }
    rows: list[tuple[str, ...]] = [("", "seconds", "spread", "tokens/s")]
    for name, label in (
        ("own", f"{slots} requests, {slots} adapters"),
        ("peft_mixed", f"PEFT, {slots} LoRAs of rank 1 in a batch"),
        ("peft_one", "PEFT, one of them for all"),
    ):
        rate = f"{slots * length / timings[name].median:.0f}"
        rows.append((label, *common.timing_cells(timings[name]), rate))
    lines = [
        common.table(rows),
        f"by processor time {ratios['peft_speedup_cpu']:.2f} times; PyTorch runs fastest with "
        f"{threads} thread{'s' * (threads > 1)}; without effect of the adapters {same} of {slots} "
        "completions are the same",
    ]
    return Part(
        lines,
        {"peft_speedup": ratios.pop("peft_speedup")},
        {
            **ratios,
            "peft_threads": threads,
            "peft_same_completions": same,
            "peft_seconds": {name: timing._asdict() for name, timing in timings.items()},
        },
    )


def _written(policy: Policy, tokens: np.ndarray) -> str:
    """The text of a completion."""
    writer = Writer(vocabulary(policy), ())
    for token in tokens.tolist():
        writer.add(token)
    return writer.take(last=True)


def measure_adapt(bench: Bench, users: int, examples: int) -> Part:
    """Many users who adapt at once, by the gradient."""
    if bench.subject.pretrained.tokenizer is None:
        text = "adapt_speedup is null: a shape has no tokenizer to read the examples with."
        return Part([text], {}, {})
    text, record = many_searches.measure(
        bench.settings,
        users=users,
        examples=examples,
        task="sentiment",
        method="gradient",
        repetitions=max(1, bench.repetitions // 2),
    )
    return Part([text], {"adapt_speedup": record["adapt_speedup"]}, {"adapt": record})


def measure_http(bench: Bench, seconds: float) -> Part:
    """The server itself, asked by a process of its own in closed loops and an open one."""
    try:
        from grpocem_jax.serving.options import Limits, Options
        from grpocem_jax.serving.server import Server
    except ImportError as error:
        text = f"{error.name} is not installed; run `pip install -e '.[serve]'`"
        return Part([f"no figures over HTTP: {text}."], {}, {})
    many = Limits(requests_per_minute=10**9, tokens_per_minute=10**12, max_open=10**6)
    slots, room = bench.slots, bench.prompt_length + bench.length
    run = TrainedRun(bench.subject.config, bench.policy, bench.policy.zero)
    with tempfile.TemporaryDirectory(prefix="grpocem-bench-") as folder:
        options = Options(
            port=0,
            store=folder,
            slots=slots,
            rows=slots,
            queue=4 * load.MOST_CLIENTS,
            max_prompt=max(2, bench.prompt_length),
            max_new_tokens=bench.length,
        )
        with Server(run, options, many) as server:
            for number in range(slots):
                record = server.store.add(
                    "public", base=server.catalogue.fits, limits=many, asked={"method": "upload"}
                )
                save = functools.partial(
                    server.catalogue.save, offsets=bench.adapter(str(number)), card=""
                )
                server.store.keep(record, save, {}, 0)

            def ask(*flags: str) -> dict[str, Any]:
                return _ask_server(server.url, bench, seconds, *flags)

            found = {f"clients_{n}": ask(f"--clients={n}") for n in sorted({1, 8, slots})}
            best = max(x["requests_per_s"] for x in found.values())
            found["open"] = ask(f"--rate={max(0.1, best / 2):.1f}")
    rows: list[tuple[str, ...]] = [load.HEAD]
    for name, own in found.items():
        rate, count = own.get("rate"), own.get("clients")
        label = f"open loop, {rate:g} requests/s" if name == "open" else f"{count} clients"
        rows.append(load.row(label, own))
    heading = f"over HTTP, {slots + 1} models in turn, room for {room} tokens"
    return Part([heading, common.table(rows)], {}, {"http": found})


def _ask_server(url: str, bench: Bench, seconds: float, *flags: str) -> dict[str, Any]:
    """A run of `benchmarks.load`; its record."""
    sizes = (f"--prompt_tokens={bench.prompt_length}", f"--tokens={bench.length}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.load", f"--url={url}", "--json"),
            *(f"--seconds={seconds}", *sizes, *flags),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"benchmarks.load: {done.stderr.strip().rpartition(chr(10))[2]}")
    record = json.loads(done.stdout.splitlines()[-1])
    del record["environment"]
    return record


def measure(
    settings: Any,
    *,
    slots: int,
    prompt_length: int,
    length: int,
    repetitions: int,
    parts: Sequence[str] = PARTS,
    users: int = 32,
    examples: int = 8,
    seconds: float = 10.0,
) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark; returns the text to show and the JSON record.

    Raises:
      InputError: more tokens than the model has positions, or a part that is none.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--parts={part!r}: must be among {', '.join(PARTS)}.")
    subject = common.load(settings)
    check_length(subject, prompt_length, length)
    bench = Bench(
        settings,
        subject,
        make_policy(subject),
        Load(subject, prompt_length, length),
        slots=slots,
        prompt_length=prompt_length,
        length=length,
        repetitions=repetitions,
    )
    measures = {
        "engine": lambda: measure_engine(bench),
        "peft": lambda: measure_peft(bench),
        "adapt": lambda: measure_adapt(bench, users, examples),
        "http": lambda: measure_http(bench, seconds),
    }
    size = sum(x.nbytes for x in jax.tree.leaves(jax.device_get(bench.policy.zero)))
    lines = [
        common.headline(
            f"Serving, prompts of {prompt_length} tokens, completions of {length}", subject
        ),
        f"engine    {slots} slots, adapters of {math.ceil(size / 1024):,} KB",
    ]
    record: dict[str, Any] = dict.fromkeys(RATIOS)
    for part in PARTS:
        if part in parts:
            found = measures[part]()
            lines += ["", *found.lines]
            record |= {**found.ratios, **found.record}
    lines.append("")
    for name in RATIOS:
        value = record[name]
        lines.append(f"{name:<22}{'null' if value is None else format(value, '.2f')}")
    record |= {
        "slots": slots,
        "prompt_tokens": prompt_length,
        "tokens": length,
        "adapter_bytes": size,
        "model": subject.source,
    }
    return "\n".join(lines), record


if __name__ == "__main__":
    common.define_flags("tiny")
    flags.DEFINE_integer("repetitions", 5, "Timed repetitions, after one to warm up.", 1)
    flags.DEFINE_integer("slots", 64, "Requests that are completed at once.", 1, RESIDENT)
    flags.DEFINE_integer("tokens", 64, "Tokens of each completion.", 1)
    flags.DEFINE_integer("prompt_tokens", 23, "Tokens of each prompt.", 1)
    flags.DEFINE_list("parts", ",".join(PARTS), f"What is measured, of {', '.join(PARTS)}.")
    flags.DEFINE_integer("users", 32, "Users who adapt at once.", 1)
    flags.DEFINE_integer("examples", 8, "Examples of each of them.", 1)
    flags.DEFINE_float("seconds", 10.0, "Of each loop over HTTP.", 0.1, load.MOST_SECONDS)
    common.run(
        lambda flag: measure(
            flag.config,
            slots=flag.slots,
            prompt_length=flag.prompt_tokens,
            length=flag.tokens,
            repetitions=flag.repetitions,
            parts=flag.parts,
            users=flag.users,
            examples=flag.examples,
            seconds=flag.seconds,
        )
    )
