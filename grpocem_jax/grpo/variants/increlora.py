"""IncreLoRA's allocation (Zhang et al. 2023, arXiv 2308.12043) as an optimizer: ranks that grow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import below, number, whole


class IncreLoRAState(NamedTuple):
    """State of `increlora`.

    Attributes:
      base: of Adam.
      updates: done, int32 ``[]``.
      ranks: components of each site that are trained, int32 ``[sites]``.
      scores: importance of each site, float32 ``[sites]``.
    """

    base: Any
    updates: jax.Array
    ranks: jax.Array
    scores: jax.Array


def increlora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    budget: int,
    every: int = 10,
    grow: int = 1,
    decay: float = 0.85,
) -> optax.GradientTransformation:
    """Adam on the components that are trained, one of each site at first, more where they matter.

    For the offsets of the adapter ``increlora``.  Every ``every`` updates the ``grow`` most
    important sites get one more component, until there are ``budget`` in all.  The paper scores a
    site by the smoothed sensitivity of its change, ``|dW * grad|``; ours is that of the component
    it would get, the smoothed absolute gradient of the scale that is still zero.

    Args:
      learning_rate: or a schedule.
      budget: components of all sites together, at least one for each.
      every: updates between two additions, at least 1.
      grow: sites that grow at a time, at least 1.
      decay: of the smoothing, from 0 to below 1.

    Raises:
      InputError: a value outside its range; in ``init``, a budget below the number of sites, or
        offsets of another adapter.
    """
    budget, every, grow = whole("budget", budget), whole("every", every), whole("grow", grow)
    decay = number("decay", decay, below(0, 1))
    base = optax.adam(learning_rate)

    def init(offsets: Any) -> IncreLoRAState:
        parts = {"a", "b", "scale"}
        if not all(isinstance(own, dict) and set(own) == parts for own in offsets.values()):
            raise InputError(
                "the optimizer 'increlora' trains the offsets of the adapter of that name; set "
                "adapter.type='increlora'."
            )
        if budget < len(offsets):
            raise InputError(
                f"budget={budget}: must be at least {len(offsets)}, a component for each site."
            )
        count = len(offsets)
        return IncreLoRAState(
            base.init(offsets), jnp.int32(0), jnp.ones(count, jnp.int32), jnp.zeros(count)
        )

    def masked(tree: Any, ranks: jax.Array) -> Any:
        """The tree without the components that are not trained."""
        kept = {}
        for rank, name in zip(ranks, sorted(tree), strict=True):
            own = tree[name]
            trained = jnp.arange(own["scale"].shape[0]) < rank
            kept[name] = {
                "a": own["a"] * trained[None],
                "b": own["b"] * trained[:, None],
                "scale": own["scale"] * trained,
            }
        return kept

    def update(
        gradient: Any, state: IncreLoRAState, offsets: Any = None
    ) -> tuple[Any, IncreLoRAState]:
        scales = [gradient[name]["scale"] for name in sorted(gradient)]
        most = jnp.array([len(x) for x in scales])
        candidates = [
            jnp.abs(x[jnp.minimum(rank, len(x) - 1)])
            for x, rank in zip(scales, state.ranks, strict=True)
        ]
        scores = decay * state.scores + (1 - decay) * jnp.stack(candidates)
        updates, inner = base.update(masked(gradient, state.ranks), state.base, offsets)
        done = state.updates + 1
        # Places in the order of importance, of sites that can grow.
        able = state.ranks < most
        place = jnp.argsort(jnp.argsort(jnp.where(able, -scores, jnp.inf)))
        room = jnp.where(done % every == 0, budget - jnp.sum(state.ranks), 0)
        ranks = state.ranks + (able & (place < jnp.minimum(grow, room)))
        return masked(updates, state.ranks), IncreLoRAState(inner, done, ranks, scores)

    return optax.GradientTransformation(init, update)
