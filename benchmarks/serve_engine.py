"""Engines of many adapters and of one, asked the same at once and one after another."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from grpocem_jax.adapters import Offsets
from grpocem_jax.models import base
from grpocem_jax.models import tokenizer as tokenizers
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.serving import Engine, Request

RESIDENT = 2000
"""Adapters on the device at once."""


def stand_in_tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` words, for a shape that has none of its own."""
    import tokenizers as backend
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    model = backend.models.WordLevel(words, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=backend.Tokenizer(model))


def make_policy(subject: common.Subject) -> Policy:
    """The subject's model, adapter and tokenizer; no token ends a completion."""
    tokenizer = subject.pretrained.tokenizer or stand_in_tokenizer(
        subject.attached.model.vocab_size
    )
    return Policy(
        **subject.attached._asdict(),
        tokenizer=tokenizer,
        continuing=tokenizers.continuing(tokenizer),
        start_ids=(),
        end_ids=jnp.array([-1], jnp.int32),
        pretrained=subject.pretrained,
    )


def without_adapter(subject: common.Subject, policy: Policy) -> Policy:
    """The model as it is, with its kernels in place of factors."""
    params = base.cast_params(subject.pretrained.params, jnp.dtype(subject.config.model.dtype))
    model = subject.pretrained.build(None)
    return dataclasses.replace(policy, model=model, params=params, zero={}, sites={})


def adapter(zero: Offsets, number: int) -> Offsets:
    """Random offsets, others for each number."""
    rng = np.random.default_rng(number)
    return jax.tree.map(lambda x: rng.normal(0.0, 0.1, x.shape).astype(np.float32), zero)


def complete(engine: Engine, requests: Sequence[Request]) -> int:
    """Completes requests, all submitted at once; returns the tokens of their completions."""
    before = engine.stats.tokens
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    return engine.stats.tokens - before


class Load:
    """Requests of random prompts, each other than the last, of one length unless said otherwise."""

    def __init__(self, subject: common.Subject, prompt_length: int, length: int):
        """Prompts of ``prompt_length`` tokens, completions of ``length``."""
        self._subject, self._prompt_length, self._length = subject, prompt_length, length
        self._seed = 0

    def __call__(
        self, names: Sequence[str | None], lengths: Sequence[int] | None = None
    ) -> list[Request]:
        """A request for each name of an adapter."""
        self._seed += 1
        prompts = common.random_tokens(
            self._subject, len(names), self._prompt_length, seed=self._seed
        )
        lengths = lengths or [self._length] * len(names)
        return [
            Request(tokens=prompt, adapter=name, max_new_tokens=length)
            for prompt, name, length in zip(prompts, names, lengths, strict=True)
        ]


def mixed_lengths(count: int, most: int) -> list[int]:
    """Lengths of completions from 1 to ``most``, the short ones more often.

    The quantiles of an exponential distribution with a mean of a third of ``most``, cut off there,
    in an order drawn once.
    """
    shares = (np.arange(count) + 0.5) / count
    lengths = np.ceil(-most / 3 * np.log1p(-shares)).clip(1, most).astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()


class Bench(NamedTuple):
    """What is measured.

    Attributes:
      settings: of the command.
      subject: the model.
      policy: the same with a tokenizer, of which no token ends a completion.
      load: makes requests.
      slots: requests that are completed at once.
      prompt_length: tokens of a prompt.
      length: tokens of a completion.
      repetitions: timed rounds.
    """

    settings: Any
    subject: common.Subject
    policy: Policy
    load: Load
    slots: int
    prompt_length: int
    length: int
    repetitions: int

    def adapter(self, name: str) -> Offsets:
        """The adapter that a number names."""
        return adapter(self.policy.zero, int(name))

    def engine(self, policy: Policy, start: Offsets, **changes: Any) -> Engine:
        """An engine for these requests."""
        options = {"slots": self.slots, "max_queue": 16 * self.slots, **changes}
        buckets = (self.prompt_length,)
        return Engine(policy, start, buckets=buckets, max_new_tokens=self.length, **options)


class Part(NamedTuple):
    """What came of a part: lines to show, ratios, and the rest of the record."""

    lines: Sequence[str]
    ratios: Mapping[str, float | None]
    record: Mapping[str, Any]


