"""A fitness of one's own: the likelihood of the text's worst token instead of the mean.

    python adapt.py --workdir runs/TRAINED --prompt "..." \\
        --config.search.fitness=examples.custom_fitness:worst_token
"""

import jax
import jax.numpy as jnp

import grpocem_jax as gj


def worst_token(
    model: gj.Model, params, offsets, texts: gj.search.Texts, key: jax.Array
) -> jax.Array:
    """The smallest log-likelihood of a scored token of any text, nats; float32 ``[]``."""

    def one(tokens, mask):
        hidden = model.forward(params, offsets, tokens[:-1], mask[:-1])
        return gj.token_logps(model, params, hidden, tokens[1:], 1.0)[0]

    scored = texts.scored[:, 1:] & texts.mask[:, 1:]
    return jnp.min(jnp.where(scored, jax.vmap(one)(texts.tokens, texts.mask), jnp.inf))
