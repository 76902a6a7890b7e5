"""Group Relative Policy Optimization from parts: advantages, weights, objective, update.

DeepSeekMath (Shao et al. 2024, arXiv 2402.03300) as the report states it in its eqs. 1-7. Each part
is a value that the caller gives, so that a variant of the method is one more function beside ours:

    shaping      (rewards, logps, mask) -> rewards [P, G]                      `Shaping`
    advantages   (rewards, step_rewards, tokens, mask) -> [P, G, N]            `Advantages`
    weights      (key, rollouts) -> [P, G, N] and positions                    `WeightRule`
    objective    (logps, batch) -> values [P, G, N] and metrics                `Objective`
    optimizer    optax.GradientTransformation

The policy of every log-probability here is ``softmax(logits / temperature)`` over the whole
vocabulary.  Rollouts are drawn from it after repetition penalty and top-p, but the ratio compares
the same untruncated distribution at both times, so it is exactly 1 on policy.
"""

from grpocem_jax.grpo import variants
from grpocem_jax.grpo.advantages import (
    EQUAL,
    SUPERVISIONS,
    Advantages,
    equal_rewards,
    group_advantages,
    group_normalize,
    informative_first,
    outcome_advantages,
    process_advantages,
    scale_and_clip,
    scaled_advantages,
)
from grpocem_jax.grpo.batch import Batch
from grpocem_jax.grpo.checks import (
    check_advantages,
    check_objective,
    check_off_policy,
    check_optimizer,
    check_shaping,
    check_weights,
    require_array,
    require_shaped,
)
from grpocem_jax.grpo.learning_rate import adapt_scale, adapt_to_kl, warmup
from grpocem_jax.grpo.objectives import (
    Objective,
    clipped,
    clipped_objective,
    k3_divergence,
    sequence_log_ratio,
)
from grpocem_jax.grpo.optimizers import adamw, optimizer
from grpocem_jax.grpo.reading import ARRAYS, read_by, reads
from grpocem_jax.grpo.shaping import Shaping
from grpocem_jax.grpo.step import (
    METRICS,
    STATIC,
    Loss,
    TrainState,
    apply,
    gradients,
    init_state,
    keep_logits,
    loss,
    surrogate,
    update,
)
from grpocem_jax.grpo.weights import (
    AGGREGATIONS,
    WeightRule,
    aggregate,
    select,
    token_weights,
)

__all__ = [
    "AGGREGATIONS",
    "ARRAYS",
    "EQUAL",
    "METRICS",
    "STATIC",
    "SUPERVISIONS",
    "Advantages",
    "Batch",
    "Loss",
    "Objective",
    "Shaping",
    "TrainState",
    "WeightRule",
    "adamw",
    "adapt_scale",
    "adapt_to_kl",
    "aggregate",
    "apply",
    "check_advantages",
    "check_objective",
    "check_off_policy",
    "check_optimizer",
    "check_shaping",
    "check_weights",
    "clipped",
    "clipped_objective",
    "equal_rewards",
    "gradients",
    "group_advantages",
    "group_normalize",
    "informative_first",
    "init_state",
    "k3_divergence",
    "keep_logits",
    "loss",
    "optimizer",
    "outcome_advantages",
    "process_advantages",
    "read_by",
    "reads",
    "require_array",
    "require_shaped",
    "scale_and_clip",
    "scaled_advantages",
    "select",
    "sequence_log_ratio",
    "surrogate",
    "token_weights",
    "update",
    "variants",
    "warmup",
]