def measure_engine(bench: Bench) -> Part:
    """Many adapters against one and against none, many requests against few."""
    policy, loads, slots, length = bench.policy, bench.load, bench.slots, bench.length
    plain = without_adapter(bench.subject, policy)
    own = bench.engine(policy, policy.zero, rows=RESIDENT, load=bench.adapter)
    shared = bench.engine(policy, bench.adapter("0"))
    bare = bench.engine(plain, {})
    single = bench.engine(policy, policy.zero, slots=1, rows=1, load=bench.adapter)
    warm_up_seconds = own.warm_up()
    for other in (shared, bare, single):
        other.warm_up()
    # All adapters are put on the device before anything is timed.
    names = [str(number) for number in range(RESIDENT)]
    brief = max(2, length // 16)
    for start in range(0, RESIDENT, slots):
        some = names[start : start + slots]
        complete(own, loads(some, [min(brief, length)] * len(some)))
    assert own.stats.resident == RESIDENT

    def cycle(count: int) -> list[str]:
        return [names[number % RESIDENT] for number in range(count)]

    rng = np.random.default_rng(0)
    lengths = mixed_lengths(8 * slots, length)
    alone = min(4, slots)

    def static() -> None:
        for start in range(0, len(lengths), slots):
            part = lengths[start : start + slots]
            complete(own, loads(cycle(len(part)), part))

    def one_by_one(engine: Engine) -> None:
        for request in loads(["0"] * alone):
            complete(engine, [request])

    # What differs by a few hundredths takes more rounds.
    seconds = common.rounds(
        {
            "own": lambda: complete(own, loads(cycle(slots))),
            "shared": lambda: complete(shared, loads([None] * slots)),
            "plain": lambda: complete(bare, loads([None] * slots)),
            "resident_1": lambda: complete(own, loads(["0"] * slots)),
            "resident_2000": lambda: complete(own, loads(rng.choice(names, slots).tolist())),
        },
        4 * bench.repetitions,
    )
    seconds |= common.rounds(
        {
            "at_once": lambda: complete(own, loads(cycle(slots))),
            "one_by_one": lambda: one_by_one(own),
            "one_slot": lambda: one_by_one(single),
            "continuous": lambda: complete(own, loads(cycle(len(lengths)), lengths)),
            "static": static,
        },
        bench.repetitions,
    )
    # Tokens of one run of each.
    tokens = dict.fromkeys(seconds, slots * length)
    tokens |= dict.fromkeys(("one_by_one", "one_slot"), alone * length)
    tokens |= dict.fromkeys(("continuous", "static"), sum(lengths))
    timings = {name: common.summarize(x) for name, x in seconds.items()}
    rates = {name: tokens[name] / timing.median for name, timing in timings.items()}
    per_token = {name: [x / tokens[name] for x in own] for name, own in seconds.items()}

    def ratio(name: str, other: str) -> float:
        return common.times_as_fast(per_token[name], per_token[other])

    over_one_slot = ratio("at_once", "one_slot")
    rows: list[tuple[str, ...]] = [("", "seconds", "spread", "tokens/s")]
    for name, label in (
        ("own", f"{slots} requests, {slots} adapters"),
        ("shared", "one adapter for all"),
        ("plain", "without an adapter"),
        ("resident_1", f"one adapter of {RESIDENT:,} on the device"),
        ("resident_2000", f"adapters drawn from {RESIDENT:,}"),
        ("at_once", f"{slots} requests at once"),
        ("one_by_one", f"{alone} requests one after another"),
        ("one_slot", "the same by an engine of one slot"),
        ("continuous", f"{len(lengths)} requests of mixed lengths"),
        ("static", f"the same in batches of {slots}"),
    ):
        rows.append((label, *common.timing_cells(timings[name]), f"{rates[name]:.0f}"))
    return Part(
        [
            common.table(rows),
            f"against an engine of one slot {over_one_slot:.2f} times, warm-up "
            f"{warm_up_seconds:.1f} s",
        ],
        {
            "own_over_shared": ratio("own", "shared"),
            "own_over_plain": ratio("own", "plain"),
            "resident_2000_over_1": ratio("resident_2000", "resident_1"),
            "concurrent_speedup": ratio("at_once", "one_by_one"),
            "continuous_speedup": ratio("continuous", "static"),
        },
        {
            "over_one_slot": over_one_slot,
            "tokens_per_s": rates,
            "warm_up_seconds": warm_up_seconds,
            "seconds": {name: timing._asdict() for name, timing in timings.items()},
        },
    )
