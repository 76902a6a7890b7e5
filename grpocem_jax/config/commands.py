"""What the commands share: flags in; one sentence and an exit status out for a mistake."""

import atexit
import difflib
import importlib.util
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from grpocem_jax.config.files import load_config
from grpocem_jax.config.names import RENAMED, rename
from grpocem_jax.utils import cluster, memory
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import cache_folder, expand, is_file
from grpocem_jax.utils.processes import ProcessLostError, causes
from grpocem_jax.utils.terminal import abandon, one_line, say, unread

# Flags that this module defines are listed in the help of the command that asks for them.
flags.disclaim_key_flags()


MODEL_HELP = "Hub id or folder of the base model, if it is no longer where the run found it."


class _ConfigParser(flags.ArgumentParser):
    def __init__(self, of_run: bool):
        self.of_run = of_run

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        given = {}
        arguments = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        for each, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
            if _OVERRIDE.match(each):
                name, is_there, value = _OVERRIDE.sub("", each, count=1).partition("=")
                given[name] = value if is_there else following
        return load_config(argument, flags=given).lock()


def _of_run(config: flags.Flag) -> bool:
    """Whether ``--config`` may be left out where ``--workdir`` has a run."""
    return isinstance(config.parser, _ConfigParser) and config.parser.of_run


def define_config(default: str | None = None, *, of_run: bool = False) -> Any:
    """Defines ``--config``, of which every field is a flag too: ``--config.seed=1``.

    Args:
      default: what `load_config` takes; None where the command cannot do without the flag.
      of_run: whether the flag may be left out because the run in ``--workdir`` knows its settings;
        ``--config.seed=1`` changes those then.

    Returns:
      absl's holder of the flag, its ``value`` a locked ConfigDict; with ``of_run`` None where
      neither the flag nor a run with a config.json is given.
    """
    of_package = "a file, or one of those in the package (tiny, gpt2, gpt2:tuned, smollm2, llama)."
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        f"Config, in place of the run's own: {of_package}" if of_run else f"Config: {of_package}",
    )
    # ml_collections knows files only.
    flags.FLAGS["config"].parser = _ConfigParser(of_run)
    if default is not None:
        flags.set_default(holder, default)
    return holder


def define_processes() -> Callable[[], cluster.Place | None]:
    """Defines the flags of a command that many processes may run together.

    Returns:
      joins the others where there are any, see `utils.cluster`; before anything touches a device.
    """
    several = flags.DEFINE_bool(
        "distributed",
        None,
        "Whether this is one of several processes, each started with the same command; by default "
        "where SLURM, Open MPI, Kubernetes or JAX_COORDINATOR_ADDRESS say so (docs/clusters.md).",
    )
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
    count = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    index = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    wait_s = flags.DEFINE_integer(
        "wait_s", cluster.WAIT_S, "Seconds to wait for a process that is alive but does not come."
    )
    dead_after_s = flags.DEFINE_integer(
        "dead_after_s", cluster.DEAD_AFTER_S, "Seconds after which a silent process counts as dead."
    )

    def join() -> cluster.Place | None:
        place = cluster.find(several.value, address.value, count.value, index.value)
        cluster.join(place, wait_s=wait_s.value, dead_after_s=dead_after_s.value)
        return place

    return join


