"""An adapter of one's own: scales and shifts of a map's outputs, ``y = (x W) (1 + s) + b``.

Scaling and shifting features is SSF (Lian et al. 2022, arXiv 2210.08823).

    python train.py --config configs/tiny.py \\
        --config.adapter.type=examples.custom_adapter:scale_and_shift
"""

import jax.numpy as jnp

import grpocem_jax as gj


def scale_and_shift(shift: bool = True) -> gj.Adapter:
    """A scale and, with ``shift``, a shift of each output; 2 x 768 numbers at a map of GPT-2."""

    def init(key, kernel):
        zeros = jnp.zeros(kernel.shape[1])
        return {"scale": zeros, "shift": zeros} if shift else {"scale": zeros}

    def apply(kernel, own, x):
        y = gj.dense(kernel, x)
        y = y * jnp.broadcast_to(1 + own["scale"], y.shape)
        return y + jnp.broadcast_to(own["shift"], y.shape) if shift else y

    def merge(kernel, own):
        scaled = kernel * (1 + own["scale"])[None]
        return (scaled, own["shift"]) if shift else scaled

    return gj.Adapter(
        factor=lambda key, kernel: jnp.asarray(kernel),
        init=gj.each_site(init),
        apply=apply,
        merge=merge,
    )
