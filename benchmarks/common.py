"""What the benchmarks share: the subject, the clock, the plain products, and the output."""

import dataclasses
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh

from grpocem_jax import adapters
from grpocem_jax.config import AdapterConfig, Config, commands, parse_config, section
from grpocem_jax.models import base, hub
from grpocem_jax.rollouts.policy import attach
from grpocem_jax.runs import metrics
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError


class Subject(NamedTuple):
    """What is measured: a config, and its model with a zero adapter on the device, or devices."""

    config: Config
    source: str
    pretrained: hub.Pretrained
    attached: adapters.Attached
    mesh: Mesh | None = None


class Timing(NamedTuple):
    """Seconds of several repetitions."""

    median: float
    low: float
    high: float
    repetitions: int


class Spent(NamedTuple):
    """Seconds of the clock, and of all processors together."""

    wall: float
    processor: float


class Product(NamedTuple):
    """``repeats`` matrix products of ``[rows, inner]`` by ``[inner, columns]``."""

    rows: int
    inner: int
    columns: int
    repeats: int

    @property
    def arithmetic(self) -> int:
        """Floating-point operations of all of them; a multiplication and an addition are two."""
        return 2 * self.rows * self.inner * self.columns * self.repeats


def define_flags(config: str = "gpt2") -> None:
    """The flags that every benchmark has; ``config`` is the default of ``--config``."""
    commands.define_config(config)
    flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


def define_timing_flags() -> None:
    """The flags of those that measure time."""
    flags.DEFINE_integer("repetitions", 5, "Timed repetitions, after one to warm up.", 1)
    flags.DEFINE_bool("peers", False, "Also run what one would use instead (the peers extra).")


def load(settings: ml_collections.ConfigDict) -> Subject:
    """Loads the model of a config; the name of a published shape stands for the shape.

    Speed does not depend on the weights, so nothing is fetched for it.

    Raises:
      InputError: settings or a model that cannot be used.
    """
    config, source = _parse(settings)
    pretrained = hub.load_model(source, seed=config.seed)
    attached = attach(pretrained, config)
    return Subject(config, source, pretrained, attached)


def outline(settings: ml_collections.ConfigDict) -> Subject:
    """As `load`, to compile for and not to run: parameters are shapes, and take no memory.

    They are those of the devices among which training would divide a step.

    Raises:
      InputError: settings that cannot be used, a model that is no published shape and no
        ``random:SHAPE``, or an adapter that is not of singular values.
    """
    config, source = _parse(settings)
    if not source.startswith("random:"):
        raise InputError(
            f"config.model.source={source!r}: only shapes can be measured without weights; give "
            "random:SHAPE."
        )
    if config.adapter.type != "svf":
        raise InputError(
            f"config.adapter.type={config.adapter.type!r}: only 'svf' can be measured without "
            "weights; use that."
        )
    mesh = devices.sharing(config.prompts_per_step, weight_shards=config.model.weight_shards)
    pretrained = hub.load_outline(source)
    method = adapters.svf(
        rank_ratio=config.adapter.rank_ratio, tail=config.adapter.tail, svd=_no_decomposition
    )

    def factor(key: jax.Array, kernel: np.ndarray) -> adapters.SVFFactors:
        factors = method.factor(key, kernel)
        u, vt = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (factors.u, factors.vt))
        return factors._replace(u=u, vt=vt)

    model = pretrained.build(method.apply)
    with section("adapter", AdapterConfig):
        sites = adapters.select_sites(model.sites, config.adapter.sites)
    params = adapters.factor_params(method._replace(factor=factor), pretrained.params, sites)
    zero = adapters.init_adapter(method, jax.random.key(0), params, sites)
    params = jax.eval_shape(lambda x: base.cast_params(x, jnp.dtype(config.model.dtype)), params)
    if mesh is not None:
        params = jax.tree.map(
            lambda x: x.update(sharding=devices.weights_place(mesh, x.shape)), params
        )
    attached = adapters.Attached(model, params, method, sites, devices.replicate(mesh, zero))
    return Subject(config, source, pretrained, attached, mesh)


