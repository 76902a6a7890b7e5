"""Candidates per second of the Cross-Entropy Method.

    python -m benchmarks.cem [--config configs/gpt2.py] [--tokens 12] [--json] [--peers]

Times whole generations of `grpocem_jax.search` (asking, scoring, telling) on one random text: the
search of the config's population over all offsets, by likelihood.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import grpocem_jax as gj
from benchmarks import common
from grpocem_jax.config import make_method
from grpocem_jax.search import fitness
from grpocem_jax.utils.errors import InputError


def problem(subject: common.Subject, tokens: np.ndarray) -> tuple[fitness.Texts, int]:
    """The text to score and how many candidates at a time."""
    everywhere = jnp.ones((1, len(tokens)), bool)
    texts = fitness.Texts(jnp.asarray(tokens)[None], everywhere, everywhere)
    settings = subject.config.search
    chunk = settings.population_chunk or fitness.population_chunk(
        subject.config.cem.population_size, texts
    )
    return texts, chunk


def generation_products(
    subject: common.Subject, length: int, chunk: int, population: int
) -> list[common.Product]:
    """The products of one generation in the sizes in which they are run."""
    products = []
    whole, rest = divmod(population, chunk)
    for size, count in ((chunk, whole), (rest, 1)):
        if size and count:
            rows = size * (length - 1)
            products += common.linear_products(subject, rows, count, shared_rows=length - 1)
            products.append(common.head_product(subject, rows, count))
    return products


def generation(subject: common.Subject, tokens: np.ndarray) -> tuple[Any, Any]:
    """A function that runs one generation, and the first result, which has compiled it."""
    texts, chunk = problem(subject, tokens)
    attached = subject.attached
    score = fitness.Likelihood(attached.params, attached.model)

    def run() -> gj.search.SearchResult:
        return gj.maximize(
            make_method(subject.config),
            score,
            gj.full_space(attached.zero),
            texts,
            jax.random.key(0),
            generations=1,
            population_chunk=chunk,
        )

    return run, run()


def measure(
    settings: Any, *, length: int, repetitions: int, looped: int, peers: bool
) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark; returns the text to show and the JSON record."""
    subject = common.load(settings)
    config, population = subject.config, subject.config.cem.population_size
    if config.search.method != "cem":
        raise InputError(
            f"config.search.method={config.search.method!r}: this measures CEM; set it to 'cem'."
        )
    if length > subject.attached.model.context_length:
        raise InputError(
            f"--tokens={length}: the model's context is {subject.attached.model.context_length}; "
            "lower it."
        )
    tokens = common.random_tokens(subject, length)
    _, chunk = problem(subject, tokens)
    products = generation_products(subject, length, chunk, population)
    run, first = generation(subject, tokens)
    work = {"generation": run, "products": common.run_products(products, config.model.dtype)}
    if peers:
        work |= _peers(subject, tokens, population, looped)
    timings = common.alternate(work, repetitions)
    with common.PeakMemory() as memory:
        run()

    seconds = timings["generation"].median
    fraction = timings["products"].median / seconds
    scored = {"torch_loop": looped, "torch_batched": population}
    rates = {name: scored[name] / timings[name].median for name in scored if name in timings}
    arithmetic = common.arithmetic(products)
    rows: list[tuple[str, ...]] = [("", "seconds", "spread", "candidates/s", "GFLOP/s")]
    for name, count, label in (
        ("generation", population, f"one generation of {population}"),
        ("products", 0, "its matrix products alone"),
        ("torch_loop", looped, f"PyTorch, one after another ({looped})"),
        ("torch_batched", population, "PyTorch, in one factored batch"),
    ):
        if name in timings:
            seconds_of = timings[name].median
            rate = f"{count / seconds_of:.1f}" if count else ""
            speed = (
                f"{arithmetic / seconds_of / 1e9:.0f}" if name in work and count != looped else ""
            )
            rows.append((label, *common.timing_cells(timings[name]), rate, speed))
    extra = memory.extra_bytes
    lines = [
        common.headline(f"CEM, {population} candidates x {length} tokens", subject),
        f"chunk     {chunk} candidates at a time",
        "",
        common.table(rows),
        "",
        f"gemm_fraction       {fraction:.2f} of the speed of the products alone",
        f"compilation         {first.compile_seconds:.1f} s",
    ]
    if extra is not None:
        lines.append(
            f"memory              {extra / 1e6:.0f} MB beyond the weights ({memory.source})"
        )
    for name, other in rates.items():
        lines.append(f"against {name:<14}{population / seconds / other:.1f} times")
    record = {
        "candidates_per_s": population / seconds,
        "seconds_per_generation": seconds,
        "gemm_fraction": fraction,
        "compile_seconds": first.compile_seconds,
        "peers": rates,
        "population": population,
        "tokens": length,
        "population_chunk": chunk,
        "extra_bytes": extra,
        "extra_bytes_source": memory.source,
        "gemm_flops": arithmetic,
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "model": subject.source,
    }
    return "\n".join(lines), record


def _peers(
    subject: common.Subject, tokens: np.ndarray, population: int, looped: int
) -> dict[str, Any]:
    peers = common.import_peers()
    model = common.peer_model(subject)
    rng = np.random.default_rng(0)
    offsets = {
        site: subject.config.cem.noise_std
        * rng.standard_normal((population, *zero.shape)).astype(np.float32)
        for site, zero in subject.attached.zero.items()
    }
    limit = 1024 // len(tokens)
    return {
        "torch_loop": peers.torch_loop(model, tokens, offsets, min(looped, population)),
        "torch_batched": peers.torch_batched(
            model, tokens, offsets, chunk=None if limit >= population // 2 else max(1, limit)
        ),
    }


if __name__ == "__main__":
    common.define_flags()
    common.define_timing_flags()
    flags.DEFINE_integer("tokens", 12, "Tokens of the text; all but the first are scored.", 2)
    flags.DEFINE_integer("looped", 10, "Candidates of a repetition of the PyTorch loop.", 1)
    common.run(
        lambda flag: measure(
            flag.config,
            length=flag.tokens,
            repetitions=flag.repetitions,
            looped=flag.looped,
            peers=flag.peers,
        )
    )
