"""What all tests share: strict arrays, small random models, and the shared folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from grpocem_jax import adapters
from grpocem_jax.config import Config
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from grpocem_jax.rollouts.policy import Policy, load_policy
from tests.parity import weights

pytest_plugins = ("tests.command_line",)

ROOT = Path(__file__).parents[1]
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
"""What JAX says where device memory runs out."""
SITES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests of whole runs compile the same programs over and over.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# GPUs would otherwise round the operands of float32 products to 10 bits.
jax.config.update("jax_default_matmul_precision", "highest")


class Tiny(NamedTuple):
    """A random model of 2 layers and width 40 or less that carries a zero SVF adapter.

    Attributes:
      architecture: its module.
      config: its shape.
      params: plain float32 parameters.
      base: model functions without an adapter, for ``params``.
      model: model functions that carry the adapter, for ``factored``.
      factored: parameters with factors at the sites.
      adapter: the adapter, ``svf()``.
      sites: the adapted sites, the attention's output of every layer.
      zero: offsets of the base model; 32 a site at width 40.
    """

    architecture: models.Architecture
    config: Any
    params: models.Params
    base: models.Model
    model: models.Model
    factored: models.Params
    adapter: adapters.Adapter
    sites: adapters.Sites
    zero: adapters.Offsets

    def adapted(self, seed: int = 1, scale: float = 0.3) -> Any:
        """Random offsets, normal with the given standard deviation."""
        keys = jax.random.split(jax.random.key(seed), len(self.zero))
        return {
            name: scale * jax.random.normal(key, self.zero[name].shape)
            for key, name in zip(keys, self.zero, strict=True)
        }


def make_tiny(fields: Any, site: str) -> Tiny:
    """The model of some fields of a config.json, adapted at one map of every layer."""
    module = hub.ARCHITECTURES[fields["model_type"]]
    config = module.config_from_hf(fields, "tiny")
    params = module.params_from_state(weights.state(fields), config, "tiny")
    loaded = hub.Pretrained("tiny", "folder", module, config, params, None, ())
    attached = adapters.attach(loaded, adapters.svf(), [site])
    return Tiny(
        module, config, models.cast_params(params, jnp.float32), module.build(config), *attached
    )


def sharing_policies() -> Callable[..., Policy]:
    """A `load_policy` that loads one policy for equal settings, so that programs are shared."""
    known: dict[Any, Policy] = {}

    def load(config: Config, *, adapter: Any = None, mesh: Any = None) -> Policy:
        stop, keep = config.generation.stop, config.generation.keep_special_tokens
        key = (config.model, config.adapter, stop, keep, config.seed, adapter, mesh)
        if key not in known:
            known[key] = load_policy(config, adapter=adapter, mesh=mesh)
        return known[key]

    return load


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A GPT-2."""
    return make_tiny(weights.SHAPES["small"], "attn.c_proj")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and the real GPT-2 tokenizer, beside the repository where there are any."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder.name}/ beside the repository")
    return folder
