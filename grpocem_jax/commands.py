"""What the commands share: flags in; one sentence and an exit status out for a mistake."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from grpocem_jax import memory
from grpocem_jax.config_files import load_config
from grpocem_jax.errors import InputError
from grpocem_jax.files import cache_folder

# Flags that this module defines are listed in the help of the command that asks for them.
flags.disclaim_key_flags()


class _ConfigParser(flags.ArgumentParser):
    def parse(self, argument: str) -> ml_collections.ConfigDict:
        return load_config(argument).lock()


def define_config(default: str | None = None) -> Any:
    """Defines ``--config``, of which every field is a flag too: ``--config.seed=1``.

    Args:
      default: what `load_config` takes; None where the command cannot do without the flag.

    Returns:
      absl's holder of the flag, its ``value`` a locked ConfigDict.
    """
    holder = config_flags.DEFINE_config_file(
        "config", None, "Config: a file, or one of those in the package (tiny, gpt2, gpt2:tuned)."
    )
    # ml_collections knows files only.
    flags.FLAGS["config"].parser = _ConfigParser()
    if default is not None:
        flags.set_default(holder, default)
    return holder


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs a command's ``main`` under absl; mistakes end it with one sentence and status 2."""
    for flag in flags.FLAGS.get_flags_for_module(main.__module__):
        # Flags defined in a module of the package are what --help of the command is asked about.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def guarded(argv: list[str]) -> None:
        # Orbax reports every step of a save, and errors with a traceback before it raises them.
        logging.set_verbosity(logging.FATAL)
        keep_compiled_programs()
        if len(argv) > 1:
            _fail(f"{argv[1]!r} is not a flag; see --help.")
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is None:
            _fail("--config is missing; start with --config tiny.")
        try:
            jax.devices()
        except Exception as error:  # JAX has several for it, one of them a bare AssertionError
            asked, reason = os.environ.get("JAX_PLATFORMS", ""), _one_line(error)
            _fail(
                f"JAX_PLATFORMS={asked!r}: JAX finds no such device ({reason or 'without a reason'}"
                "); install JAX for it (docs/faq.md), or leave the variable unset."
            )
        try:
            main(argv)
        except InputError as error:
            _fail(str(error))
        except jax.errors.JaxRuntimeError as error:
            if not memory.ran_out(error):
                raise
            _fail(
                f"out of device memory ({str(error).splitlines()[0]}); take a smaller model, or a "
                "device with more memory."
            )
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

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
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        _fail(f"an override names a field that the config does not have: {_one_line(error)}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        _fail(_one_line(error))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()]
    return " ".join(line.strip("'\"\\") for line in lines if line)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
