"""Config files: Python files with a ``get_config``, some of which come with the package."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from grpocem_jax import user_code
from grpocem_jax.errors import InputError
from grpocem_jax.files import is_file

RENAMED = {"grpo.advantage": "grpo.advantages", "grpo.aggregation": "grpo.weights"}
"""Fields by their former names."""


def rename(name: str) -> str:
    """What to say of a field's former name."""
    return f"is called {RENAMED[name]} now, with the same values; rename it."


def config_folder() -> Path:
    """The configs of this version: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(name: str) -> ml_collections.ConfigDict:
    """Loads a config.

    Modules beside the file can be imported from then on, by it and by the names of functions in it,
    as those beside a script can; modules of the same name elsewhere go before them.

    Args:
      name: a file (``configs/gpt2.py``), or the name of one that comes with the package (``tiny``,
        ``gpt2``); behind a colon the argument of its ``get_config`` (``gpt2:tuned``).

    Raises:
      InputError: no such file, or one that fails, exits or returns no config; an InputError of the
        file's own as it is.
    """
    file, *argument = name.split(":", 1)
    path = _find(file)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: is no Python file; a config is one with a get_config().")
    module = importlib.util.module_from_spec(spec)
    beside = str(path.resolve().parent)
    if beside not in sys.path and path.parent != config_folder():
        sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(
            f"{file} cannot be used as a config ({kind}: {message}); correct it."
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"{file}: its get_config returns {type(config).__name__}, not a ConfigDict of "
            "ml_collections; return one."
        )
    return config


def _find(file: str) -> Path:
    if is_file(file):
        return Path(file)
    shipped = {path.stem: path for path in config_folder().glob("*.py")}
    if file not in shipped:
        raise InputError(
            f"{file!r} is neither a file nor a config that comes with the package; those are "
            f"{', '.join(sorted(shipped))}."
        )
    return shipped[file]


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, under the names that this one has.

    Args:
      settings: as config.json has them.
    """
    settings = dict(settings)
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(settings.get(section), Mapping) and name in settings[section]:
            fields = dict(settings[section])
            fields.setdefault(new.split(".")[1], fields.pop(name))
            settings[section] = fields
    return settings
