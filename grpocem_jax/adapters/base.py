"""The adapter interface: an adapter is a NamedTuple of pure functions.

A site is a named linear map of the model.  What is trained is an **offset from identity**: zeros
are the base model, so weight decay pulls toward it, the reference policy is the same parameters
with zero offsets, and offsets of several adapters mix linearly.  All offsets of a model are a flat
dict of arrays, a pytree of a few kilobytes; most adapters have an entry for each site
(``h.0.attn.c_proj``), others share some among the sites.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.models.base import FACTORED
from grpocem_jax.utils.errors import InputError

Factors = Any
SiteOffsets = Any
Offsets = dict[str, SiteOffsets]
"""What is trained: what `Adapter.init` gives, of SVF float32 ``[k]`` by site name."""

Sites = Mapping[str, tuple[str, ...]]
"""Site name to the path of its kernel in the parameters (`Model.sites`, or a part of it)."""

Merged = jax.Array | tuple[jax.Array, jax.Array]
"""A kernel ``[in, out]``, or a kernel and what is added to the bias, ``[out]``."""


def _by_site(offsets: Offsets) -> Mapping[str, SiteOffsets]:
    return offsets


class Adapter(NamedTuple):
    """Pure functions; kernels are ``[in, out]``.

    Attributes:
      factor: ``(key, kernel) -> factors``, the frozen arrays that take the kernel's place at a
        site. Done once, on the host; the key is the site's own, for random ones.
      init: ``(key, factors by site) -> offsets``, the trainable arrays at the base model, a dict.
        `each_site` makes it of a function of one site.
      apply: ``(factors, site_offsets, x [..., in]) -> y [..., out]`` float32, the adapted map
        without the model's bias. Must be traceable; everything around it is vmapped over samples
        and candidates.
      merge: ``(factors, site_offsets) -> kernel [in, out]``, or ``(kernel, bias [out])``, for
        export, with ``x @ kernel + bias == apply(factors, site_offsets, x)``.
      view: ``(offsets) -> site_offsets by site``, what `apply` and `merge` get; by default the
        offsets themselves. Traceable. Where sites share what is trained, this hands it out.
      draw: ``(key, offsets) -> offsets``, or None. A stochastic adapter is a distribution over
        offsets: training draws once a step, rollouts and update see the same draw, and the gradient
        goes through it. Evaluation, adaptation and export use the offsets as they are.
    """

    factor: Callable[[jax.Array, np.ndarray], Factors]
    init: Callable[[jax.Array, Mapping[str, Factors]], Offsets]
    apply: Callable[[Factors, SiteOffsets, jax.Array], jax.Array]
    merge: Callable[[Factors, SiteOffsets], Merged]
    view: Callable[[Offsets], Mapping[str, SiteOffsets]] = _by_site
    draw: Callable[[jax.Array, Offsets], Offsets] | None = None


def each_site(
    init: Callable[[jax.Array, Factors], SiteOffsets],
) -> Callable[[jax.Array, Mapping[str, Factors]], Offsets]:
    """`Adapter.init` of an adapter whose sites are independent.

    Args:
      init: ``(key, factors) -> site_offsets`` of one site.
    """

    def of_all(key: jax.Array, factors: Mapping[str, Factors]) -> Offsets:
        keys = jax.random.split(key, len(factors))
        return {name: init(k, own) for k, (name, own) in zip(keys, factors.items(), strict=True)}

    return of_all


def keep_kernel(key: jax.Array, kernel: np.ndarray) -> jax.Array:
    """`Adapter.factor` of an adapter whose only frozen array is the kernel."""
    del key  # nothing frozen is random
    return jnp.asarray(kernel)


def select_sites(sites: Sites, patterns: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The sites whose name ends in one of ``patterns`` (``attn.c_proj``: that map of every layer).

    Raises:
      InputError: a pattern that fits no site, with those there are; one string for a list.
    """
    if isinstance(patterns, str):
        raise InputError(f"sites={patterns!r}: must be a list; use [{patterns!r}].")
    selected: dict[str, tuple[str, ...]] = {}
    kinds = ", ".join(sorted({name.split(".", 2)[-1] for name in sites}))
    for pattern in patterns:
        found = {n: path for n, path in sites.items() if n == pattern or n.endswith(f".{pattern}")}
        if not found:
            llama = "; --config llama has those of a Llama" if "self_attn" in kinds else ""
            raise InputError(
                f"sites={pattern!r}: is no linear map of this model; choose from {kinds}{llama}."
            )
        selected.update(found)
    if not selected:
        raise InputError(f"sites=(): is empty; name at least one of {kinds}.")
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


def factor_params(
    adapter: Adapter,
    params: Any,
    sites: Sites,
    *,
    key: jax.Array | None = None,
    place: Callable[[Any], Any] = lambda array: array,
) -> Any:
    """Parameters with the kernel at every site replaced by its factors; the input is unchanged.

    An entry `FACTORED` without arrays tells them from plain ones, also where factors are kernels.

    Args:
      adapter: the adapter.
      params: plain parameters.
      sites: the sites to adapt.
      key: PRNG key of random frozen arrays; by default that of seed 0.
      place: puts the factors of a site where they are to lie.
    """
    key = jax.random.key(0) if key is None else key
    for number, path in enumerate(sites.values()):
        kernel = np.asarray(get(params, path))
        factors = place(adapter.factor(jax.random.fold_in(key, number), kernel))
        params = _set(params, path, factors)
    return {**params, FACTORED: None}


def init_adapter(adapter: Adapter, key: jax.Array, params: Any, sites: Sites) -> Offsets:
    """Offsets at the base model, for parameters made by `factor_params`.

    Their sites are in the order in which JAX flattens a dict, in which those that a compiled
    program returns are too: `Adapter.draw` and others may go through them in order.
    """
    # `factor_params` takes the first keys that are folded in.
    key = jax.random.fold_in(key, len(sites))
    made = adapter.init(key, {name: get(params, path) for name, path in sites.items()})
    return jax.tree.map(lambda x: x, made)


def merge_params(adapter: Adapter, params: Any, offsets: Offsets, sites: Sites) -> Any:
    """Plain parameters that give the adapted model without an adapter, for export.

    Raises:
      InputError: the adapter merges to a bias at a linear map that has none.
    """
    own = adapter.view(offsets)
    params = {name: part for name, part in params.items() if name != FACTORED}
    for name, path in sites.items():
        merged = adapter.merge(get(params, path), own[name])
        if isinstance(merged, tuple):
            merged, bias = merged
            where = (*path[:-1], "bias")
            if "bias" not in get(params, path[:-1]):
                raise InputError(
                    f"the adapter merges to a bias at {name}, and this model has none there; adapt "
                    "a linear map with a bias, or do not export."
                )
            params = _set(params, where, jnp.asarray(get(params, where)) + bias)
        params = _set(params, path, merged)
    return params


def num_params(offsets: Offsets) -> int:
    """The number of trainable scalars."""
    return sum(int(np.size(x)) for x in jax.tree.leaves(offsets))
