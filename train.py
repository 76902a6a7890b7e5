"""Trains an adapter: ``python train.py --config configs/gpt2.py [--workdir DIR]``.

Any setting can be overridden: ``--config.train.learning_rate=1e-2``.  The installed command
``grpocem-train`` is the same.
"""

from grpocem_jax import cli

if __name__ == "__main__":
    cli.train()
