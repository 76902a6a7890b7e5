"""An adapter of one's own: LoRA (Hu et al. 2021, arXiv 2106.09685) in place of singular values.

    python train.py --config configs/tiny.py \\
        --config.adapter.type=examples.custom_adapter:lora --config.train.learning_rate=5e-3
"""

import jax
import jax.numpy as jnp

import grpocem_jax as gj


def lora(rank: int = 2) -> gj.Adapter:
    """``y = x W + (x A) B`` with trainable ``A [in, rank]`` and ``B [rank, out]``."""

    def init(key, kernel):
        a = jax.random.normal(key, (kernel.shape[0], rank)) * kernel.shape[0] ** -0.5
        return {"a": a, "b": jnp.zeros((rank, kernel.shape[1]))}  # B = 0: the base model

    return gj.Adapter(
        factor=jnp.asarray,
        init=init,
        apply=lambda kernel, own, x: (
            gj.dense(kernel, x) + gj.dense(own["b"], gj.dense(own["a"], x))
        ),
        merge=lambda kernel, own: kernel + own["a"] @ own["b"],
    )
