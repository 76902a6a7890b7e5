"""Adapters: a small trainable pytree behind pure functions."""

from grpocem_jax.adapters.attach import AdapterError, Attached, attach, calling
from grpocem_jax.adapters.base import (
    Adapter,
    Factors,
    Merged,
    Offsets,
    SiteOffsets,
    Sites,
    each_site,
    factor_params,
    get,
    init_adapter,
    merge_params,
    num_params,
    select_sites,
)
from grpocem_jax.adapters.checks import check_adapter
from grpocem_jax.adapters.grasp import grasp, stoch_grasp
from grpocem_jax.adapters.hut import hut
from grpocem_jax.adapters.increlora import increlora
from grpocem_jax.adapters.lora import lora
from grpocem_jax.adapters.lora_xs import lora_xs
from grpocem_jax.adapters.merging import combine, compete, project
from grpocem_jax.adapters.scales import ia3, steering
from grpocem_jax.adapters.svf import SVFFactors, cached_svd, singular_values, svd, svf
from grpocem_jax.adapters.tera import tera
from grpocem_jax.adapters.tinylora import tinylora
from grpocem_jax.adapters.vera import vera

ADAPTERS = {
    "svf": svf,
    "lora": lora,
    "grasp": grasp,
    "hut": hut,
    "ia3": ia3,
    "increlora": increlora,
    "lora_xs": lora_xs,
    "steering": steering,
    "stoch_grasp": stoch_grasp,
    "tera": tera,
    "tinylora": tinylora,
    "vera": vera,
}
"""Adapters by the names that configs have for them."""

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterError",
    "Attached",
    "Factors",
    "Merged",
    "Offsets",
    "SVFFactors",
    "SiteOffsets",
    "Sites",
    "attach",
    "cached_svd",
    "calling",
    "check_adapter",
    "combine",
    "compete",
    "each_site",
    "factor_params",
    "get",
    "grasp",
    "hut",
    "ia3",
    "increlora",
    "init_adapter",
    "lora",
    "lora_xs",
    "merge_params",
    "num_params",
    "project",
    "select_sites",
    "singular_values",
    "steering",
    "stoch_grasp",
    "svd",
    "svf",
    "tera",
    "tinylora",
    "vera",
]
