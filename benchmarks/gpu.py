"""Everything worth knowing about a GPU, in one command.

    python -m benchmarks.gpu --out FOLDER [--small] [--only headline,decode]

Prints a table, and writes ``gpu.json`` and ``gpu.png`` into FOLDER.  GPT-2 124M's shape with random
weights, so nothing is fetched; the training is the built-in default's.  ``--small`` runs the same
stages at shapes that a CPU finishes in a minute.  No network, no ``datasets``.

The stages, in this order (``--only`` chooses among them):

    ceilings    matrix products alone: the rates that nothing can exceed
    headline    50 generations of 100 candidates x 12 tokens in one compiled call, by precision
    peers       the same candidates in one PyTorch batch, and transformers `generate`
    scaling     candidates/s against tokens and against the population
    own         a vector per row against one shared vector and against the plain model
    decode      tokens/s of rollouts at 64 and 512 rows
    step        a GRPO step at the report's settings, and its peak memory
    memory      a population that does not fit
    training    the default for 312 steps, its held-out gain, and a kill and resume

A stage that fails is reported, and the others still run; the exit status is then 1.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import grpocem_jax as gj
from grpocem_jax import grpo
from grpocem_jax.models import base, likelihood, sampling
from grpocem_jax.runs import metrics
from grpocem_jax.search import fitness

ROOT = Path(__file__).parent.parent

PRECISIONS = {
    "float32": ("float32", "highest"),
    "tf32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", "default"),
    "float16": ("float16", "default"),
}
"""By name: the dtype of the matrices, and JAX's precision of products of float32."""

DEFAULT_STEPS = 312
CPU_GAINS = {"heldout": (0.225, 0.187, 0.263), "heldout_greedy": (0.577, 0.507, 0.648)}
"""Held-out gain of the default with seed 0 on a CPU, with its 95% interval (README)."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of a run.

    Attributes:
      shape: what `load_model` takes.
      square: side of the square products.
      generations: of the headline.
      tokens: lengths of the scaling stage; the headline has the first.
      populations: sizes of the scaling stage.
      rows: of the decode stage; those of the own stage are the first.
      new_tokens: decoded a row.
      prompt: tokens of a prompt.
      step_tokens: tokens of a prompt and of a completion in the GRPO step.
      training_steps: optimizer steps of the default.
      repetitions: of whatever is timed.
      precisions: those of the ceilings, the headline and the peers.
      main: those of decoding and of the GRPO step; scaling and own vectors have the last.
    """

    shape: str = "random:gpt2"
    square: int = 8192
    generations: int = 50
    tokens: tuple[int, ...] = (12, 32, 64, 128, 256)
    populations: tuple[int, ...] = (10, 100, 1000, 4096)
    rows: tuple[int, ...] = (64, 512)
    new_tokens: int = 32
    prompt: int = 23
    step_tokens: tuple[int, int] = (192, 64)
    training_steps: int = DEFAULT_STEPS
    repetitions: int = 5
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    main: tuple[str, ...] = ("float32", "bfloat16")


SMALL = Sizes(
    shape="builtin",
    square=128,
    generations=2,
    tokens=(6, 12),
    populations=(4, 8),
    rows=(8, 16),
    new_tokens=4,
    prompt=5,
    step_tokens=(8, 4),
    training_steps=4,
    repetitions=2,
    precisions=("float32", "bfloat16"),
    main=("bfloat16",),
)
POPULATION = 100


