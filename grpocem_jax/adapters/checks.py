"""What every adapter must keep to, ours and a newcomer's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.attach import AdapterError, calling
from grpocem_jax.adapters.base import Adapter, factor_params, get, init_adapter
from grpocem_jax.models.base import cast_params

SHAPES = {"h.0.in": (6, 10), "h.0.out": (10, 6), "h.1.in": (6, 10), "h.1.out": (10, 6)}
"""Linear maps of two layers, ``[in, out]``, that the adapter is put on."""

TOLERANCE = 1e-4
"""Of outputs of about 1."""


def check_adapter(adapter: Adapter) -> None:
    """Checks that an adapter keeps to `Adapter`, on small random linear maps.

    - The offsets of ``init``, and offsets of zero, are the base model.
    - ``apply`` gives float32 ``[..., out]``, in half precision too, and is linear algebra that
      ``vmap`` and ``grad`` go through: of several offsets it is what it is of each.
    - ``x @ kernel + bias`` of what ``merge`` returns is ``apply``.
    - ``view`` has an entry for every site, and ``draw`` keeps structure, shapes and dtypes.

    Raises:
      AdapterError: it does not; one sentence says in what.
    """
    rng = np.random.default_rng(0)
    sites = {name: (name, "kernel") for name in SHAPES}
    plain = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32) * shape[0] ** -0.5}
        for name, shape in SHAPES.items()
    }
    with calling("factor"):
        params = factor_params(adapter, plain, sites)
    with calling("init"):
        start = init_adapter(adapter, jax.random.key(0), params, sites)
    if not isinstance(start, dict) or not jax.tree.leaves(start):
        raise AdapterError("the adapter's init returned no offsets; return a dict of arrays.")
    zero = jax.tree.map(jnp.zeros_like, start)
    moved = _random(start, 1)
    for name, path in sites.items():
        factors, kernel = get(params, path), plain[name]["kernel"]
        x = rng.normal(size=(5, SHAPES[name][0])).astype(np.float32)

        def of(offsets: Any, factors=factors, name=name, x=x) -> jax.Array:
            return adapter.apply(factors, adapter.view(offsets)[name], x)

        with calling("apply"):
            for offsets, what in ((start, "of init"), (zero, "of zero")):
                _equal(of(offsets), x @ kernel, f"for offsets {what}, where it is the base model")
            alone = [of(offsets) for offsets in (start, moved)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), start, moved)
            _equal(jax.vmap(of)(stacked), jnp.stack(alone), "under vmap")
            gradient = jax.grad(lambda offsets, of=of: jnp.sum(of(offsets) ** 2))(moved)
            half = jax.eval_shape(
                adapter.apply,
                cast_params(factors, jnp.dtype(jnp.bfloat16)),
                adapter.view(moved)[name],
                x,
            )
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)):
            raise AdapterError("the adapter's apply has a gradient that is not finite.")
        if half.dtype != jnp.float32:
            raise AdapterError(
                f"the adapter's apply returned {half.dtype} for factors of bfloat16; return "
                "float32, as grpocem_jax.dense does."
            )
        with calling("merge"):
            merged = adapter.merge(factors, adapter.view(moved)[name])
        whole, bias = merged if isinstance(merged, tuple) else (merged, np.zeros(kernel.shape[1]))
        _equal(x @ whole + bias[None], alone[1], "beside x @ merge(factors, offsets)")
    if adapter.draw is not None:
        with calling("draw"):
            drawn = jax.eval_shape(adapter.draw, jax.random.key(0), start)
        if jax.tree.map(_kind, drawn) != jax.tree.map(_kind, start):
            raise AdapterError("the adapter's draw returned other arrays than it was given.")


def _random(like: Any, seed: int) -> Any:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [x + 0.3 * jax.random.normal(k, jnp.shape(x)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, made)


def _kind(x: Any) -> tuple[Any, ...]:
    return (tuple(x.shape), jnp.dtype(x.dtype))


def _equal(found: Any, expected: Any, where: str) -> None:
    if jnp.shape(found) != jnp.shape(expected):
        raise AdapterError(
            f"the adapter's apply returned shape {jnp.shape(found)} {where}; it must be "
            f"{jnp.shape(expected)}."
        )
    off = float(jnp.max(jnp.abs(found - expected)))
    if not off <= TOLERANCE:
        raise AdapterError(f"the adapter's apply is off by {off:.2g} {where}.")
