"""Config files: Python files with a ``get_config``, some of which come with the package, and the
``config.json`` of a run."""

import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from grpocem_jax.config.defaults import lay_defaults
from grpocem_jax.config.names import renamed
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_file, is_folder, read_object

CODE = "code_folders"
"""The field of run.json with the folders in which the run's own functions were looked for."""

_code_folders: list[str] = []


def config_folder() -> Path:
    """The configs of this version: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(
    name: str, *, flags: Mapping[str, str] = types.MappingProxyType({})
) -> ml_collections.ConfigDict:
    """Loads a config, with every field that there is (`lay_defaults`).

    Modules beside the file can be imported from then on, by it and by the names of functions in it,
    as those beside a script can; modules of the same name elsewhere go before them.

    Args:
      name: a file (``configs/gpt2.py``), or the name of one that comes with the package (``tiny``,
        ``gpt2``); behind a colon the argument of its ``get_config`` (``gpt2:tuned``). Or the
        ``config.json`` of a run: its settings, with the folders in which the run found its modules.

    Raises:
      InputError: no such file, or one that fails, exits or returns no config; an InputError of the
        file's own as it is.
    """
    if name.endswith(".json"):
        return _load_run_config(expand(name, "--config"), flags)
    file, *argument = name.split(":", 1)
    path = _find(file)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: is no Python file; a config is one with a get_config().")
    module = importlib.util.module_from_spec(spec)
    if path.resolve().parent != config_folder().resolve():
        _look_in(str(path.resolve().parent))
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
    if isinstance(config, ml_collections.FrozenConfigDict):
        config = ml_collections.ConfigDict(config)
    lay_defaults(config, flags)
    return config


def code_folders() -> list[str]:
    """The folders of the config files loaded so far, where functions named in them may lie."""
    return list(_code_folders)


def _look_in(folder: str) -> None:
    if folder not in _code_folders:
        _code_folders.append(folder)
    if folder not in sys.path:
        sys.path.append(folder)


def _load_run_config(
    path: Path, flags: Mapping[str, str] = types.MappingProxyType({})
) -> ml_collections.ConfigDict:
    """The settings that a run was made with.

    Raises:
      InputError: no such file, or one that holds no settings.
    """
    fix = "give another run"
    stored = read_object(path, fix=fix)
    try:
        settings = ml_collections.ConfigDict(renamed(stored))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: holds no settings ({error}); {fix}.") from None
    if is_file(path.with_name("run.json")):
        folders = read_object(path.with_name("run.json"), fix=fix).get(CODE)
        for folder in folders if isinstance(folders, list) else []:
            if isinstance(folder, str) and is_folder(folder):
                _look_in(folder)
    lay_defaults(settings, flags)
    return settings


def _find(file: str) -> Path:
    path = expand(file, "--config")
    if is_file(path):
        return path
    shipped = {path.stem: path for path in config_folder().glob("*.py")}
    if file not in shipped:
        raise InputError(
            f"{file!r} is neither a file nor a config that comes with the package; those are "
            f"{', '.join(sorted(shipped))}."
        )
    return shipped[file]
