"""Adapts a trained adapter at inference: to a prompt, to prompts of a file, or to examples.

    python adapt.py --workdir runs/TRAINED --prompt "Review: ..."
    python adapt.py --workdir runs/TRAINED --evaluate

Without --prompt, --prompts or --evaluate the prompt is read from standard input.  Any setting can
be overridden: ``--config.cem.population_size=200``.  The installed command ``grpocem-adapt`` is the
same.
"""

from grpocem_jax import cli

if __name__ == "__main__":
    cli.adapt()
