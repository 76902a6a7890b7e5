"""Functions of the user's own, named in a config as ``package.module:function``."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from grpocem_jax.utils.errors import InputError


def is_reference(name: str) -> bool:
    """Whether a setting names a function of the user's own."""
    return ":" in name


def failure(error: BaseException) -> tuple[str, str]:
    """The type and the message of an error that the user's own code raised.

    Args:
      error: an exception, or the SystemExit of ``sys.exit``.

    Raises:
      SystemExit: the error itself where it is of a class of its own, as that of a signal is
        (`grpocem_jax.runs.rundir.Interrupted`): it ends the run.
    """
    if isinstance(error, SystemExit) and type(error) is not SystemExit:
        raise error
    try:
        message = str(error)
    except Exception:  # a __str__ of the user's own
        message = ""
    return type(error).__name__, message or "no message"


def load_function(name: str, *, field: str) -> Callable[..., Any]:
    """Imports a function.

    The working directory is looked in first, as by ``python -m``; the folders of config files are
    looked in last (`config_files.load_config`).

    Args:
      name: ``package.module:function``; dots behind the colon reach into classes.
      field: the config field that holds the name, for error messages.

    Raises:
      InputError: another form, a module that fails to import, or nothing callable of that name.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(
            f"{field}={name!r}: is not of the form package.module:function; write it so."
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module's own code may raise
        kind, message = failure(error)
        raise InputError(
            f"{field}={name!r}: the module {module_name} cannot be imported ({kind}: {message}); "
            "correct the name, start where it lies, or put it beside the config file."
        ) from error
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(
            f"{field}={name!r}: the module {module_name} has no function {attribute}; "
            "correct the name."
        )
    return found
