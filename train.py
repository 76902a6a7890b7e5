"""Trains an adapter: ``python train.py --config configs/gpt2.py [--workdir DIR]``.

Any setting can be overridden: ``--config.train.learning_rate=1e-2``.
"""

import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from grpocem_jax import config as config_lib
from grpocem_jax import training
from grpocem_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/tiny.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; by default runs/CONFIG-TIME.")


def main(argv: list[str]) -> None:
    """Checks the config and trains."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is not a flag; see train.py --help.")
    if CONFIG.value is None:
        sys.exit("error: --config is missing; start with --config configs/tiny.py.")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(WORKDIR.value or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        training.train(config_lib.parse(CONFIG.value), CONFIG.value.to_dict(), workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
