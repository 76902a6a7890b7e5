"""A run directory: one process at a time, one set of settings, and signals that end a run."""

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from grpocem_jax.config import files as config_files
from grpocem_jax.config import renamed, with_defaults
from grpocem_jax.config.schema import altering
from grpocem_jax.runs import metrics
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import is_file, is_folder, read_object, write_json
from grpocem_jax.utils.terminal import say

NEUTRAL = altering("nothing")
"""Settings that may change while a run continues: they do not alter what is trained.

A model may move; that its weights are the same is known by their hash (`check_identity`)."""

LENGTH = altering("length")
"""Settings of how long a run is, which may change as well: it goes on, or ends sooner."""

ANOTHER = "give another --workdir"

SHOWN = 5
"""Differences between settings that a message lists."""

OF_A_RUN = ("metrics.jsonl", "completions.jsonl", "summary.json", "checkpoints", "adapter")
"""What a run would write over."""


class Interrupted(SystemExit):
    """A signal ended a run whose work is on disk; the exit status is 128 + signal."""


def check_settings(workdir: Path, settings: Mapping[str, Any]) -> bool:
    """Whether there is a run of these settings to continue.

    Args:
      workdir: the run directory, which need not be there.
      settings: all settings, as config.json has them.

    Raises:
      InputError: a run of other settings, with the differences; a config.json that cannot be
        read, or is not there beside other files of a run.
    """
    path = workdir / "config.json"
    if not is_file(path):
        others = [name for name in OF_A_RUN if (workdir / name).exists()]
        if is_folder(workdir) and others:
            raise InputError(
                f"--workdir={workdir}: holds {others[0]} but no config.json to say what of; "
                "give another folder."
            )
        return False
    found = read_object(path, fix=ANOTHER)
    if renamed(found) != found:
        raise InputError(
            f"--workdir={workdir}: holds a run of an earlier version, which cannot be continued; "
            "give another folder. It can be adapted and exported."
        )
    stored = _but(NEUTRAL, _complete(found))
    given = _but(NEUTRAL, _complete(json.loads(json.dumps(settings))))
    changed = [x for x in sorted(stored.keys() | given) if stored.get(x) != given.get(x)]
    if set(changed) - set(LENGTH):
        listed = [
            f"{name} is {_brief(stored.get(name))} there and {_brief(given.get(name))} here"
            for name in changed[:SHOWN]
        ]
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise InputError(
            f"--workdir={workdir}: holds a run with other settings ({'; '.join(listed)}{more}); "
            "give another folder, or the settings of that run to continue it."
        )
    return True


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of config.json with the defaults of fields that it lacks."""
    try:
        config = with_defaults(ml_collections.ConfigDict(settings))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return settings  # not as a run writes them; every difference will be named
    return json.loads(json.dumps(config.to_dict()))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def trained_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that alter what is trained, how long apart, by their names with dots."""
    return _but((*NEUTRAL, *LENGTH), settings)


def _but(left_out: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their names with dots, but for some and whole sections."""
    return {
        name: value
        for name, value in flat(settings).items()
        if not any(name == own or name.startswith(f"{own}.") for own in left_out)
    }


def check_identity(workdir: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """The contents of a run's run.json.

    Args:
      workdir: a run directory.
      identity: hashes of what the run is trained on, by name.

    Raises:
      InputError: another identity than the run was started on, or a run.json that cannot be read.
    """
    stored = read_object(workdir / "run.json", fix=ANOTHER)
    for name, value in identity.items():
        if stored.get(name) != value:
            raise InputError(
                f"--workdir={workdir}: the run there was started on another {name}; give another "
                "folder, or what it was started on to continue it."
            )
    return stored


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Takes a folder, made where it is not there, until the block ends or the process does.

    Raises:
      InputError: a folder that cannot be written, or another process in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--workdir={workdir}: cannot be written ({reason}); give another folder."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--workdir={workdir}: another process is running there; wait for it, or give "
                "another folder."
            ) from None
        except OSError as error:
            warning = f"no lock on {workdir} ({error.strerror}): start no second run there"
            say(warning)
        yield


@contextlib.contextmanager
def claim(
    workdir: Path, settings: Mapping[str, Any], identity: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Takes a run directory for this process, see `lock`.

    Args:
      workdir: made where it is not there.
      settings: all settings; written as config.json in a new run.
      identity: hashes of what the run is trained on, by name; kept in run.json.

    Yields:
      the contents of run.json: the identity with the ``id`` that the run got at its start, the
      command that started it (`metrics.invocation`) and where that looked for modules.

    Raises:
      InputError: as `lock`, or another identity.
    """
    with lock(workdir):
        if check_settings(workdir, settings):
            stored = check_identity(workdir, identity)
        else:
            started = {**metrics.invocation(), config_files.CODE: config_files.code_folders()}
            stored = {**identity, "id": uuid.uuid4().hex[:8], **started}
            write_json(workdir / "run.json", stored)
        write_json(workdir / "config.json", settings)
        yield stored


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their names with dots."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found |= flat(part, f"{prefix}.{name}" if prefix else str(name))
    return found


class Signals:
    """Catches SIGTERM and SIGINT inside a ``with`` block.

    The first is only noted where `at_once` is not set; the next raises `Interrupted`, and one after
    that ends the process at once.  Outside the main thread, where Python allows no handlers,
    nothing is caught.

    Attributes:
      received: the first signal, or None.
      at_once: whether a signal raises `Interrupted` where it comes, as when everything is on disk;
        else who set this looks at ``received``.
    """

    received: int | None = None
    at_once: bool = True
    _raised: bool = False

    def __enter__(self) -> "Signals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self._raised:
            os._exit(128 + number)
        self._raised = self.at_once or self.received is not None
        self.received = self.received or number
        name = signal.Signals(number).name
        what = "the same command continues the run"
        if not self._raised:
            what = (
                "the step under way and a checkpoint are finished first; a second signal leaves "
                "that step out"
            )
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            say(f"\n{name}: {what}", sys.stderr)
        if self._raised:
            raise Interrupted(128 + number)