def _parse(settings: ml_collections.ConfigDict) -> tuple[Config, str]:
    """The config, and the source of its model."""
    # A program found on disk would hide what compilation takes.
    jax.config.update("jax_enable_compilation_cache", False)
    config = parse_config(settings)
    dtype = devices.matrix_dtype(config.model.dtype)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    source = config.model.source
    name = source.rpartition("/")[2].lower()
    if name in hub.SHAPES and not Path(source).is_dir():
        source = f"random:{name}"
    return config, source


def _no_decomposition(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of the shapes of an SVD, with singular values of 1."""
    rows, columns = kernel.shape
    rank = min(rows, columns)
    ones = np.broadcast_to(np.float32(1), (rows, rank)), np.ones(rank, np.float32)
    return *ones, np.broadcast_to(np.float32(1), (rank, columns))


def random_tokens(subject: Subject, *shape: int, seed: int = 0) -> np.ndarray:
    """Tokens drawn from the whole vocabulary, int32."""
    size = subject.attached.model.vocab_size
    return np.random.default_rng(seed).integers(0, size, shape, np.int32)


def alternate(functions: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, Timing]:
    """Times functions in turn, see `rounds`."""
    return {name: summarize(x) for name, x in rounds(functions, repetitions).items()}


def rounds(functions: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of functions in turn, so that what slows the machine down slows all of them.

    Each runs once before, untimed. JAX arrays that one returns are waited for.
    """
    spent = clocked_rounds(functions, repetitions)
    return {name: [x.wall for x in own] for name, own in spent.items()}


def clocked_rounds(
    functions: Mapping[str, Callable[[], Any]], repetitions: int
) -> dict[str, list[Spent]]:
    """As `rounds`, by two clocks."""
    spent: dict[str, list[Spent]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            if repetition:
                now = time.perf_counter() - wall, time.process_time() - processor
                spent[name].append(Spent(*now))
    return spent


def times_as_fast(seconds: Sequence[float], other: Sequence[float]) -> float:
    """The median, over rounds, of how many times as long the other takes."""
    return statistics.median(y / x for x, y in zip(seconds, other, strict=True))


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and spread of some times."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def compile_ahead(function: Any, *args: Any, **static: Any) -> tuple[Callable[..., Any], float]:
    """A jitted function's compiled program and the seconds to trace and compile it."""
    started = time.perf_counter()
    program = function.lower(*args, **static).compile()
    return program, time.perf_counter() - started


def linear_products(
    subject: Subject, rows: int, count: int = 1, *, shared_rows: int = 0
) -> list[Product]:
    """The products of the model's linear maps for ``rows`` tokens, without the head.

    A factored map is two; attention's own products are left out.

    Args:
      subject: the model.
      rows: tokens.
      count: how often.
      shared_rows: rows of the maps before the first adapted one, where all candidates share their
        input; 0 where they do not.
    """
    found: dict[tuple[int, int, int], int] = {}
    attached = subject.attached
    shared = shared_rows > 0
    for site, path in attached.model.sites.items():
        shared = shared and site not in attached.sites
        leaf = attached.params
        for part in path:
            leaf = leaf[part]
        for matrix in jax.tree.leaves(leaf):
            if matrix.ndim == 2:
                shape = (shared_rows if shared else rows, *matrix.shape)
                found[shape] = found.get(shape, 0) + 1
    return [Product(*shape, count * n) for shape, n in found.items()]


def head_product(subject: Subject, rows: int, count: int = 1) -> Product:
    """The product of the head for ``rows`` tokens."""
    attached = subject.attached
    hidden = jax.eval_shape(
        lambda p: attached.model.forward(p, {}, jnp.zeros(2, jnp.int32), jnp.ones(2, bool)),
        subject.pretrained.params,
    )
    return Product(rows, hidden.shape[-1], attached.model.vocab_size, count)


def run_products(products: Sequence[Product], dtype: str) -> Callable[[], Any]:
    """A function that does all of them, one after the other, and nothing else."""
    multiply = jax.jit(lambda x, y: base.dense(y, x))
    key = jax.random.key(0)
    work: list[tuple[Any, jax.Array, jax.Array, int]] = []
    for rows, inner, columns, repeats in products:
        x = jax.random.normal(key, (rows, inner), dtype)
        y = jax.random.normal(key, (inner, columns), dtype)
        work.append((multiply.lower(x, y).compile(), x, y, repeats))

    def run() -> None:
        for program, x, y, count in work:
            for _ in range(count):
                program(x, y).block_until_ready()

    return run


def arithmetic(products: Sequence[Product]) -> int:
    """Floating-point operations of products."""
    return sum(product.arithmetic for product in products)


class PeakMemory:
    """The most memory that the process took inside a ``with`` block, beyond what it had before.

    Attributes:
      extra_bytes: afterwards; None where the system does not tell.
      source: where the figure is from.
    """

    extra_bytes: int | None = None
    source = "unknown: neither the device nor the system reports it"

    def __enter__(self) -> "PeakMemory":
        self._before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except OSError:
            self._before = None
        stats = jax.local_devices()[0].memory_stats()
        self._device = None if stats is None else stats.get("bytes_in_use")
        return self

    def __exit__(self, *error: object) -> None:
        if self._device is not None:
            self.extra_bytes = (metrics.peak_memory_bytes() or 0) - self._device
            self.source = "peak_bytes_in_use of the device's allocator, less bytes_in_use before"
        elif self._before is not None:
            self.extra_bytes = (_resident("VmHWM") or 0) - self._before
            self.source = "resident high-water mark of the process, less what it had before"


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(field + ":")), None)
    return None if line is None else int(line.split()[1]) * 1024


