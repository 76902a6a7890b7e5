"""Trains an adapter: ``python train.py --config configs/gpt2.py [--workdir DIR]``.

Any setting can be overridden: ``--config.train.learning_rate=1e-2``.
"""

import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from grpocem_jax import commands
from grpocem_jax.training import train

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/tiny.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; by default runs/CONFIG-TIME.")


def main(argv: list[str]) -> None:
    """Checks the config and trains."""
    del argv
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(WORKDIR.value or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    train(CONFIG.value, workdir)


if __name__ == "__main__":
    commands.run(main)
