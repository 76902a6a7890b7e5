"""The parts of GRPO that a config names: shaping, advantages, weights, objective, optimizer."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from grpocem_jax import grpo
from grpocem_jax.config import Config
from grpocem_jax.grpo import variants
from grpocem_jax.models.sampling import Rollouts
from grpocem_jax.utils import memory, user_code
from grpocem_jax.utils.errors import InputError


class Algorithm(NamedTuple):
    """What a training step is made of; `grpocem_jax.grpo` has the signatures.

    Attributes:
      shaping: a reward shaping.
      advantages: an advantage function.
      weights: a weight rule.
      objective: an objective.
      optimizer: with its learning rate and gradient clipping.
    """

    shaping: grpo.Shaping
    advantages: grpo.Advantages
    weights: grpo.WeightRule
    objective: grpo.Objective
    optimizer: optax.GradientTransformation


def make_algorithm(config: Config, *, total_steps: int = 0) -> Algorithm:
    """Makes the parts by their names and options, and tries out those of the user's own.

    Args:
      config: the settings.
      total_steps: steps of the whole training, toward whose end the learning rate may fall; 0
        where they are not known yet.

    Raises:
      InputError: a function that fails or makes no such part, or a part that does not keep to its
        signature; in one sentence with the config's field and the function.
    """
    return Algorithm(
        _make_shaping(config),
        _make_advantages(config),
        _make_weights(config),
        _make_objective(config),
        _make_optimizer(config, total_steps),
    )


@grpo.reads()
def _unshaped(rewards: jax.Array, logps: jax.Array, mask: jax.Array) -> jax.Array:
    del logps, mask
    return rewards


def _make_shaping(config: Config) -> grpo.Shaping:
    settings = config.grpo
    where, function = _make(
        "grpo.shaping",
        settings.shaping,
        settings.shaping_options,
        named={"none": lambda: _unshaped, **variants.SHAPINGS},
        returns="a function (rewards [P, G], logps [P, G, N], mask) -> rewards [P, G]",
        check=grpo.check_shaping,
    )
    if not user_code.is_reference(settings.shaping):
        return function

    @grpo.reads(*grpo.read_by(function))
    def guarded(rewards: jax.Array, logps: jax.Array, mask: jax.Array) -> jax.Array:
        with _naming(where, "the reward shaping"):
            found = function(rewards, logps, mask)
            grpo.require_shaped(found, rewards, "in this step")
        return jnp.asarray(found, jnp.float32)

    return guarded


def _make_advantages(config: Config) -> grpo.Advantages:
    settings = config.grpo
    scaling = {"scale": settings.reward_scale, "clip": settings.reward_clip}
    outcomes: dict[str, Any] = {"supervision": settings.supervision}
    group = grpo.reads()(functools.partial(grpo.group_advantages, **outcomes))

    def scaled(**options: Any) -> grpo.Advantages:
        given = {**outcomes, **scaling, **options}
        return grpo.reads()(functools.partial(grpo.scaled_advantages, **given))

    where, function = _make(
        "grpo.advantages",
        settings.advantages,
        settings.advantages_options,
        named={
            "group": lambda: group,
            "scaled": scaled,
            **variants.ADVANTAGES,
        },
        returns="a function (rewards, step_rewards, tokens, mask) -> advantages [P, G, N]",
        check=grpo.check_advantages,
    )
    if not user_code.is_reference(settings.advantages):
        return function

    @grpo.reads(*grpo.read_by(function))
    def guarded(
        rewards: ArrayLike, step_rewards: ArrayLike, tokens: ArrayLike, mask: ArrayLike
    ) -> jax.Array:
        with _naming(where, "the advantage function"):
            found = function(rewards, step_rewards, tokens, mask)
            grpo.require_array("advantage function", found, jnp.shape(mask), "in this step")
        return jnp.asarray(found, jnp.float32)

    return guarded


def _make_weights(config: Config) -> grpo.WeightRule:
    settings = config.grpo
    where, rule = _make(
        "grpo.weights",
        settings.weights,
        settings.weights_options,
        named={
            **{name: functools.partial(grpo.aggregate, name) for name in grpo.AGGREGATIONS},
            **variants.WEIGHTS,
        },
        returns="a function (key, rollouts) -> (weights [P, G, N], positions or None)",
        check=grpo.check_weights,
    )
    if not user_code.is_reference(settings.weights):
        return rule

    @grpo.reads(*grpo.read_by(rule))
    def guarded(key: jax.Array, rollouts: Rollouts) -> tuple[jax.Array, jax.Array | None]:
        with _naming(where, "the weight rule"):
            weights, positions = rule(key, rollouts)
            grpo.require_array("weight rule", weights, rollouts.mask.shape, "as weights")
        return jnp.asarray(weights, jnp.float32), positions

    return guarded


def _make_objective(config: Config) -> grpo.Objective:
    settings = config.grpo
    clip = {"low": settings.clip, "high": settings.clip}
    # What a micro-batch of whole groups may look like.
    shape = (1, settings.group_size, config.generation.max_new_tokens)
    _, objective = _make(
        "grpo.objective",
        settings.objective,
        settings.objective_options,
        named={
            "clipped": lambda **options: grpo.clipped(**{**clip, **options}),
            **variants.OBJECTIVES,
        },
        returns="a function (logps, batch) -> (values [P, G, N], metrics)",
        check=lambda objective: grpo.check_objective(objective, shape),
    )
    if config.train.staleness:
        try:
            grpo.check_off_policy(objective)
        except InputError as error:
            raise InputError(
                f"config.train.staleness={config.train.staleness} with "
                f"config.grpo.objective={settings.objective!r}: {error}"
            ) from None
    return objective


def _make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    train = config.train
    low, high = train.lr_scale_range
    rates: dict[str, Any] = {
        "learning_rate": train.learning_rate,
        "warmup_steps": train.warmup_steps,
        "max_grad_norm": train.max_grad_norm,
        "target_kl": train.target_kl,
        "lr_scale_range": (low, high),
        "total_steps": total_steps * config.grpo.updates if train.final_lr_scale < 1 else 0,
        "final_lr_scale": train.final_lr_scale,
    }
    decay = {"weight_decay": train.weight_decay}

    def at_rates(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **options: grpo.optimizer(_with_options(function, options), **rates)

    def check(made: Any) -> None:
        # Those of the package may need the offsets of one adapter, and look at them themselves.
        if user_code.is_reference(train.optimizer):
            grpo.check_optimizer(made, {"h.0": jnp.zeros(3), "h.1": jnp.zeros(2)})

    _, optimizer = _make(
        "train.optimizer",
        train.optimizer,
        train.optimizer_options,
        named={
            "adamw": lambda **options: grpo.adamw(**rates, **{**decay, **options}),
            **{name: at_rates(function) for name, function in variants.OPTIMIZERS.items()},
        },
        own=at_rates,
        returns="an optax.GradientTransformation; it also gets learning_rate, a schedule",
        check=check,
    )
    return optimizer


def _with_options(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A function with options, for equal ones the same, so that `grpo.optimizer` knows it again."""
    try:
        return _partial(function, **options)
    except TypeError:  # an option that cannot be hashed, such as a list
        return functools.partial(function, **options)


