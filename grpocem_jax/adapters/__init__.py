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
from grpocem_jax.adapters.lora import lora
from grpocem_jax.adapters.svf import SVFFactors, cached_svd, singular_values, svd, svf

ADAPTERS = {"svf": svf, "lora": lora}
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
    "each_site",
    "factor_params",
    "get",
    "init_adapter",
    "lora",
    "merge_params",
    "num_params",
    "select_sites",
    "singular_values",
    "svd",
    "svf",
]
