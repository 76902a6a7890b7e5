"""The settings of a run: records, config files, and how one becomes the other."""

from grpocem_jax.config.defaults import lay_defaults, with_defaults
from grpocem_jax.config.files import load_config
from grpocem_jax.config.method import make_method
from grpocem_jax.config.names import renamed, section
from grpocem_jax.config.parse import check_fits_reward, parse_config
from grpocem_jax.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    GenerationConfig,
    GRPOConfig,
    LoggingConfig,
    ModelConfig,
    SearchConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "GRPOConfig",
    "GenerationConfig",
    "LoggingConfig",
    "ModelConfig",
    "SearchConfig",
    "TrainConfig",
    "check_fits_reward",
    "lay_defaults",
    "load_config",
    "make_method",
    "parse_config",
    "renamed",
    "section",
    "with_defaults",
]
