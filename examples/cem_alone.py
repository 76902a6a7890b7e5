"""The Cross-Entropy Method on a function of one's own, without a language model.

python examples/cem_alone.py
"""

import jax
import jax.numpy as jnp
import optax

import grpocem_jax as gj


def fitness(point: dict[str, jax.Array]) -> jax.Array:
    """Rastrigin's function upside down: thousands of local peaks, the highest 0 at the origin."""
    x = jnp.concatenate([point["left"], point["right"]])
    return -jnp.sum(x**2 - 10 * jnp.cos(2 * jnp.pi * x) + 10)


def main() -> None:
    """60 generations in one compiled program."""
    method = gj.CEM(
        population_size=400, elite_ratio=0.1, noise_std=3.0, momentum=0.0, std_momentum=0.5
    )
    start = {"left": jnp.full(2, 3.0), "right": jnp.full(3, 3.0)}  # any pytree

    @jax.jit
    def search(state, key):
        def generation(state, key):
            candidates = method.ask(key, state)
            scores = jax.vmap(fitness)(candidates)
            return method.tell(state, candidates, scores), jnp.max(scores)

        return jax.lax.scan(generation, state, jax.random.split(key, 60))

    state, best = search(method.init(start), jax.random.key(0))
    print(f"best of generation 1, 10, 60: {best[0]:.3g}, {best[9]:.3g}, {best[-1]:.3g}")
    print(f"distance from the highest peak: {optax.global_norm(state.mean):.1e}")


if __name__ == "__main__":
    main()
