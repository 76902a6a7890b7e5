"""GRPO and CEM on a few numbers of a frozen language model, in JAX: the public API.

Parts that need nothing else are pure functions of arrays (`adapters`, `grpo`, `search`, and the
sampler and likelihood of `models`); workflows (`train`, `adapt`) put them together by a config.
What only a part's own users need is in its package: `grpocem_jax.adapters`, `grpocem_jax.grpo`,
`grpocem_jax.search`, `grpocem_jax.models`, `grpocem_jax.tasks`.  Names that need Flax are imported
when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grpocem_jax import adapters, grpo, models, search
from grpocem_jax.adapters import Adapter, attach, each_site, lora, merge_params, num_params, svf
from grpocem_jax.grpo import (
    Batch,
    TrainState,
    clipped,
    init_state,
    outcome_advantages,
    token_weights,
    update,
)
from grpocem_jax.models import Model, Rollouts, completion_logps, dense, sample, token_logps
from grpocem_jax.search import (
    CEM,
    GradientAscent,
    HostFitness,
    Likelihood,
    SearchMethod,
    full_space,
    maximize,
)
from grpocem_jax.utils.errors import InputError

if TYPE_CHECKING:
    from grpocem_jax import tasks
    from grpocem_jax.adaptation import Text, TrainedRun, adapt, complete, load_run, log_likelihoods
    from grpocem_jax.config import Config, load_config, parse_config
    from grpocem_jax.export.model import export_model
    from grpocem_jax.models.hub import Pretrained, load_model, save_model
    from grpocem_jax.rollouts.policy import load_policy
    from grpocem_jax.rollouts.prompts import encode
    from grpocem_jax.runs.checkpoints import load_adapter, save_adapter
    from grpocem_jax.serving.server import serve
    from grpocem_jax.training.loop import train

_LAZY = {
    name: module
    for module, names in {
        "adaptation": "Text TrainedRun adapt complete load_run log_likelihoods",
        "config": "Config load_config parse_config",
        "export.model": "export_model",
        "models.hub": "Pretrained load_model save_model",
        "rollouts.prompts": "encode",
        "rollouts.policy": "load_policy",
        "runs.checkpoints": "load_adapter save_adapter",
        "serving.server": "serve",
        "tasks": "tasks",
        "training.loop": "train",
    }.items()
    for name in names.split()
}

# Type checkers follow the imports above, and read no list that is not written out.
__all__ = [  # noqa: RUF022
    # Packages.
    "adapters",
    "grpo",
    "models",
    "search",
    "tasks",
    # Adapters.
    "Adapter",
    "attach",
    "each_site",
    "lora",
    "merge_params",
    "num_params",
    "svf",
    # Models, sampling, likelihood.
    "Model",
    "Pretrained",
    "Rollouts",
    "completion_logps",
    "dense",
    "load_model",
    "sample",
    "save_model",
    "token_logps",
    # GRPO.
    "Batch",
    "TrainState",
    "clipped",
    "init_state",
    "outcome_advantages",
    "token_weights",
    "update",
    # Search.
    "CEM",
    "GradientAscent",
    "HostFitness",
    "Likelihood",
    "SearchMethod",
    "full_space",
    "maximize",
    # Workflows.
    "Config",
    "InputError",
    "Text",
    "TrainedRun",
    "adapt",
    "complete",
    "encode",
    "export_model",
    "load_adapter",
    "load_config",
    "load_policy",
    "load_run",
    "log_likelihoods",
    "parse_config",
    "save_adapter",
    "serve",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}".rstrip("."))
    return module if _LAZY[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