class Bench:
    """The model in each precision, and how things are timed.

    Args:
      sizes: the shapes.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        pretrained = gj.load_model(sizes.shape)
        attached = gj.attach(pretrained, gj.svf(rank_ratio=0.8), ["attn.c_proj"])
        self.model, self.params, self.zero = attached.model, attached.params, attached.zero
        self.plain_model = pretrained.build()
        self.plain_params = pretrained.params
        self.parameters = pretrained.num_params()
        self._cast: dict[str, Any] = {}

    def cast(self, precision: str) -> Any:
        """The parameters in a precision; only those of the last one asked for are kept."""
        if precision not in self._cast:
            self._cast.clear()
            dtype = jnp.dtype(PRECISIONS[precision][0])
            self._cast[precision] = jax.block_until_ready(base.cast_params(self.params, dtype))
        return self._cast[precision]

    def time(self, function: Callable[[], Any]) -> float:
        """Median seconds of a function, after one call to warm up."""
        jax.block_until_ready(function())
        seconds = []
        for _ in range(self.sizes.repetitions):
            started = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def tokens(self, *shape: int, seed: int = 0) -> jax.Array:
        """Random tokens, int32."""
        drawn = np.random.default_rng(seed).integers(0, self.model.vocab_size, shape, np.int32)
        return jnp.asarray(drawn)


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 in the named precision inside the block."""
    with jax.default_matmul_precision(PRECISIONS[precision][1]):
        yield


def matmul_rate(bench: Bench, rows: int, inner: int, columns: int, dtype: str) -> float:
    """Operations per second of a product with a float32 result, many of them in one program."""
    x = jax.random.normal(jax.random.key(0), (rows, inner), dtype)
    y = jax.random.normal(jax.random.key(1), (inner, columns), dtype)
    work = 2 * rows * inner * columns
    count = max(4, min(64, int(2e13 / work))) if jax.default_backend() != "cpu" else 4

    @jax.jit
    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        def once(_: int, x: jax.Array) -> jax.Array:
            product = base.dense(y, x)
            # Each product needs the one before, and reads all of it.
            return x + (1e-9 * jnp.max(product, -1, keepdims=True)).astype(x.dtype)

        return jax.lax.fori_loop(0, count, once, x)

    return work * count / bench.time(lambda: run(x, y))


def ceilings(bench: Bench) -> dict[str, Any]:
    """Rates of matrix products: large squares, and the model's widest with a generation's rows."""
    side = bench.sizes.square
    width = hidden_width(bench)
    rows = POPULATION * (bench.sizes.tokens[0] - 1)
    result = {}
    for precision in bench.sizes.precisions:
        dtype = PRECISIONS[precision][0]
        with products_in(precision):
            result[precision] = {
                "square_tflops": matmul_rate(bench, side, side, side, dtype) / 1e12,
                "model_tflops": matmul_rate(bench, rows, width, 4 * width, dtype) / 1e12,
            }
    return {"square": side, "model": [rows, width, 4 * width], "rates": result}


def search_problem(bench: Bench, precision: str, length: int) -> tuple[Any, ...]:
    """Fitness, space and text of a search over all offsets."""
    everywhere = jnp.ones((1, length), bool)
    texts = fitness.Texts(bench.tokens(1, length), everywhere, everywhere)
    score = fitness.Likelihood(bench.cast(precision), bench.model)
    return score, gj.full_space(bench.zero), texts


def run_search(
    bench: Bench, precision: str, length: int, population: int, generations: int
) -> dict[str, Any]:
    """Seconds of a whole search in one compiled call, which is compiled before."""
    score, space, texts = search_problem(bench, precision, length)
    method = gj.CEM(population_size=population, threshold=0.0)
    chunk = fitness.population_chunk(population, texts)

    def run() -> gj.search.SearchResult:
        return gj.maximize(
            method,
            score,
            space,
            texts,
            jax.random.key(0),
            generations=generations,
            population_chunk=chunk,
        )

    with products_in(precision):
        first = run()
        seconds = statistics.median(run().seconds for _ in range(bench.sizes.repetitions))
    return {
        "seconds": seconds,
        "candidates_per_s": population * generations / seconds,
        "compile_seconds": first.compile_seconds,
        "chunk": chunk,
        "fitness": float(first.history.mean[-1]),
    }


def forward_flops(bench: Bench, rows: int) -> int:
    """Operations of the linear maps and the head for ``rows`` tokens."""
    blocks = {name: x for name, x in bench.params.items() if name.startswith("h_")}
    linear = sum(x.size for x in jax.tree.leaves(blocks) if x.ndim == 2)
    return 2 * rows * (linear + bench.model.vocab_size * hidden_width(bench))


