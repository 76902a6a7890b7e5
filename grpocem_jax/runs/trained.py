"""What a training left behind, loaded again."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.config import Config, parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.rollouts.policy import Policy, load_policy
from grpocem_jax.runs import checkpoints
from grpocem_jax.utils import cluster, devices
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_file, read_object


class TrainedRun(NamedTuple):
    """What `grpocem_jax.train` left behind: settings, policy and trained adapter."""

    config: Config
    policy: Policy
    offsets: Offsets


def load_run(
    workdir: str | Path,
    settings: ml_collections.ConfigDict | None = None,
    *,
    adapter: str | Path | None = None,
    model: str | None = None,
) -> TrainedRun:
    """Loads a trained run.

    Args:
      workdir: a run directory.
      settings: other settings than the run's own.
      adapter: the folder of another adapter of the same model and settings than the one that the
        run ended with, ``workdir/adapter``: what ``grpocem-adapt --save`` wrote, or
        ``workdir/best_adapter``, that of the checkpoint that did best on validation prompts
        (``train.evaluate_every_steps``).
      model: where the base model lies now, in place of ``model.source`` of the settings; its
        weights must be those that the adapter was trained on.

    Both paths are relative to the current directory, as those of `load_adapter` and ``--save``.

    Raises:
      InputError: no run there, no base model at its place, no trained adapter in it, or one of
        another model or shape.
    """
    workdir = expand(workdir, "--workdir")
    folder = workdir / "adapter" if adapter is None else expand(adapter, "adapter")
    if not is_file(folder / "adapter_model.safetensors"):
        if adapter is None:
            raise InputError(
                f"--workdir={workdir}: holds no trained adapter in adapter/; train one with "
                f"grpocem-train --config CONFIG --workdir {workdir}."
            )
        inside = workdir / folder
        there = is_file(inside / "adapter_model.safetensors")
        hint = f"give {str(inside)!r}" if there else "correct it"
        raise InputError(
            f"adapter={str(folder)!r}: there is no adapter; the path is relative to the current "
            f"directory, so {hint}."
        )
    if settings is None:
        settings = load_config(str(workdir / "config.json"))
    config = _with_model(parse_config(settings), model)
    try:
        policy = _load_policy(config)
    except InputError as error:
        if model is not None or not str(error).startswith("model.source="):
            raise
        raise InputError(
            f"{str(error).rstrip('.')}; where the run's base model lies elsewhere now, give its "
            "place with --model."
        ) from error
    return TrainedRun(config, policy, load_fitting_adapter(config, policy, folder))


def load_base(settings: ml_collections.ConfigDict, *, model: str | None = None) -> TrainedRun:
    """The base model of a config in the form of a run that has trained nothing: zero offsets.

    Args:
      settings: what `load_config` returns.
      model: another place of the base model than ``model.source`` of the settings.

    Raises:
      InputError: settings or a model that cannot be used.
    """
    config = _with_model(parse_config(settings), model)
    policy = _load_policy(config)
    return TrainedRun(config, policy, policy.zero)


def _with_model(config: Config, model: str | None) -> Config:
    if model is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, source=model))


def _load_policy(config: Config) -> Policy:
    together = cluster.here()
    mesh = devices.make_mesh(jax.local_devices(), weight_shards=config.model.weight_shards)
    policy = together.ahead(lambda: load_policy(config, mesh=mesh, processes=together))
    together.require_same({"the model": policy.pretrained.sha256})
    return policy


def load_fitting_adapter(config: Config, policy: Policy, folder: Path) -> Offsets:
    """An adapter made with the config's settings: equal shapes do not mean that it fits.

    Raises:
      InputError: as `checkpoints.load_adapter`; an adapter made with other settings.
    """
    offsets = checkpoints.load_adapter(folder, policy.zero, base_sha256=policy.pretrained.sha256)
    path = folder / "adapter_config.json"
    stored = read_object(path, fix="train the adapter again")
    wanted = json.loads(json.dumps(policy.adapter_config(config.adapter)))
    for name in wanted.keys() - {"base_model"}:
        if stored.get(name) != wanted[name]:
            raise InputError(
                f"{path}: {name}={stored.get(name)!r}, but config.adapter has {wanted[name]!r}; "
                "give the settings, or the run, that the adapter was made with."
            )
    return offsets