def parameter_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def headline(title: str, subject: Subject) -> str:
    """What is measured, and on what; the first lines of every benchmark."""
    environment = metrics.environment()
    versions = environment["versions"]
    note = ""
    if subject.source != subject.config.model.source:
        note = f" (the shape of {subject.config.model.source}; its weights are not fetched)"
    return (
        f"{title}\n"
        f"model     {subject.source}{note}, {subject.pretrained.num_params():,} parameters, "
        f"{subject.config.model.dtype}\n"
        f"adapter   {', '.join(subject.config.adapter.sites)}: {num_offsets(subject):,} offsets\n"
        f"machine   {environment['device_count']} x {environment['device']} "
        f"({platform.machine()}), JAX {versions['jax']}"
    )


def num_offsets(subject: Subject) -> int:
    """Trainable numbers of the adapter."""
    return sum(x.size for x in jax.tree.leaves(subject.attached.zero))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under each other; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{x:>{width}}" for x, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def timing_cells(timing: Timing, digits: int = 3) -> list[str]:
    """Cells of a table: the median in seconds, and its spread."""
    return [f"{timing.median:.{digits}f}", f"{timing.low:.{digits}f} - {timing.high:.{digits}f}"]


def show(text: str, record: Mapping[str, Any], as_json: bool) -> None:
    """Prints the table, and the JSON object as the last line where it is asked for."""
    print(text, flush=True)
    if as_json:
        print(json.dumps({**record, "environment": metrics.environment()}, allow_nan=False))
        sys.stdout.flush()


def run(measure: Callable[[flags.FlagValues], tuple[str, Mapping[str, Any]]]) -> None:
    """A benchmark's command: what it measures by its flags, shown.

    Args:
      measure: ``(flags) -> (table, record)``.
    """

    def main(argv: Sequence[str]) -> None:
        del argv
        show(*measure(flags.FLAGS), as_json=flags.FLAGS.json)

    commands.run(main)


def peer_model(subject: Subject) -> Any:
    """The same model in transformers, with the same weights."""
    pretrained = subject.pretrained
    return import_peers().load(
        pretrained.architecture.params_to_state(pretrained.params, pretrained.config),
        pretrained.architecture.config_to_hf(pretrained.config),
        precision=subject.config.model.dtype,
    )


def import_peers(module: str = "peers") -> ModuleType:
    """`benchmarks.peers`, which needs PyTorch and transformers, or ``peers_trl`` with TRL.

    Raises:
      InputError: they are not installed.
    """
    found, missing = find_peers(module)
    if found is None:
        raise InputError(f"--peers: {missing}, or leave --peers out.")
    return found


def find_peers(module: str) -> tuple[ModuleType | None, str]:
    """A module of the peers, or None and what to install for it."""
    try:
        return importlib.import_module(f"benchmarks.{module}"), ""
    except ImportError as error:
        return None, f"{error.name} is not installed; run `pip install -e '.[peers]'`"
