"""Fixtures of all tests, strict arrays, and how programs are compiled."""

import gc
import importlib.util
import os
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from grpocem_jax import experts
from grpocem_jax.runs import trained
from grpocem_jax.training import loop as training
from grpocem_jax.training import sweep
from tests import runs
from tests.parity import weights
from tests.tiny import Tiny, make_tiny

pytest_plugins = ("tests.browser", "tests.command_line", "tests.serving")

LONGEST = {
    f"test_{name}"
    for name in (
        *("examples", "benchmarks", "resume", "search_methods", "training"),
        *("sampling", "inference", "memory", "devices", "distributed", "sweep", "variants"),
        *("serving_engine", "serving_command", "serving_searches", "serving_page"),
    )
}

QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""Halves the time in which XLA compiles small programs for a CPU."""

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests of whole runs compile the same programs over and over, those of commands too.
for name, value in {
    "jax_compilation_cache_dir": str(runs.ROOT / ".pytest_cache" / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    # GPUs would otherwise round the operands of float32 products to 10 bits.
    "jax_default_matmul_precision": "highest",
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_configure(config: pytest.Config) -> None:
    """Compiles quickly, to slower programs; those of `make parity` are as users have them."""
    if "parity" not in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for commands
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest modules first, so that no worker ends with one while others are idle."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs evosax where there is none."""
    if item.get_closest_marker("evosax") and importlib.util.find_spec("evosax") is None:
        pytest.skip("evosax is not installed; use make parity")


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache() -> Iterator[None]:
    """Turns the cache of programs on again after a module that has called a benchmark."""
    yield
    if not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()  # which remembers whether it was on at the first program


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """JAX looks through all objects for what holds a leaked tracer: only those of the module."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_policy() -> Iterator[None]:
    """Runs of equal settings share one policy, and so its programs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trained, training, sweep, experts):
            patch.setattr(module, "load_policy", runs.one_policy)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Trainings in this process leave out their report page, which takes seconds to draw."""
    undrawn = types.SimpleNamespace(write=lambda workdir: workdir / "report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "report", undrawn)
        yield


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A GPT-2 of one layer."""
    return make_tiny(weights.SHAPES["small"] | {"n_layer": 1}, "attn.c_proj")


@pytest.fixture(scope="session")
def deep() -> Tiny:
    """A GPT-2 of two layers, for what a mistake in the order of layers would show."""
    return make_tiny(weights.SHAPES["small"], "attn.c_proj")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and the real GPT-2 tokenizer, beside the repository where there are any."""
    folder = runs.ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder.name}/ beside the repository")
    return folder