@functools.lru_cache(typed=True)  # 1.0 may be refused where 1 is not
def _partial(function: Callable[..., Any], /, **options: Any) -> Callable[..., Any]:
    return functools.partial(function, **options)


def _make(
    field: str,
    name: str,
    options: Mapping[str, Any],
    *,
    named: Mapping[str, Callable[..., Any]],
    returns: str,
    check: Callable[[Any], None],
    own: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> tuple[str, Any]:
    """Makes a part.

    Args:
      field: of the config.
      name: its value.
      options: keywords of what makes the part.
      named: what makes the parts of the package.
      returns: what a function of the user's own must return.
      check: raises an InputError where a part is not what it must be.
      own: what makes a part of the user's function, by default the function itself.

    Returns:
      how messages name the part, and the part.
    """
    where = f"config.{field}={name!r}" + (f" with options {dict(options)}" if options else "")
    if user_code.is_reference(name):
        make = own(user_code.load_function(name, field=f"config.{field}"))
    else:
        make = named[name]
    with _naming(
        where, "the function", f"; it is called with the options as keywords, to return {returns}"
    ):
        part = make(**options)
    if options or user_code.is_reference(name):
        with _naming(where, "the check of it"):
            check(part)
    return where, part


@contextlib.contextmanager
def _naming(where: str, what: str, needed: str = "; correct it") -> Iterator[None]:
    """Puts the part's name before what goes wrong inside the block.

    Raises:
      InputError: whatever is raised there. Where memory runs out, that error passes through.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the user's own code may raise
        if isinstance(error, Exception) and memory.ran_out(error):
            raise
        kind, message = user_code.failure(error)
        reason = (message.splitlines() or [""])[0].rstrip(".")
        raise InputError(f"{where}: {what} raised {kind} ({reason}){needed}.") from error
