"""GRPO and CEM on the singular values of a frozen language model, in JAX.

This module is the public API. Names that need Flax are imported when they are first used, so the
adapters, the sampler, GRPO and CEM can be used without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grpocem_jax.adapters.base import (
    Adapter,
    Offsets,
    factor_params,
    init_adapter,
    merge_params,
    num_params,
    select_sites,
)
from grpocem_jax.adapters.svf import SVFFactors, cached_svd, svd, svf
from grpocem_jax.grpo import (
    Batch,
    TrainState,
    clipped,
    group_normalize,
    init_state,
    k3_divergence,
    outcome_advantages,
    process_advantages,
    scale_and_clip,
    token_weights,
    update,
)
from grpocem_jax.models.base import Context, KeyValues, Model, cast_params, dense
from grpocem_jax.models.likelihood import completion_logps, token_logps
from grpocem_jax.models.sampling import Rollouts, sample
from grpocem_jax.search import (
    CEM,
    CEMState,
    Evosax,
    GradientAscent,
    GradientState,
    History,
    HostFitness,
    Likelihood,
    Problem,
    SearchMethod,
    SearchResult,
    SearchState,
    Space,
    Texts,
    advance,
    begin,
    decode,
    expert_space,
    full_space,
    principal_space,
    search,
)
from grpocem_jax.utils.devices import divide, make_mesh, replicate
from grpocem_jax.utils.errors import InputError

if TYPE_CHECKING:
    from grpocem_jax.adaptation import (
        Adaptation,
        Text,
        TrainedRun,
        adapt,
        complete,
        load_run,
        log_likelihoods,
    )
    from grpocem_jax.config.files import load_config
    from grpocem_jax.config.schema import (
        AdapterConfig,
        CEMConfig,
        Config,
        ModelConfig,
        parse_config,
    )
    from grpocem_jax.export.model import Exported, export_model
    from grpocem_jax.models.hub import Pretrained, load_model, save_model
    from grpocem_jax.rollouts.engine import Item, encode
    from grpocem_jax.rollouts.policy import Policy, load_policy
    from grpocem_jax.runs.checkpoints import load_adapter, save_adapter
    from grpocem_jax.tasks import TASKS, Example, Reward, Task
    from grpocem_jax.training.loop import train

_LAZY = {
    name: module
    for module, names in {
        "adaptation": "Adaptation Text TrainedRun adapt complete load_run log_likelihoods",
        "config.files": "load_config",
        "config.schema": "AdapterConfig CEMConfig Config ModelConfig parse_config",
        "export.model": "Exported export_model",
        "models.hub": "Pretrained load_model save_model",
        "rollouts.engine": "Item encode",
        "rollouts.policy": "Policy load_policy",
        "runs.checkpoints": "load_adapter save_adapter",
        "tasks": "Example Reward TASKS Task",
        "training.loop": "train",
    }.items()
    for name in names.split()
}

# Type checkers follow the imports above, and read no list that is not written out.
__all__ = [
    "CEM",
    "TASKS",
    "Adaptation",
    "Adapter",
    "AdapterConfig",
    "Batch",
    "CEMConfig",
    "CEMState",
    "Config",
    "Context",
    "Evosax",
    "Example",
    "Exported",
    "GradientAscent",
    "GradientState",
    "History",
    "HostFitness",
    "InputError",
    "Item",
    "KeyValues",
    "Likelihood",
    "Model",
    "ModelConfig",
    "Offsets",
    "Policy",
    "Pretrained",
    "Problem",
    "Reward",
    "Rollouts",
    "SVFFactors",
    "SearchMethod",
    "SearchResult",
    "SearchState",
    "Space",
    "Task",
    "Text",
    "Texts",
    "TrainState",
    "TrainedRun",
    "adapt",
    "advance",
    "begin",
    "cached_svd",
    "cast_params",
    "clipped",
    "complete",
    "completion_logps",
    "decode",
    "dense",
    "divide",
    "encode",
    "expert_space",
    "export_model",
    "factor_params",
    "full_space",
    "group_normalize",
    "init_adapter",
    "init_state",
    "k3_divergence",
    "load_adapter",
    "load_config",
    "load_model",
    "load_policy",
    "load_run",
    "log_likelihoods",
    "make_mesh",
    "merge_params",
    "num_params",
    "outcome_advantages",
    "parse_config",
    "principal_space",
    "process_advantages",
    "replicate",
    "sample",
    "save_adapter",
    "save_model",
    "scale_and_clip",
    "search",
    "select_sites",
    "svd",
    "svf",
    "token_logps",
    "token_weights",
    "train",
    "update",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
