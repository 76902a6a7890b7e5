"""What every adapter, objective, advantage function and weight rule must keep to.

A part of one's own is tried in the same way: add it to the lists below, or call
`grpocem_jax.grpo.check_objective` and its like.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import variants as examples
from examples.custom_adapter import scale_and_shift
from grpocem_jax import adapters, grpo
from grpocem_jax.adapters.checks import SHAPES
from grpocem_jax.grpo import checks, variants
from grpocem_jax.utils.errors import InputError

OBJECTIVES = {
    "clipped": grpo.clipped(),
    "asymmetric": grpo.clipped(low=0.1, high=0.4),
    "sequence": grpo.clipped(ratio="sequence"),
    "cispo": variants.cispo(),
    "policy_gradient": variants.policy_gradient(),
}
REGRESSION = {"rebel": variants.rebel(), "a_star_po": variants.a_star_po()}
"""Objectives that are no policy gradient with the weights given."""
ADVANTAGES = {
    "group": grpo.group_advantages,
    "process": functools.partial(grpo.group_advantages, supervision="process"),
    "scaled": grpo.scaled_advantages,
    **{name: make() for name, make in variants.ADVANTAGES.items()},
    "discounted": examples.discounted(),
}
OF_THE_STEP = ("bnpo", "reinforce_pp")
"""Advantages that compare the groups of a step."""
WEIGHTS = {
    **{name: grpo.aggregate(name) for name in grpo.AGGREGATIONS},
    **{name: make() for name, make in variants.WEIGHTS.items()},
    "s_grpo, few": variants.s_grpo(alpha=1, k=2),
    "high_entropy": examples.high_entropy(),
}
OPTIMIZERS = {
    "adamw": grpo.adamw(),
    "follows the kl": grpo.adamw(target_kl=0.01),
    "lion": grpo.optimizer(optax.lion, learning_rate=1e-3),
    "adam of optax": optax.adam(1e-3),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


def shared_scale() -> adapters.Adapter:
    """One number for all sites, to test what is shared across layers."""

    def view(offsets):
        return dict.fromkeys(SHAPES, offsets["shared"])

    return adapters.Adapter(
        factor=lambda key, kernel: jnp.asarray(kernel),
        init=lambda key, factors: {"shared": jnp.zeros(())},
        apply=lambda kernel, own, x: (1 + own) * (x @ kernel.astype(jnp.float32)),
        merge=lambda kernel, own: (1 + own) * kernel,
        view=view,
    )


def noisy(adapter: adapters.Adapter) -> adapters.Adapter:
    """Offsets with noise, to test what is drawn."""

    def draw(key, offsets):
        return {name: x + 0.1 * jax.random.normal(key, x.shape) for name, x in offsets.items()}

    return adapter._replace(draw=draw)


ADAPTERS = {
    "svf": adapters.svf(),
    "svf, half": adapters.svf(rank_ratio=0.5),
    "lora": adapters.lora(rank=2),
    "lora, alpha": adapters.lora(rank=3, alpha=6),
    "scale and shift": scale_and_shift(),
    "scale": scale_and_shift(shift=False),
    "shared": shared_scale(),
    "stochastic": noisy(adapters.svf()),
    **{name: make() for name, make in adapters.ADAPTERS.items() if name not in ("svf", "lora")},
    "tinylora, shared": adapters.tinylora(size=4, sites_per_vector=0),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_keeps_to_its_interface(name):
    adapters.check_adapter(ADAPTERS[name])


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"init": lambda key, factors: {}}, "init returned no offsets"),
        (
            {"init": lambda key, factors: {"shared": jnp.ones(())}},
            "of init, where it is the",
        ),
        ({"apply": lambda kernel, own, x: 2 * (x @ kernel)}, "of zero|of init"),
        ({"apply": lambda kernel, own, x: x}, r"returned shape \(5, 6\)"),
        (
            {
                "apply": lambda kernel, own, x: (
                    (1.0 + own).astype(kernel.dtype) * (x.astype(kernel.dtype) @ kernel)
                )
            },
            "returned bfloat16",
        ),
        ({"merge": lambda kernel, own: kernel}, "beside x @ merge"),
        ({"view": lambda offsets: {}}, "apply raised KeyError"),
        ({"draw": lambda key, offsets: {"shared": jnp.zeros(3)}}, "draw returned other arrays"),
    ],
)
def test_an_adapter_that_does_not_keep_to_it_is_named(changes, fragment):
    with pytest.raises(adapters.AdapterError, match=f"the adapter's .*({fragment})"):
        adapters.check_adapter(shared_scale()._replace(**changes))


@pytest.mark.parametrize("name", [*OBJECTIVES, *REGRESSION])
def test_an_objective_keeps_to_its_signature_and_adds_up_over_micro_batches(name):
    grpo.check_objective({**OBJECTIVES, **REGRESSION}[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_on_policy_the_policy_gradient(name):
    out = checks.sample_rollouts()
    weights = grpo.token_weights(out.mask)
    advantages = jnp.where(out.mask, jnp.arange(8.0).reshape(2, 4, 1) - 3.5, 0.0)
    prompts = jnp.ones((2, 3), jnp.int32)
    batch = grpo.Batch(prompts, prompts > 0, out.tokens, out.mask, out.logps, advantages, weights)

    def total(logps):
        values, metrics = OBJECTIVES[name](logps, batch)
        return jnp.sum(weights * values), metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(out.logps)
    # With pi = pi_old the value is the mean advantage and d/dlogp of it the weighted advantage.
    np.testing.assert_allclose(value, jnp.sum(weights * advantages), rtol=1e-5)
    np.testing.assert_allclose(gradient, weights * advantages, rtol=1e-4, atol=1e-7)
    assert all(float(x) == 0.0 for x in metrics.values())


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantage_function_is_finite_whatever_abstains(name):
    grpo.check_advantages(ADVANTAGES[name])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_equal_rewards_and_off_the_mask_are_zero_and_prompts_stand_alone(name):
    out = checks.sample_rollouts()
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    last = np.arange(mask.shape[-1]) == mask.sum(-1, keepdims=True) - 1
    rewards = np.array([[0.5] * 4, [1.0, 0.0, np.nan, 0.25]], np.float32)
    steps = np.where(last, rewards[..., None], np.float32(np.nan))
    found = np.asarray(ADVANTAGES[name](rewards, steps, tokens, mask))
    np.testing.assert_array_equal(found[0], 0.0)
    np.testing.assert_array_equal(found[~mask], 0.0)
    np.testing.assert_array_equal(found[1, 2], 0.0)  # abstained
    assert np.abs(found[1]).max() > 0
    if name in OF_THE_STEP:
        return
    alone = ADVANTAGES[name](rewards[1:], steps[1:], tokens[1:], mask[1:])
    np.testing.assert_allclose(alone, found[1:], atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_rule_trains_tokens_that_are_there(name):
    grpo.check_weights(WEIGHTS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_down_the_gradient(name):
    grpo.check_optimizer(OPTIMIZERS[name], {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2))}})


# What must be refused


def doubled(logps, batch):
    return jnp.concatenate([logps, logps], -1), {}


class Leaky:
    """Keeps what it was traced with."""

    def __init__(self):
        self.seen = []

    def __call__(self, logps, batch):
        self.seen.append(logps)
        return sum(self.seen) * batch.advantages, {}


class Unhashable:
    __hash__ = None

    def __call__(self, logps, batch):
        return logps, {}


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda logps: logps, "raised TypeError"),
        (lambda logps, batch: logps, "returned float32 of shape"),
        (lambda logps, batch: None, "returned None"),
        (doubled, "returned float32 of shape (2, 4, 10) as values"),
        (lambda logps, batch: (logps > 0, {}), "returned bool of shape"),
        (lambda logps, batch: (1.0, {}), "returned float32 of shape () as values"),
        (lambda logps, batch: (jnp.log(-jnp.exp(logps)), {}), "values with numbers that are not"),
        (lambda logps, batch: (logps / batch.advantages, {}), "not finite"),
        (lambda logps, batch: (jnp.sqrt(logps * 0), {}), "a gradient with numbers that are not"),
        (lambda logps, batch: (batch.advantages, {}), "do not depend on logps"),
        (lambda logps, batch: (logps, {"a": logps}), "as the metric 'a'"),
        (lambda logps, batch: (logps, {"a": jnp.float32(jnp.nan)}), "returned a with numbers"),
        (lambda logps, batch: (logps, {"kl": jnp.sum(logps)}), "a metric named 'kl'"),
        (
            lambda logps, batch: (logps, {"a": jnp.mean(logps)}),
            "objective's a of two micro-batches",
        ),
        (lambda logps, batch: (logps - jnp.mean(logps), {}), "objective's values of two micro"),
        (lambda logps, batch: (logps if logps[0, 0, 0] > 0 else -logps, {}), "TracerBool"),
        (Leaky(), "a traced leak"),
        (Unhashable(), "not hashable"),
    ],
)
def test_an_objective_that_does_not_keep_to_it_is_refused_in_one_sentence(objective, said):
    with pytest.raises(InputError) as refused:
        grpo.check_objective(objective)
    assert said in str(refused.value)
    assert str(refused.value).startswith("the objective")
    assert "\n" not in str(refused.value)


KEPT = []


def leak(rewards, step_rewards, tokens, mask):
    jax.jit(lambda x: KEPT.append(x))(rewards)
    return KEPT[-1]


@pytest.mark.parametrize(
    ("advantages", "said"),
    [
        (lambda rewards, mask: rewards, "raised TypeError"),
        (lambda rewards, *others: rewards, "returned float32 of shape (2, 4) for distinct rewards"),
        (lambda r, s, t, mask: mask, "returned bool of shape (2, 4, 5)"),
        (lambda r, s, t, mask: mask.tolist(), "returned list"),
        (lambda r, s, t, mask: r[..., None] * mask, "not finite where rewards are NaN"),
        (
            lambda r, s, t, mask: (
                ((r - r.mean(-1, keepdims=True)) / r.std(-1)[..., None])[..., None] * mask
            ),
            "not finite",
        ),
        (leak, "a tracer that leaked out of a jit"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_advantage_function_that_does_not_keep_to_it_is_refused(advantages, said):
    with pytest.raises(InputError) as refused:
        grpo.check_advantages(advantages)
    assert said in str(refused.value)
    assert "return finite float32 advantages [P, G, N]" in str(refused.value)


def with_positions(positions):
    return lambda key, out: (grpo.token_weights(out.mask), positions(out))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda out: grpo.token_weights(out.mask), "raised TypeError"),
        (lambda key, out: grpo.token_weights(out.mask), "returned float32 of shape (2, 4, 5)"),
        (lambda key, out: (out.mask, None), "returned bool of shape (2, 4, 5) as weights"),
        (lambda key, out: (jnp.ones(out.mask.shape), None), "not zero where rollouts.mask"),
        (lambda key, out: (-grpo.token_weights(out.mask), None), "negative"),
        (lambda key, out: (out.mask / jnp.sum(out.mask & False), None), "not finite"),
        (with_positions(lambda out: jnp.zeros((2, 4, 5))), "float32 of shape (2, 4, 5) as pos"),
        (with_positions(lambda out: jnp.zeros((2, 4, 5), jnp.int32)), "not distinct"),
        (with_positions(lambda out: jnp.arange(5)[None, None] + out.tokens * 0 + 1), "outside"),
        (with_positions(lambda out: grpo.select(out.mask * 1.0, 2)), "leave out a token"),
        (with_positions(lambda out: grpo.select(out.mask * 1.0, 5)[:1]), "as positions"),
    ],
)
def test_a_weight_rule_that_does_not_keep_to_it_is_refused(rule, said):
    with pytest.raises(InputError) as refused:
        grpo.check_weights(rule)
    assert said in str(refused.value)


def test_a_number_of_positions_that_depends_on_the_rollouts_is_refused():
    sizes = iter([5, 4])

    def rule(key, out):
        count = next(sizes)
        weights = grpo.token_weights(out.mask & (jnp.arange(5)[None, None] < count))
        return weights, grpo.select(weights, count)

    with pytest.raises(InputError, match="5 positions of a completion and then 4"):
        grpo.check_weights(rule)


def wrong_updates(change):
    return optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (change(updates), state)
    )


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (optax.adam, "the optimizer is function"),
        (optax.scale_by_adam(), "goes up the gradient"),
        (wrong_updates(lambda x: x["a"]), "updates of other shapes"),
        (wrong_updates(lambda x: {"a": x["a"][:1]}), "updates of other shapes"),
        (wrong_updates(lambda x: {"a": -x["a"] / 0}), "not finite"),
        (wrong_updates(lambda x: x["b"]), "raised KeyError"),
        (
            optax.GradientTransformation(
                lambda params: jnp.zeros(1), lambda u, s, p=None: (u, jnp.zeros(2))
            ),
            "state changes its shapes",
        ),
    ],
)
def test_an_optimizer_that_is_none_is_refused(optimizer, said):
    with pytest.raises(InputError) as refused:
        grpo.check_optimizer(optimizer, {"a": jnp.ones(3)})
    assert said in str(refused.value)
