"""What every advantage function, weight rule, objective and optimizer must keep to.

Each check asks a part a small question, looks at the answer, and refuses the part in one sentence.
The package's own parts pass them in its tests, those of a config before anything else is compiled.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpocem_jax.grpo.advantages import Advantages
from grpocem_jax.grpo.batch import Batch, seen_by_objective
from grpocem_jax.grpo.objectives import Objective, check_called
from grpocem_jax.grpo.shaping import Shaping
from grpocem_jax.grpo.step import METRICS
from grpocem_jax.grpo.weights import WeightRule, token_weights
from grpocem_jax.models.sampling import Rollouts
from grpocem_jax.utils.errors import InputError

SHAPE = (2, 4, 5)
"""Prompts, samples and tokens of the question."""


def sample_rollouts(seed: int = 0) -> Rollouts:
    """Completions of one to five tokens with random arrays."""
    rng = np.random.default_rng(seed)
    lengths = np.resize(rng.permutation(np.arange(1, SHAPE[-1] + 1)), SHAPE[:2])
    mask = np.arange(SHAPE[-1]) < lengths[..., None]
    return Rollouts(
        jnp.asarray(np.where(mask, rng.integers(1, 3, SHAPE), 0), jnp.int32),
        jnp.asarray(mask),
        jnp.asarray(np.where(mask, -rng.gamma(2.0, size=SHAPE), 0), jnp.float32),
        jnp.asarray(np.where(mask, rng.gamma(2.0, size=SHAPE), 0), jnp.float32),
    )


def check_shaping(shaping: Shaping) -> None:
    """Checks that a function keeps to `Shaping`.

    Raises:
      InputError: it does not.
    """
    contract = (
        "it must take (rewards [P, G], logps [P, G, N], mask) and return float32 rewards [P, G], "
        "NaN where those are and finite elsewhere"
    )
    _check_callable("reward shaping", contract, shaping)
    out = sample_rollouts()
    rewards = np.random.default_rng(1).normal(size=SHAPE[:2]).astype(np.float32)
    rewards[0, 1:3] = rewards[1] = np.nan
    found = _call("reward shaping", contract, shaping, jnp.asarray(rewards), out.logps, out.mask)
    require_shaped(found, rewards, "for rewards of which some are NaN", contract)


def require_shaped(found: Any, rewards: Any, where: str, contract: str = "correct it") -> None:
    """Looks at what a reward shaping returned.

    Raises:
      InputError: it is no array of floats of the rewards' shape, or not NaN exactly where they are.
    """
    if getattr(found, "shape", None) != rewards.shape or not hasattr(found, "dtype"):
        raise InputError(
            f"the reward shaping returned {_kind(found)} {where}, not floats of shape "
            f"{rewards.shape}; {contract}."
        )
    abstained = np.isnan(np.asarray(rewards))
    require_array(
        "reward shaping", jnp.where(abstained, 0.0, found), rewards.shape, where, contract
    )
    if not np.all(np.isnan(np.asarray(found)[abstained])):
        raise InputError(
            f"the reward shaping gave a reward to a completion without one {where}; {contract}."
        )


def check_advantages(advantages: Advantages) -> None:
    """Checks that a function keeps to `Advantages`, also where rewards are equal or abstain.

    Raises:
      InputError: it does not.
    """
    contract = (
        "it must take (rewards [P, G], step_rewards [P, G, N], tokens, mask) and return finite "
        "float32 advantages [P, G, N]"
    )
    _check_callable("advantage function", contract, advantages)
    out = sample_rollouts()
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    rewards = np.random.default_rng(1).normal(size=SHAPE[:2]).astype(np.float32)
    last = np.arange(SHAPE[-1]) == mask.sum(-1, keepdims=True) - 1
    for abstained, where in (
        (np.zeros(SHAPE[:2], bool), "for distinct rewards"),
        (np.arange(SHAPE[1]) < np.array([[1], [SHAPE[1]]]), "where rewards are NaN, as abstained"),
        (None, "where all rewards of a group are equal"),
    ):
        given = np.where(abstained, np.nan, rewards) if abstained is not None else 0 * rewards
        given = given.astype(np.float32)
        steps = np.where(last, given[..., None], np.nan).astype(np.float32)
        own = (given, steps, tokens.copy(), mask.copy())
        found = _call("advantage function", contract, advantages, *own)
        require_array("advantage function", found, SHAPE, where, contract)


def check_weights(rule: WeightRule) -> None:
    """Checks that a rule keeps to `WeightRule`.

    Raises:
      InputError: it does not.
    """
    contract = (
        "it must take (key, rollouts) and return (weights, positions): float32 [P, G, N], at least "
        "0, zero off rollouts.mask, and int32 [P, G, K] or None"
    )
    _check_callable("weight rule", contract, rule)
    count = None
    for seed in (0, 1):
        out = sample_rollouts(seed)
        found = _call("weight rule", contract, rule, jax.random.key(seed), out)
        if not isinstance(found, tuple) or len(found) != 2:
            raise InputError(f"the weight rule returned {_kind(found)}; {contract}.")
        weights = require_array("weight rule", found[0], SHAPE, "as weights", contract)
        if np.any(weights < 0) or np.any(weights[~np.asarray(out.mask)] != 0):
            raise InputError(
                "the weight rule returned weights that are negative, or not zero where "
                f"rollouts.mask is False; {contract}."
            )
        if found[1] is None:
            continue
        positions = np.asarray(found[1]) if hasattr(found[1], "dtype") else None
        if positions is None or positions.dtype != np.int32 or positions.shape[:-1] != SHAPE[:2]:
            raise InputError(
                f"the weight rule returned {_kind(found[1])} as positions; {contract}."
            )
        if count not in (None, positions.shape[-1]):
            raise InputError(
                f"the weight rule returned {count} positions of a completion and then "
                f"{positions.shape[-1]}; their number K must not depend on the rollouts."
            )
        count = positions.shape[-1]
        picked = np.zeros(SHAPE, np.int32)
        if np.all((positions >= 0) & (positions < SHAPE[-1])):
            np.add.at(picked, (*np.indices(positions.shape)[:2], positions), 1)
        if picked.max() != 1 or picked.sum() != positions.size or np.any((weights > 0) > picked):
            raise InputError(
                "the weight rule returned positions that are not distinct, lie outside 0..N-1, or "
                "leave out a token whose weight is above 0; grpo.select(weights, K) makes them."
            )


def check_objective(objective: Objective, shape: tuple[int, int, int] = SHAPE) -> None:
    """Checks that a function keeps to `Objective`, and that micro-batches add up.

    Args:
      objective: the function.
      shape: ``(P, G, N)`` for which it must be traceable too.

    Raises:
      InputError: it does not.
    """
    contract = (
        "it must take (logps [P, G, N], batch) and return finite float32 values [P, G, N] and a "
        "dict of float32 scalars"
    )
    _check_callable("objective", contract, objective)
    check_called(objective)
    try:
        hash(objective)
    except TypeError as error:
        raise InputError(
            f"the objective is not hashable ({error}), as a static argument must be; make it a "
            "function or a frozen dataclass."
        ) from None
    if (needs := getattr(objective, "needs", ())) and tuple(needs) != ("reference",):
        raise InputError(
            f"the objective has needs={needs!r}; all that it can get is ('reference',)."
        )
    objective = _alone(objective)
    question = _question()
    # The prompts' length is not looked at.
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape[: x.ndim], x.dtype), question)
    for asked in (wide, question):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), asked)
        answer = _trace("objective", contract, objective, *shapes)
        _check_answer(answer, shapes[0].shape, contract)

    @jax.jit
    def ask(logps: jax.Array, batch: Batch) -> Any:
        def total(logps: jax.Array) -> Any:
            values, metrics = objective(logps, batch)
            return jnp.sum(batch.weights * values), (values, metrics)

        return jax.grad(total, has_aux=True)(logps)

    gradient, (values, metrics) = _call("objective", contract, ask, *question)
    for name, array in {"values": values, **metrics, "a gradient": gradient}.items():
        if not np.all(np.isfinite(array)):
            raise InputError(
                f"the objective returned {name} with numbers that are not finite, on finite "
                f"log-probabilities; {contract}, also of a completion without a trained token."
            )
    if not np.any(gradient):
        raise InputError(f"the objective's values do not depend on logps; {contract}.")
    parts = [
        ask(*jax.tree.map(lambda x, row=row: x[row : row + 1], question)) for row in range(SHAPE[0])
    ]
    summed = {name: sum(part[1][1][name] for part in parts) for name in metrics}
    pairs = {name: (metrics[name], summed[name]) for name in metrics}
    pairs["values"] = (values, np.concatenate([part[1][0] for part in parts]))
    for name, (whole, halves) in pairs.items():
        if not np.allclose(whole, halves, rtol=1e-4, atol=1e-5):
            raise InputError(
                f"the objective's {name} of two micro-batches do not add up to those of both at "
                "once; values depend on their own prompt alone, and metrics are sums weighted by "
                "batch.weights."
            )


def check_off_policy(objective: Objective) -> None:
    """Checks that an objective makes up for completions that an older policy has drawn.

    Args:
      objective: one that passes `check_objective`.

    Raises:
      InputError: its gradient is the same whatever ``batch.old_logps`` are.
    """
    logps, batch = _question()
    # A reference that moved with them would make any objective that has one depend on them.
    objective = _alone(objective, batch.old_logps)

    def gradient(old_logps: jax.Array) -> Any:
        def total(logps: jax.Array) -> jax.Array:
            values, _ = objective(logps, batch._replace(old_logps=old_logps))
            return jnp.sum(batch.weights * values)

        return jax.grad(total)(logps)

    older = jnp.where(batch.weights != 0, batch.old_logps - 0.05, 0.0)
    if np.allclose(gradient(batch.old_logps), gradient(older), rtol=1e-4, atol=1e-6):
        raise InputError(
            "the objective does not look at batch.old_logps, so it takes completions of an older "
            "policy for its own; take one with a ratio, such as 'clipped' or 'cispo'."
        )


def _alone(objective: Objective, reference: jax.Array | None = None) -> Objective:
    """The objective as one that needs nothing; its reference is the policy that drew by default."""
    if not getattr(objective, "needs", ()):
        return objective
    return lambda logps, batch: objective(
        logps, batch, reference=batch.old_logps if reference is None else reference
    )


def check_optimizer(optimizer: optax.GradientTransformation, offsets: Any) -> None:
    """Checks that an optimizer is a transformation of these offsets that goes down a gradient.

    Args:
      optimizer: the transformation.
      offsets: the offsets, a pytree of floating-point arrays.

    Raises:
      InputError: it is not.
    """
    contract = (
        "it must be an optax.GradientTransformation whose updates, to be added, have the shapes "
        "and types of the offsets"
    )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InputError(f"the optimizer is {_kind(optimizer)}; {contract}.")

    def step(offsets: Any) -> Any:
        state = optimizer.init(offsets)
        gradient = jax.tree.map(jnp.ones_like, offsets)
        update = optax.with_extra_args_support(optimizer).update
        extra = {"value": jnp.float32(1.0), "kl": jnp.float32(0.0)}
        return state, *update(gradient, state, offsets, **extra)

    state, updates, after = _trace("optimizer", contract, step, offsets)
    kinds = [
        jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
        for tree in (offsets, updates, state, after)
    ]
    if kinds[0] != kinds[1]:
        raise InputError(f"the optimizer returned updates of other shapes or types; {contract}.")
    if kinds[2] != kinds[3]:
        raise InputError("the optimizer's state changes its shapes or types from step to step.")
    _, updates, _ = _call("optimizer", contract, jax.jit(step), offsets)
    total = sum(float(jnp.sum(x)) for x in jax.tree.leaves(updates))
    if not np.isfinite(total):
        raise InputError(
            f"the optimizer returned updates that are not finite, of gradients of 1; {contract}."
        )
    if total > 0:
        raise InputError(
            "the optimizer goes up the gradient; its updates must contain minus the learning rate, "
            "as those of optax's own optimizers do."
        )


def _question() -> tuple[jax.Array, Batch]:
    """Log-probabilities and a batch with every kind of token and of ratio."""
    out, rng = sample_rollouts(), np.random.default_rng(2)
    trained = np.array(out.mask)
    trained[0, 0] = False  # a completion without a trained token
    trained[1, :, 0] &= trained[1].sum(-1) < 2  # context at the start of others
    change = rng.choice([-0.5, 0.0, 0.01, 0.5], SHAPE)
    advantages = jnp.asarray(rng.choice([-1.5, 0.0, 1.0], SHAPE), jnp.float32)
    batch = Batch(
        prompts=jnp.ones((SHAPE[0], 3), jnp.int32),
        prompt_mask=jnp.ones((SHAPE[0], 3), bool),
        completions=out.tokens,
        mask=out.mask,
        old_logps=out.logps,
        advantages=advantages,
        weights=token_weights(jnp.asarray(trained)),
    )
    batch = seen_by_objective(batch)
    logps = jnp.where(batch.weights != 0, batch.old_logps + change.astype(np.float32), 0.0)
    return logps, batch


def _check_answer(answer: Any, shape: tuple[int, ...], contract: str) -> None:
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
        raise InputError(f"the objective returned {_kind(answer)}; {contract}.")
    values, metrics = answer
    if getattr(values, "shape", None) != shape or not jnp.issubdtype(values.dtype, jnp.floating):
        raise InputError(
            f"the objective returned {_kind(values)} as values for logps of shape {shape}; "
            f"{contract}."
        )
    for name, metric in metrics.items():
        if name in METRICS or not isinstance(name, str):
            raise InputError(
                f"the objective returned a metric named {name!r}, which has a meaning already or "
                "is no string; give it another name."
            )
        if metric.shape != () or not jnp.issubdtype(metric.dtype, jnp.floating):
            raise InputError(
                f"the objective returned {_kind(metric)} as the metric {name!r}; {contract}."
            )


def require_array(
    part: str, found: Any, shape: tuple[int, ...], where: str, contract: str = "correct it"
) -> np.ndarray:
    """The array, where it is a finite one of floats and of this shape.

    Raises:
      InputError: it is not; the message has the name of the ``part`` and ``where`` it was asked.
    """
    if isinstance(found, jax.core.Tracer):
        raise InputError(f"the {part} returned a tracer that leaked out of a jit; {contract}.")
    if getattr(found, "shape", None) != shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise InputError(
            f"the {part} returned {_kind(found)} {where}, not floats of shape {shape}; {contract}."
        )
    array = np.asarray(found, np.float32)
    if not np.all(np.isfinite(array)):
        raise InputError(f"the {part} returned numbers that are not finite {where}; {contract}.")
    return array


def _check_callable(part: str, contract: str, function: Any) -> None:
    if not callable(function):
        raise InputError(f"the {part} is {_kind(function)}, not a function; {contract}.")


def _call(part: str, contract: str, function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns.

    Raises:
      InputError: whatever it raises, in one sentence.
    """
    try:
        return function(*args)
    except Exception as error:  # whatever the part's own code may raise
        reason = (str(error).splitlines() or ["no message"])[0].rstrip(".")
        raise InputError(
            f"the {part} raised {type(error).__name__} ({reason}); {contract}."
        ) from error


def _trace(part: str, contract: str, function: Callable[..., Any], *args: Any) -> Any:
    """The shapes of what the function returns.

    Raises:
      InputError: whatever it raises, or that it keeps a tracer, in one sentence.
    """
    shapes = _call(part, contract, jax.eval_shape, function, *args)
    try:
        with jax.checking_leaks():
            jax.eval_shape(lambda *x: function(*x), *args)  # another function, to trace it again
    except Exception as error:  # the report of a leak fails in more than one way
        raise InputError(
            f"the {part} keeps what it is traced with after it returns (a traced leak), for "
            f"example an argument in a list; {contract}."
        ) from error
    return shapes


def _kind(value: Any) -> str:
    """A value's type, with its shape where it has one."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else type(value).__name__
