"""The report page of a run: one HTML file that needs no network, and a PNG of each plot.

    python -m grpocem_jax.report --workdir runs/TRAINED

Everything on it is read from the run directory, so it can be made again at any time.
"""

from pathlib import Path

from grpocem_jax.report import record
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, write_bytes

__all__ = ["write"]


def write(workdir: str | Path) -> Path:
    """Writes ``report/index.html`` and ``report/PANEL.png`` of each plot.

    Args:
      workdir: a run directory; what it lacks, the page says in words.

    Returns:
      the page.

    Raises:
      InputError: no run there, a file in it that cannot be read, or a page that cannot be written.
    """
    # Drawing and templates take a second to import, which only this needs.
    from grpocem_jax.report import page

    workdir = expand(workdir, "--workdir")
    found = record.read(workdir)
    try:
        html, images = page.make(found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"--workdir={workdir}: a file of the run is not as training and adaptation write it "
            f"({type(error).__name__}: {error}); restore or remove what was changed there."
        ) from error
    folder = workdir / "report"
    try:
        folder.mkdir(exist_ok=True)
        for name, png in images.items():
            write_bytes(folder / f"{name}.png", png)
        write_bytes(folder / "index.html", html.encode())
    except OSError as error:
        raise InputError(
            f"{folder}: the report cannot be written ({error.strerror}), but the run is whole; "
            f"mend that, then run python -m grpocem_jax.report --workdir {workdir}."
        ) from None
    return folder / "index.html"
