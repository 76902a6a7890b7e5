"""The search method that a config names."""

import dataclasses
import functools
import json
import re
from typing import Any

from grpocem_jax.config.names import section
from grpocem_jax.config.schema import Config
from grpocem_jax.search import CEM, METHODS, Evosax, SearchMethod
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError


def make_method(config: Config) -> SearchMethod:
    """The search method; equal for equal settings, so that programs are shared.

    Raises:
      InputError: a strategy that evosax lacks, options that a method does not take, or a function
        of the user's own that cannot be imported or fails.
    """
    name = config.search.method
    if name == "cem":
        return config.cem
    if name == "gradient":
        return config.gradient
    if name.startswith("evosax:"):
        return _evosax(config, name.removeprefix("evosax:"))
    if name in METHODS:
        return _named(config, name)
    return _own(name, json.dumps(dict(config.search.options), sort_keys=True))


def _named(config: Config, name: str) -> SearchMethod:
    make, own = METHODS[name], dict(config.search.options)
    where = f"config.search.method={name!r}" + (f" with options {own}" if own else "")
    given = {"population_size", "noise_std"}
    known = [field.name for field in dataclasses.fields(make) if field.name not in given]
    for option in own:
        if option not in known:
            raise InputError(f"{where}: has no option {option}; it has {', '.join(known)}.")
    try:
        return make(
            population_size=config.cem.population_size, noise_std=config.cem.noise_std, **own
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _evosax(config: Config, name: str) -> SearchMethod:
    try:
        with section("cem", CEM):
            return Evosax(
                name=name,
                population_size=config.cem.population_size,
                noise_std=config.cem.noise_std,
                options=config.search.options,
            )
    except InputError as error:
        # Name and options are parts of other fields here.
        message = str(error).replace(f"name={name!r}", f"config.search.method='evosax:{name}'", 1)
        message = re.sub(r"^options\b|(?<= in )options\b", "config.search.options", message)
        raise InputError(message) from error


@functools.lru_cache(maxsize=32)
def _own(name: str, options: str) -> Any:
    """The search method that a function of the user's own returns."""
    field = "config.search.method"
    function = user_code.load_function(name, field=field)
    keywords = json.loads(options)
    try:
        return function(**keywords)
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(
            f"{field}={name!r} with options {keywords} raised {kind} "
            f"({message.splitlines()[0]}); it must return a search method "
            "(grpocem_jax.search.SearchMethod)."
        ) from error
