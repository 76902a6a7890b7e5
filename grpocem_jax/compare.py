"""Compares runs: a table on the terminal, and one page that needs no network.

    grpocem-compare runs/*
    python -m grpocem_jax.compare runs/a runs/b --out compare.html

Everything is read from the run directories, whether the runs have ended or not.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from grpocem_jax.config import commands
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import write_bytes
from grpocem_jax.utils.terminal import say


def compare(folders: Sequence[str], out: str | Path) -> str:
    """Compares runs and writes the page of the comparison.

    Args:
      folders: at least two run directories.
      out: the HTML file to write; one that is there is written over.

    Returns:
      the comparison as text: settings that differ, and held-out gains with their intervals.

    Raises:
      InputError: fewer than two folders or one twice, folders that hold no run, a file in one that
        cannot be read, or a page that cannot be written.
    """
    # Drawing and templates take a second to import, which only this needs.
    from grpocem_jax.report import comparison

    out = Path(out)
    if out.suffix != ".html":
        raise InputError(f"--out={out}: the page is HTML; give a name that ends in .html.")
    runs = comparison.read(folders)
    html = comparison.page(runs)
    try:
        write_bytes(out, html.encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out={out}: cannot be written ({reason}); give another file.") from None
    return comparison.show(runs)


def main() -> None:
    """The command."""
    out = flags.DEFINE_string("out", "compare.html", "HTML file of the comparison.")

    def run(argv: list[str]) -> None:
        say(compare(argv[1:], out.value))
        say(f"page      {out.value}")

    commands.run(run, arguments=True)


if __name__ == "__main__":
    main()
