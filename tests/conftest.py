"""What all tests share: strict arrays, small random models, and the shared folder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from grpocem_jax.adapters import base as adapters
from grpocem_jax.adapters import svf
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
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
      method: the adapter, ``svf()``.
      sites: the adapted sites, the attention's output of every layer.
      factored: parameters with factors at the sites.
      model: model functions that carry the adapter, for ``factored``.
      zero: offsets of the base model; 32 a site at width 40.
    """

    architecture: models.Architecture
    config: Any
    params: models.Params
    base: models.Model
    method: adapters.Adapter
    sites: adapters.Sites
    factored: models.Params
    model: models.Model
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
    state = module.params_from_state(weights.state(fields), config, "tiny")
    params = models.cast_params(state, jnp.float32)
    method = svf.svf()
    model = module.build(config, method.apply)
    sites = adapters.select_sites(model.sites, [site])
    factored = adapters.factor_params(method, params, sites)
    zero = adapters.init_adapter(method, jax.random.key(0), factored, sites)
    plain = module.build(config)
    return Tiny(module, config, params, plain, method, sites, factored, model, zero)


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