def hidden_width(bench: Bench) -> int:
    """Width of the residual stream."""
    mask = jnp.ones(2, bool)
    return jax.eval_shape(
        lambda p: bench.model.forward(p, bench.zero, jnp.zeros(2, jnp.int32), mask), bench.params
    ).shape[-1]


def headline(bench: Bench) -> dict[str, Any]:
    """The report's second: 50 generations of 100 candidates x 12 tokens."""
    sizes = bench.sizes
    length = sizes.tokens[0]
    work = forward_flops(bench, POPULATION * (length - 1) * sizes.generations)
    result = {}
    for precision in sizes.precisions:
        found = run_search(bench, precision, length, POPULATION, sizes.generations)
        found["tflops"] = work / found["seconds"] / 1e12
        result[precision] = found
    return {"generations": sizes.generations, "tokens": length, "precisions": result}


def scaling(bench: Bench) -> dict[str, Any]:
    """Candidates/s against the tokens of the text and against the population."""
    sizes, precision = bench.sizes, bench.sizes.main[-1]
    by_tokens, by_population = {}, {}
    for length in sizes.tokens:
        by_tokens[length] = run_search(bench, precision, length, POPULATION, 2)["candidates_per_s"]
    for population in sizes.populations:
        rate = run_search(bench, precision, sizes.tokens[0], population, 2)["candidates_per_s"]
        by_population[population] = rate
    return {"precision": precision, "tokens": by_tokens, "population": by_population}


