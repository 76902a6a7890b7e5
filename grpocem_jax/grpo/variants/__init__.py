"""Variants of GRPO from the literature, one file each: the names that configs have for them.

docs/methods.md has their equations, sources, and what of each is our reconstruction.
"""

from collections.abc import Callable

import optax

from grpocem_jax.grpo.objectives import Objective
from grpocem_jax.grpo.variants.a_star_po import a_star_po, optimal_advantages, optimal_values
from grpocem_jax.grpo.variants.baselines import centred, reinforce_pp, rloo
from grpocem_jax.grpo.variants.bnpo import bnpo
from grpocem_jax.grpo.variants.cispo import cispo
from grpocem_jax.grpo.variants.extrapolated import extrapolated
from grpocem_jax.grpo.variants.increlora import increlora
from grpocem_jax.grpo.variants.invadam import invadam
from grpocem_jax.grpo.variants.krpo import krpo
from grpocem_jax.grpo.variants.overlong import overlong
from grpocem_jax.grpo.variants.policy_gradient import policy_gradient
from grpocem_jax.grpo.variants.rebel import rebel
from grpocem_jax.grpo.variants.s_grpo import s_grpo
from grpocem_jax.grpo.variants.t_spmo import prefix_advantages, prefix_weights
from grpocem_jax.grpo.variants.unlikeliness import unlikeliness

ADVANTAGES = {
    "a_star_po": optimal_advantages,
    "bnpo": bnpo,
    "centred": centred,
    "krpo": krpo,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "t_spmo": prefix_advantages,
}
"""Makers of advantage functions of outcomes."""

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "a_star_po": a_star_po,
    "cispo": cispo,
    "policy_gradient": policy_gradient,
    "rebel": rebel,
}
"""Makers of objectives."""

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "extrapolated": extrapolated,
    "increlora": increlora,
    "invadam": invadam,
}
"""Optimizers of a learning rate."""

SHAPINGS = {"overlong": overlong, "unlikeliness": unlikeliness}
"""Makers of reward shapings."""

WEIGHTS = {"s_grpo": s_grpo, "t_spmo": prefix_weights}
"""Makers of weight rules."""

__all__ = [
    "ADVANTAGES",
    "OBJECTIVES",
    "OPTIMIZERS",
    "SHAPINGS",
    "WEIGHTS",
    "a_star_po",
    "bnpo",
    "centred",
    "cispo",
    "extrapolated",
    "increlora",
    "invadam",
    "krpo",
    "optimal_advantages",
    "optimal_values",
    "overlong",
    "policy_gradient",
    "prefix_advantages",
    "prefix_weights",
    "rebel",
    "reinforce_pp",
    "rloo",
    "s_grpo",
    "unlikeliness",
]
