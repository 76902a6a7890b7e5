"""What ``grpocem-serve`` does: makes keys, or loads a model and serves it."""

import dataclasses
import logging
import sys

import ml_collections

from grpocem_jax.adaptation import load_base, load_run
from grpocem_jax.runs.screens import setting
from grpocem_jax.serving.options import Limits, Options
from grpocem_jax.serving.server import Server, log, open_door
from grpocem_jax.serving.tenants import add_key
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand
from grpocem_jax.utils.terminal import say


def make_key(keys: str, tenant: str) -> None:
    """Adds a key for a tenant to a file, and shows it, once.

    Raises:
      InputError: no file, or a name that no tenant can have.
    """
    if not keys:
        raise InputError("--keys is missing; give the file that --add_key adds to.")
    key = add_key(keys, tenant)
    say(f"a key of {tenant}, which is kept nowhere else:", sys.stderr)
    print(key, flush=True)


def run(
    settings: ml_collections.ConfigDict | None,
    *,
    workdir: str | None,
    model: str | None,
    options: Options,
    limits: Limits,
) -> None:
    """Runs the command; arguments are its flags, ``settings`` None those of the run.

    Raises:
      InputError: flags that contradict each other, and whatever loading and serving raise.
    """
    if workdir == "" or (workdir is None and settings is None):
        raise InputError(
            "--workdir is missing; give a run directory with a trained adapter, or --config to "
            "serve its base model."
        )
    _log_to_stderr()
    door = open_door(options, limits)  # a model may take long to load
    try:
        if workdir is None:
            trained, name = load_base(settings, model=model), None
        else:
            folder = expand(workdir, "--workdir")
            trained, name = load_run(folder, settings, model=model), folder.resolve().name
            if not options.store:
                options = dataclasses.replace(options, store=str(folder / "served"))
    except BaseException:
        door.socket.close()
        raise
    prepared = Server(trained, options, limits, name=name, door=door)
    say("\n".join(setting(trained.config, trained.policy)))
    with prepared as server:
        say(f"serving   {server.catalogue.default} at {server.url}")
        server.wait()


def _log_to_stderr() -> None:
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