def rollouts(
    bench: Bench, precision: str, rows: int, *, kind: str = "shared"
) -> Callable[[], sampling.Rollouts]:
    """A function that decodes ``rows`` completions, none of which ends early.

    Args:
      bench: the models.
      precision: of the matrices.
      rows: completions; one of each prompt where every row has its own vector.
      kind: ``shared``: one vector, groups of 8; ``one``: one vector, groups of 1; ``own``: a vector
        a row; ``plain``: the model without an adapter, groups of 1.
    """
    group = 8 if kind == "shared" and rows % 8 == 0 else 1
    prompts = bench.tokens(rows // group, bench.sizes.prompt)
    params, offsets, model = bench.cast(precision), bench.zero, bench.model
    if kind == "own":
        offsets = own_vectors(bench, rows)
    elif kind == "plain":
        params = base.cast_params(bench.plain_params, jnp.dtype(PRECISIONS[precision][0]))
        offsets, model = {}, bench.plain_model
    keys = jax.random.split(jax.random.key(0), rows // group)
    mask, end_ids = jnp.ones(prompts.shape, bool), jnp.array([-1])
    return lambda: sampling.sample(
        params,
        offsets,
        prompts,
        mask,
        keys,
        end_ids,
        0.6,
        model=model,
        num_samples=group,
        max_new_tokens=bench.sizes.new_tokens,
        top_p=0.85,
        repetition_penalty=1.3,
        own_adapters=kind == "own",
    )


def own_vectors(bench: Bench, rows: int) -> Any:
    """Random offsets, one vector a row."""
    key = jax.random.key(1)
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(key, (rows, *x.shape)), bench.zero)


def scoring(bench: Bench, precision: str, rows: int, kind: str) -> Callable[[], jax.Array]:
    """A function that scores ``rows`` texts of prompt and completion, see `rollouts` for kinds."""
    tokens = bench.tokens(rows, bench.sizes.prompt + bench.sizes.new_tokens)
    params, model, axis, offsets = bench.cast(precision), bench.model, None, bench.zero
    if kind == "own":
        axis, offsets = 0, own_vectors(bench, rows)
    elif kind == "plain":
        params = base.cast_params(bench.plain_params, jnp.dtype(PRECISIONS[precision][0]))
        offsets, model = {}, bench.plain_model

    @jax.jit
    def score(params: Any, offsets: Any, tokens: jax.Array) -> jax.Array:
        def one(offsets: Any, row: jax.Array) -> jax.Array:
            hidden = model.forward(params, offsets, row[:-1], jnp.ones(len(row) - 1, bool))
            return likelihood.token_logps(model, params, hidden, row[1:], 1.0)[0]

        return jax.vmap(one, in_axes=(axis, 0))(offsets, tokens)

    return lambda: score(params, offsets, tokens)


def own(bench: Bench) -> dict[str, Any]:
    """Rows with a vector each, against one vector for all, against the plain model."""
    rows = bench.sizes.rows[-1]
    precision = bench.sizes.main[-1]
    result: dict[str, Any] = {"rows": rows, "precision": precision}
    for work, make in (("decode", rollouts), ("scoring", scoring)):
        seconds = {}
        for kind in ("own", "one", "plain"):
            function = make(bench, precision, rows, kind=kind)
            with products_in(precision):
                seconds[kind] = bench.time(function)
        result[work] = {
            "seconds": seconds,
            "own_over_shared": seconds["one"] / seconds["own"],
            "own_over_plain": seconds["plain"] / seconds["own"],
        }
    return result


def decode(bench: Bench) -> dict[str, Any]:
    """Tokens per second of rollouts."""
    result: dict[str, Any] = {}
    for precision in bench.sizes.main:
        result[precision] = {}
        for rows in bench.sizes.rows:
            with products_in(precision):
                seconds = bench.time(rollouts(bench, precision, rows))
            result[precision][rows] = rows * bench.sizes.new_tokens / seconds
    return {"new_tokens": bench.sizes.new_tokens, "tokens_per_s": result}


def step(bench: Bench) -> dict[str, Any]:
    """A GRPO step at the report's settings: 8 prompts x 8 completions, micro-batch 16."""
    prompt, length = bench.sizes.step_tokens
    parts = {
        "objective": grpo.clipped(),
        "optimizer": grpo.adamw(),
        "beta": 0.01,
        "entropy": 0.08,
        "micro_batch": 16,
    }
    result: dict[str, Any] = {}
    for precision in bench.sizes.main:
        params = bench.cast(precision)
        prompts = bench.tokens(8, prompt)
        mask, temperature = jnp.ones(prompts.shape, bool), jnp.float32(0.6)
        settings = {
            "model": bench.model,
            "num_samples": 8,
            "max_new_tokens": length,
            "top_p": 0.85,
            "repetition_penalty": 1.3,
        }
        arguments = (
            params,
            bench.zero,
            prompts,
            mask,
            jax.random.split(jax.random.key(0), 8),
            jnp.array([-1]),
            temperature,
        )
        with products_in(precision):
            sample = jax.jit(sampling.sample, static_argnames=tuple(settings))
            rollout = sample.lower(*arguments, **settings).compile()
            out = rollout(*arguments)
            rewards = jnp.sum(out.tokens % 2 == 1, -1) / length
            advantages = grpo.outcome_advantages(rewards, out.mask)
            batch = grpo.Batch(
                prompts,
                mask,
                out.tokens,
                out.mask,
                out.logps,
                advantages,
                grpo.token_weights(out.mask),
            )
            state = grpo.init_state(bench.zero, grpo.adamw())
            update = (
                jax.jit(grpo.update, static_argnames=grpo.STATIC)
                .lower(state, params, batch, temperature, model=bench.model, **parts)
                .compile()
            )
            seconds = {
                "rollouts": bench.time(functools.partial(rollout, *arguments)),
                "update": bench.time(functools.partial(update, state, params, batch, temperature)),
            }
        result[precision] = {
            **seconds,
            "seconds": sum(seconds.values()),
            "rollouts_bytes": program_bytes(rollout),
            "update_bytes": program_bytes(update),
            "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
            "allocator_peak_bytes": metrics.peak_memory_bytes(),
        }
    return {"prompt": prompt, "tokens": length, "precisions": result}


def program_bytes(program: Any) -> int | None:
    """What a compiled program has in memory at its peak, by the compiler's account."""
    sizes = program.memory_analysis()
    if sizes is None:
        return None
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def memory(bench: Bench) -> dict[str, Any]:
    """A population scored at once that the device cannot hold: the sentence, and smaller chunks."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return {"skipped": "the backend does not say how much memory it has"}
    precision = bench.sizes.precisions[0]
    score, space, texts = search_problem(bench, precision, bench.sizes.tokens[0])
    # The offsets of the candidates take a sixteenth of the memory; scoring them takes far more.
    vector = sum(x.nbytes for x in jax.tree.leaves(bench.zero))
    population = int(stats["bytes_limit"] / 16 / vector)
    result: dict[str, Any] = {"population": population, "bytes_limit": stats["bytes_limit"]}
    method = gj.CEM(population_size=population, threshold=0.0)
    run = functools.partial(
        gj.maximize, method, score, space, texts, jax.random.key(0), generations=1
    )
    try:
        run(population_chunk=population)
        result["sentence"] = None
    except gj.InputError as error:
        result["sentence"] = str(error)
    found = run(population_chunk=population, fit_memory=True)
    result["chunk"] = found.population_chunk
    result["fitness"] = float(found.history.mean[-1])
    return result


def peers(bench: Bench) -> dict[str, Any]:
    """PyTorch's batched population and transformers' `generate`, in the same precision."""
    try:
        from benchmarks import peers as torch_peers
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed"}
    sizes = bench.sizes
    pretrained = gj.load_model(sizes.shape)
    tokens = np.asarray(bench.tokens(sizes.tokens[0]))
    rng = np.random.default_rng(0)
    offsets = {
        site: 0.3 * rng.standard_normal((POPULATION, *zero.shape)).astype(np.float32)
        for site, zero in bench.zero.items()
    }
    result: dict[str, Any] = {}
    for precision in sizes.precisions:
        model = torch_peers.load(
            pretrained.architecture.params_to_state(pretrained.params, pretrained.config),
            pretrained.architecture.config_to_hf(pretrained.config),
            precision=precision,
        )
        score = torch_peers.torch_batched(model, tokens, offsets)
        generate = torch_peers.transformers_generate(
            model,
            np.asarray(bench.tokens(sizes.rows[0] // 8, sizes.prompt)),
            8,
            sizes.new_tokens,
            0.6,
            0.85,
            1.3,
        )
        decoded = sizes.rows[0] * sizes.new_tokens
        result[precision] = {
            "candidates_per_s": POPULATION / bench.time(score),
            "generate_tokens_per_s": decoded / bench.time(generate),
        }
    return {"rows": sizes.rows[0], "precisions": result}


def training(bench: Bench, out: Path) -> dict[str, Any]:
    """The default from the command; then again, killed in the middle and continued."""
    steps = bench.sizes.training_steps
    every = max(1, steps // 10)
    options = [
        f"--config.train.max_steps={steps}",
        f"--config.train.checkpoint_every_steps={every}",
    ]
    if steps < DEFAULT_STEPS:
        options += ["--config.data.heldout_samples=4", "--config.train.eval_samples=1"]
    whole, killed = out / "whole", out / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    environment = {
        **os.environ,
        # The second process finds the first one's programs.
        "JAX_COMPILATION_CACHE_DIR": str(out / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # This process holds most of the memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }

    def command(workdir: Path) -> list[str]:
        train = str(ROOT / "train.py")
        return [sys.executable, train, "--config=tiny", f"--workdir={workdir}", *options]

    started = time.perf_counter()
    _train(command(whole), environment)
    seconds = time.perf_counter() - started
    process = subprocess.Popen(
        command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        done = _wait_for_checkpoint(killed / "checkpoints", steps // 3, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _train(command(killed), environment)
    summary = json.loads((whole / "summary.json").read_text())
    resumed = json.loads((killed / "summary.json").read_text())
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed)
    )
    difference = max(float(np.abs(first[name] - second[name]).max()) for name in first)
    result: dict[str, Any] = {
        "steps": summary["steps"],
        "seconds": seconds,
        "train_seconds": summary["train_seconds"],
        "compile_seconds": summary["compile_seconds"],
        "killed_at_checkpoint": done,
        "resumed_after_step": resumed["resumed_after_step"],
        "resumed_difference": difference,
    }
    for name, (gain, low, high) in CPU_GAINS.items():
        found = summary[name]["overall"]
        result[name] = {
            "gain": found["gain"],
            "gain_ci95": found["gain_ci95"],
            "cpu_gain": gain,
            "cpu_gain_ci95": [low, high],
            "agrees": low <= found["gain"] <= high if steps == DEFAULT_STEPS else None,
        }
    return result


def _train(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr[-2000:]}")


def _wait_for_checkpoint(folder: Path, least: int, process: subprocess.Popen[bytes]) -> int:
    """Waits until a run has a checkpoint of at least so many steps; which one it was."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        saved = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        if saved and max(saved) >= least:
            return max(saved)
        time.sleep(0.02)
    raise RuntimeError(f"the run had no checkpoint of {least} steps before it ended")


def card() -> dict[str, Any]:
    """The device, its driver, and versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    described = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        described = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {**metrics.environment(), "machine": platform.machine(), "nvidia_smi": described}


def stages(bench: Bench, out: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is run, in order."""
    functions = (ceilings, headline, peers, scaling, own, decode, step, memory)
    return {
        **{f.__name__: functools.partial(f, bench) for f in functions},
        "training": functools.partial(training, bench, out),
    }


def lines(record: dict[str, Any]) -> list[str]:
    """The table: a line for each figure."""
    found: list[str] = []

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, x in value.items():
                walk(f"{path} {name}".strip(), x)
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            found.append(f"{path:<58} {shown}")

    for stage, result in record["stages"].items():
        found.append("")
        walk(stage, result)
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws what can be drawn of a record."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {name: x for name, x in record["stages"].items() if "error" not in x}
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    device = record["environment"]["device"]
    figure.suptitle(f"grpocem_jax on {device}, JAX {record['environment']['versions']['jax']}")
    names = list(PRECISIONS)
    for axis, stage, title, pick in (
        (axes[0, 0], "headline", "search of the report: seconds", lambda x: x["seconds"]),
        (axes[0, 1], "step", "GRPO step of the report: seconds", lambda x: x["seconds"]),
    ):
        found = results.get(stage, {}).get("precisions", {})
        shown = [name for name in names if name in found]
        bars = axis.bar(shown, [pick(found[name]) for name in shown], color="#35608d")
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
    for axis, key, label in (
        (axes[1, 0], "tokens", "tokens of the text (100 candidates)"),
        (axes[1, 1], "population", "population"),
    ):
        found = results.get("scaling", {})
        if key in found:
            axis.loglog(
                list(map(int, found[key])), list(found[key].values()), "o-", color="#35608d"
            )
            axis.set_title(f"candidates/s, {found['precision']}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.png")
    parser.add_argument("--small", action="store_true", help="shapes for a CPU")
    parser.add_argument("--only", default="", help="stages, with commas between them")
    values = parser.parse_args(argv)
    values.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(SMALL if values.small else Sizes())
    chosen = stages(bench, values.out.resolve())
    asked = [name for name in values.only.split(",") if name] or list(chosen)
    unknown = sorted(set(asked) - set(chosen))
    if unknown:
        parser.error(f"--only={unknown[0]}: there is no such stage; they are {', '.join(chosen)}")
    record: dict[str, Any] = {
        "environment": card(),
        "sizes": dataclasses.asdict(bench.sizes),
        "parameters": bench.parameters,
        "offsets": sum(x.size for x in jax.tree.leaves(bench.zero)),
        "stages": {},
        "seconds": {},
    }
    environment = record["environment"]
    print(
        f"{environment['device']} ({environment['nvidia_smi'] or environment['platform']}), "
        f"JAX {environment['versions']['jax']}, {bench.sizes.shape}, "
        f"{record['offsets']:,} offsets of {bench.parameters:,} parameters",
        flush=True,
    )
    failed = False
    for name in asked:
        started = time.perf_counter()
        try:
            record["stages"][name] = chosen[name]()
        except Exception as error:  # one stage must not take the others with it
            traceback.print_exc()
            record["stages"][name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed = True
        record["seconds"][name] = time.perf_counter() - started
        print(f"{name}: {record['seconds'][name]:.0f} s", file=sys.stderr, flush=True)
        # What was measured outlives whatever stops the rest.
        (values.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines(record)))
    plot(record, values.out / "gpu.png")
    print(json.dumps(record))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
