"""The adapter interface: an adapter is a NamedTuple of pure functions of one site.

A site is a named linear map of the model.  What is trained is an **offset from identity**: zeros
are the base model, so weight decay pulls toward it, the reference policy is the same parameters
with a zero adapter, and adapters mix linearly.  A whole adapter is a flat dict from site name
(``h.0.attn.c_proj``) to the site's arrays, a pytree of a few kilobytes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from grpocem_jax.utils.errors import InputError

Factors = Any
SiteOffsets = Any
Offsets = dict[str, SiteOffsets]
"""What is trained: by site name what `Adapter.init` gives, of SVF float32 ``[k]``."""

Sites = Mapping[str, tuple[str, ...]]
"""Site name to the path of its kernel in the parameters (`Model.sites`, or a part of it)."""


class Adapter(NamedTuple):
    """Pure functions of one site; kernels are ``[in, out]``.

    Attributes:
      factor: ``(kernel) -> factors``, the frozen arrays that take the kernel's place. Done once, on
        the host.
      init: ``(key, factors) -> offsets``, the trainable arrays, at the base model.
      apply: ``(factors, offsets, x [..., in]) -> y [..., out]`` float32, the adapted map without
        bias. Must be traceable; everything around it is vmapped over samples and candidates.
      merge: ``(factors, offsets) -> kernel [in, out]``, a plain kernel for export with
        ``x @ kernel == apply(factors, offsets, x)``.
    """

    factor: Callable[[np.ndarray], Factors]
    init: Callable[[jax.Array, Factors], SiteOffsets]
    apply: Callable[[Factors, SiteOffsets, jax.Array], jax.Array]
    merge: Callable[[Factors, SiteOffsets], jax.Array]


def select_sites(sites: Sites, patterns: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The sites whose name ends in one of ``patterns`` (``attn.c_proj``: that map of every layer).

    Raises:
      InputError: a pattern that fits no site, with those there are; one string for a list.
    """
    if isinstance(patterns, str):
        raise InputError(f"adapter.sites={patterns!r}: must be a list; use [{patterns!r}].")
    selected: dict[str, tuple[str, ...]] = {}
    kinds = ", ".join(sorted({name.split(".", 2)[-1] for name in sites}))
    for pattern in patterns:
        found = {n: path for n, path in sites.items() if n == pattern or n.endswith(f".{pattern}")}
        if not found:
            llama = "; --config llama has those of a Llama" if "self_attn" in kinds else ""
            raise InputError(
                f"adapter.sites: {pattern!r} is no linear map of this model; choose from "
                f"{kinds}{llama}."
            )
        selected.update(found)
    if not selected:
        raise InputError(f"adapter.sites is empty; name at least one of {kinds}.")
    return selected


def get(params: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path of nested dicts, such as the factors of a site."""
    for part in path:
        params = params[part]
    return params


def _set(params: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return {**params, path[0]: _set(params[path[0]], path[1:], value)}


def factor_params(adapter: Adapter, params: Any, sites: Sites) -> Any:
    """Parameters with the kernel at every site replaced by its factors; the input is unchanged."""
    for path in sites.values():
        params = _set(params, path, adapter.factor(np.asarray(get(params, path))))
    return params


def init_adapter(adapter: Adapter, key: jax.Array, params: Any, sites: Sites) -> Offsets:
    """Offsets at the base model, one entry a site, for parameters made by `factor_params`."""
    keys = jax.random.split(key, len(sites))
    return {
        name: adapter.init(k, get(params, path))
        for k, (name, path) in zip(keys, sites.items(), strict=True)
    }


def merge_params(adapter: Adapter, params: Any, offsets: Offsets, sites: Sites) -> Any:
    """Plain parameters that give the adapted model without an adapter, for export."""
    for name, path in sites.items():
        params = _set(params, path, adapter.merge(get(params, path), offsets[name]))
    return params


def num_params(offsets: Offsets) -> int:
    """The number of trainable scalars."""
    return sum(int(np.size(x)) for x in jax.tree.leaves(offsets))
