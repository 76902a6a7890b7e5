"""What the commands share: flags in; one sentence and an exit status out for a mistake."""

import atexit
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from grpocem_jax import memory
from grpocem_jax.config_files import RENAMED, load_config, rename
from grpocem_jax.errors import InputError
from grpocem_jax.files import cache_folder
from grpocem_jax.terminal import one_line

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
        "config",
        None,
        "Config: a file, or one of those in the package (tiny, gpt2, gpt2:tuned, llama).",
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
        sys.excepthook = _excepthook
        keep_compiled_programs()
        if len(argv) > 1:
            _fail(f"{argv[1]!r} is not a flag; see --help.")
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is None:
            _fail("--config is missing; start with --config tiny.")
        try:
            jax.devices()
        except Exception as error:  # JAX has several for it, one of them a bare AssertionError
            variables = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
            asked = [f"{x}={os.environ[x]!r}" for x in variables if os.environ.get(x)]
            reason = _one_line(error) or "without a reason"
            _fail(
                f"{' and '.join(asked) or variables[0]}: JAX finds no such device ({reason}"
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
        except BrokenPipeError:
            _fail("what reads the output has closed it (head does); write it to a file instead.")
        except OSError as error:  # such as a full disk in the middle of a run
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"{place}{error.strerror or _one_line(error)}; mend that and run it again.")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    # JAX clears its caches at exit, where an interrupt would be a traceback.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)

    def parse(argv: list[str]) -> list[str]:
        try:
            return parse_flags(argv)
        except InputError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=parse)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Shows what nobody caught, but for what TensorStore prints of every array of a checkpoint that
    a full disk cut off; the error itself is raised as well."""
    if kind is not RuntimeError or str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a second start finds them.

    They lie in ``xla`` of `grpocem_jax.files.cache_folder`; ``JAX_COMPILATION_CACHE_DIR`` names
    another folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line, the overrides of ``--config`` included.

    Args:
      argv: as ``sys.argv``, where ml_collections looks for overrides.

    Returns:
      what is no flag; the program's name comes first.

    Raises:
      InputError: an unknown flag, a value of another type, or a config that cannot be used.
    """
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        name, *suggestion = _lines(error) or [""]
        given = [x.split("=")[0] for x in argv if name in x.split("=")[0].split(".")]
        for flag in given:
            if (field := _OVERRIDE.sub("", flag, count=1)) in RENAMED:
                raise InputError(f"{flag}: {rename(field)}") from None
        where = ", ".join(given) or f"an override of --config ({name})"
        hint = "".join(f" ({x})" for x in suggestion)
        raise InputError(
            f"{where}: the config has no such field{hint}; docs/config.md lists them."
        ) from None
    except flags.IllegalFlagValueError as error:
        if isinstance(error.__context__, InputError):
            raise error.__context__ from None
        kind = next((kind for sign, kind in _KINDS.items() if sign in str(error)), None)
        fix = f"give {kind}" if kind else "see --help"
        raise InputError(f"{_one_line(error)}; {fix}.") from None
    except flags.UnrecognizedFlagError as error:
        nearest = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"did you mean --{nearest[0]}?" if nearest else "see --help."
        raise InputError(f"--{error.flagname}: there is no such flag; {hint}") from None
    except (
        flags.Error, IndexError, MemoryError, OSError, RecursionError, SyntaxError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        given = [x.split("=")[0] for x in argv if _OVERRIDE.match(x)]
        odd = next((x for x in given if not _FIELD.fullmatch(_OVERRIDE.sub("", x, count=1))), None)
        if odd is not None:
            raise InputError(
                f"{odd}: is no name of a field; give names with dots between them, and a tuple as "
                "a whole (docs/config.md)."
            ) from None
        raise InputError(f"{_one_line(error)}; see --help and docs/config.md.") from None


_OVERRIDE = re.compile(r"--?(?:no)?config\.")
_FIELD = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_KINDS = {
    "int()": "a whole number",
    "to float": "a number",
    "Non-boolean": "True or False",
    "ConfigDict": "its fields one by one",
}
"""What a flag takes, by what ml_collections and absl say of another value."""


def _one_line(error: Exception) -> str:
    return " ".join(_lines(error)).rstrip(".")


def _lines(error: Exception) -> list[str]:
    lines = [
        line.strip() for line in str(error).replace("\\n", "\n").replace(". ", "; ").splitlines()
    ]
    # ml_collections shows the names of fields as Python would write strings.
    quoted = isinstance(error, AttributeError | KeyError)
    return [line.strip("'\"\\") if quoted else line for line in lines if line]


def _fail(sentence: str) -> NoReturn:
    print(f"error: {one_line(sentence)}", file=sys.stderr)
    sys.exit(2)