def run(
    main: Callable[[list[str]], Any],
    *,
    arguments: bool = False,
    join: Callable[[], cluster.Place | None] = lambda: None,
) -> None:
    """Runs a command's ``main`` under absl; mistakes end it with one sentence and status 2.

    Args:
      main: is given what is no flag, behind the program's name.
      arguments: whether the command takes such arguments, flags before and after them.
      join: of `define_processes`, where it may be one of several.
    """
    flags.FLAGS.set_gnu_getopt(arguments)
    for flag in flags.FLAGS.get_flags_for_module(main.__module__):
        # Flags defined in a module of the package are what --help of the command is asked about.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def guarded(argv: list[str]) -> None:
        # Orbax reports every step of a save, and errors with a traceback before it raises them.
        logging.set_verbosity(logging.FATAL)
        sys.excepthook = _excepthook
        if len(argv) > 1 and not arguments:
            _fail(f"{argv[1]!r} is not a flag; see --help.")
        config = flags.FLAGS["config"] if "config" in flags.FLAGS else None  # noqa: SIM401
        if config is not None and config.value is None and not _of_run(config):
            _fail("--config is missing; start with --config tiny.")
        try:
            join()
        except InputError as error:
            _fail(str(error))
        try:
            jax.devices()
        except Exception as error:  # JAX has several for it, one of them a bare AssertionError
            variables = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
            asked = [f"{x}={os.environ[x]!r}" for x in variables if os.environ.get(x)]
            _fail(
                f"{' and '.join(asked) or variables[0]}: JAX finds no such device "
                f"({_no_device(error, ' '.join(asked))}); install JAX for it (docs/faq.md), or "
                "leave the variable unset."
            )
        try:
            keep_compiled_programs()
            with cluster.here().together():
                main(argv)
        except InputError as error:
            if any(isinstance(each, ProcessLostError) for each in causes(error)):
                # The runtime would wait for those that are gone before it lets this one end.
                with unread(sys.stdout):
                    sys.stdout.flush()
                cluster.end(one_line(str(error)))
            _fail(str(error))
        except jax.errors.JaxRuntimeError as error:
            if not memory.ran_out(error):
                raise
            _fail(
                f"out of device memory ({str(error).splitlines()[0]}); take a smaller model, or a "
                "device with more memory."
            )
        except BrokenPipeError:
            abandon(sys.stdout)
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


def _no_device(error: Exception, asked: str) -> str:
    """Why JAX has no device of the kind asked for, which of CUDA it does not say itself."""
    reason = _one_line(error)
    if "cuda" not in asked and "gpu" not in asked:
        return reason or type(error).__name__
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "this JAX is for CPUs only: its CUDA plugin is not installed"
    return reason or "its CUDA plugin finds no GPU; see whether nvidia-smi does"


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Shows what nobody caught, but for what TensorStore prints of every array of a checkpoint that
    a full disk cut off; the error itself is raised as well."""
    if kind is not RuntimeError or str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a second start finds them.

    They lie in ``xla`` of `utils.files.cache_folder`; ``JAX_COMPILATION_CACHE_DIR`` names another
    folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. Where there is no folder to
    write to, none are kept, and a line on stderr says so.

    Raises:
      InputError: ``JAX_COMPILATION_CACHE_DIR`` is in a home directory that is not known.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given is not None:
        if given.startswith("~"):  # which JAX takes for the name of a folder
            folder = expand(given, "JAX_COMPILATION_CACHE_DIR")
            jax.config.update("jax_compilation_cache_dir", str(folder))
        return
    caches = cache_folder()
    if caches is not None:
        jax.config.update("jax_compilation_cache_dir", str(caches / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    elif jax.config.values["jax_enable_compilation_cache"]:
        say(
            "cache     none, as there is no home directory that can be written to: every start "
            "compiles anew; XDG_CACHE_HOME names another folder",
            sys.stderr,
        )


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
        _default_to_run(argv)
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


def _default_to_run(argv: list[str]) -> None:
    """Makes the settings of the run in ``--workdir`` those of ``--config`` where it is left out.

    Before the flags are parsed: which of the overrides are flags depends on it.
    """
    config = flags.FLAGS["config"] if "config" in flags.FLAGS else None  # noqa: SIM401
    if config is None or not _of_run(config) or _given(argv, "config") is not None:
        return
    workdir = _given(argv, "workdir") or ""
    path = Path(workdir) / "config.json"
    if workdir and is_file(path):
        flags.FLAGS.set_default("config", str(path))
    elif workdir and any(_OVERRIDE.match(argument) for argument in argv):
        raise InputError(
            f"--workdir={workdir}: holds no run whose settings could be changed (there is no "
            "config.json); give another, or --config."
        )


def _given(argv: list[str], name: str) -> str | None:
    """The last value of a flag on a command line that is not parsed yet, None without one."""
    found = None
    for place, argument in enumerate(argv[1:], start=1):
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL)
        if match:
            after = argv[place + 1] if place + 1 < len(argv) else ""
            found = after if match[1] is None else match[1]
    return found


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
