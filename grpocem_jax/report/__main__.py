"""Makes the report page of a run again: ``python -m grpocem_jax.report --workdir DIR``."""

from absl import flags

from grpocem_jax import report
from grpocem_jax.config import commands
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.terminal import show

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")


def main(argv: list[str]) -> None:
    """Checks the flag and writes the page."""
    del argv
    if not WORKDIR.value:
        raise InputError("--workdir is missing; give a run directory.")
    show(str(report.write(WORKDIR.value)))


if __name__ == "__main__":
    commands.run(main)
