"""GRASP and StochGRASP (arXiv 2512.04296): shifts and scales of groups of a map's inputs.

x' = (x - beta_g) / gamma_g and y = x' W, where ``g`` is the group of an input: the inputs are
permuted once and for all and cut into ``K`` groups, which share ``beta`` and ``gamma``.  Both fold
into the map, ``W / gamma`` and a bias of ``-(beta / gamma) W``.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import Adapter, Offsets, each_site, keep_kernel
from grpocem_jax.models.base import dense
from grpocem_jax.utils.settings import above, number, whole


def grasp(*, groups: int = 16, seed: int = 0) -> Adapter:
    """The GRASP adapter, ``2 groups`` numbers at every site: ``beta`` and ``gamma - 1``.

    Args:
      groups: ``K``, at least 1; a map of fewer inputs has a group for each.
      seed: of the permutation.

    Raises:
      InputError: a value outside its range.
    """
    groups = whole("groups", groups)

    def of_inputs(own: dict[str, jax.Array], count: int) -> tuple[jax.Array, jax.Array]:
        number = np.arange(count) * min(groups, count) // count
        group = np.empty(count, np.int32)
        group[np.random.default_rng(seed).permutation(count)] = number
        return own["shift"][group], 1.0 + own["scale"][group]

    def init(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        del key
        zeros = jnp.zeros(min(groups, kernel.shape[0]), jnp.float32)
        return {"shift": zeros, "scale": zeros}

    def apply(kernel: jax.Array, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        shift, scale = of_inputs(own, kernel.shape[0])
        moved = x - jnp.broadcast_to(shift, x.shape)
        return dense(kernel, moved / jnp.broadcast_to(scale, x.shape))

    def merge(kernel: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        shift, scale = of_inputs(own, kernel.shape[0])
        return kernel / scale[:, None], -jnp.dot(shift / scale, kernel, precision="highest")

    return Adapter(keep_kernel, each_site(init), apply, merge)


def stoch_grasp(*, groups: int = 16, noise: float = 0.05, seed: int = 0) -> Adapter:
    """StochGRASP: a Gaussian over the numbers of `grasp`, whose deviations are trained too.

    Training draws ``o = mean + noise exp(rho) epsilon`` once a step; everything else uses the mean.
    The paper pulls the deviations to a level of noise by a term of the loss; here that is weight
    decay, which pulls ``rho`` to zero, the deviation ``noise``.

    Args:
      groups: as of `grasp`; ``4 groups`` numbers at every site.
      noise: the deviation to begin with and to be pulled to, above 0.
      seed: of the permutation.

    Raises:
      InputError: a value outside its range.
    """
    noise = number("noise", noise, above(0))
    deterministic = grasp(groups=groups, seed=seed)

    def init(key: jax.Array, factors: Mapping[str, jax.Array]) -> Offsets:
        means = deterministic.init(key, factors)
        rho = {name: {f"{part}_rho": x for part, x in own.items()} for name, own in means.items()}
        return {name: own | rho[name] for name, own in means.items()}

    def draw(key: jax.Array, offsets: Offsets) -> Offsets:
        keys = jax.random.split(key, (len(offsets), 2))
        drawn = {}
        for site_keys, (name, own) in zip(keys, offsets.items(), strict=True):
            parts = {
                part: own[part]
                + noise * jnp.exp(own[f"{part}_rho"]) * jax.random.normal(k, own[part].shape)
                for k, part in zip(site_keys, ("shift", "scale"), strict=True)
            }
            drawn[name] = {**own, **parts}
        return drawn

    return deterministic._replace(init=init, draw=draw)
