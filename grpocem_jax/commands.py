"""What the commands share: flags in; one sentence and an exit status out for a mistake."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from grpocem_jax.errors import InputError
from grpocem_jax.files import cache_folder


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command's ``main`` under absl; mistakes end it with one sentence and status 2."""

    def guarded(argv: list[str]) -> None:
        # Orbax reports every step of a save at the level of info.
        logging.set_verbosity(logging.WARNING)
        keep_compiled_programs()
        if len(argv) > 1:
            _fail(f"{argv[1]!r} is not a flag; see --help.")
        if flags.FLAGS["config"].value is None:
            _fail("--config is missing; start with --config configs/tiny.py.")
        try:
            main(argv)
        except InputError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=_parse_flags)


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a second start finds them.

    They lie in ``xla`` of `grpocem_jax.files.cache_folder`; ``JAX_COMPILATION_CACHE_DIR`` names
    another folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        if config is not None:
            config.to_dict()  # a file that could not be loaded says so when it is used
    except (AttributeError, KeyError) as error:
        _fail(f"an override names a field that the config does not have: {_one_line(error)}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        _fail(_one_line(error))
    return rest


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()]
    lines = [line.strip("'\"\\") for line in lines if line]
    # ml_collections passes a config file's own error on as the text of its traceback.
    is_traceback = any("Traceback" in line for line in lines)
    return lines[-1] if is_traceback else " ".join(lines)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
