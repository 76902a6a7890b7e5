"""Small random models, with an adapter that changes nothing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpocem_jax import adapters
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from tests.parity import weights

SITES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Tiny(NamedTuple):
    """A random model of width 40 or less that carries a zero SVF adapter.

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

    @property
    def pretrained(self) -> hub.Pretrained:
        """The model without an adapter, as `adapters.attach` takes one."""
        params = jax.device_get(self.params)
        return hub.Pretrained("tiny", "folder", self.architecture, self.config, params, None, ())

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
