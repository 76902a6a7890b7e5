"""Checkpoints of a run (Orbax), and the trained adapter as a folder of its own (safetensors)."""

import contextlib
import gc
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from grpocem_jax import grpo
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import (
    expand,
    is_file,
    is_folder,
    read_arrays,
    read_object,
    write_json,
    write_safetensors,
)

TRAJECTORY = "trajectory.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
"""What `save_adapter` writes."""

MAX_EXPERTS = 8
"""The report's number of experts."""


class _Best:
    """Orbax's policy that keeps one checkpoint; which one is said anew with each save."""

    step: int | None = None

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> list[bool]:
        del context
        return [info.step == self.step for info in checkpoints]


class Checkpoints:
    """The checkpoints of a run directory: ``checkpoints/<step>/`` with state and data position.

    Args:
      workdir: the run directory.
      keep: how many to keep, the last ones, beside the best one; 0 for all.

    Raises:
      InputError: a folder that cannot be made, or checkpoints in it that cannot be listed.
    """

    def __init__(self, workdir: Path, *, keep: int = 0):
        self._folder = (workdir / "checkpoints").absolute()
        self._best = _Best()
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep or None), self._best])
        # Of several processes, the one that keeps them waits for no other.
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone,
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except Exception as error:  # Orbax and what lies below it raise errors of many families
            raise InputError(
                f"{self._folder}: the checkpoints there cannot be listed "
                f"({type(error).__name__}: {_first_line(error)}); move the last one away to "
                "continue from the one before."
            ) from error

    def save(self, state: grpo.TrainState, key: jax.Array, position: dict[str, Any]) -> None:
        """Saves in the background; a checkpoint is whole under its name, or not there.

        Args:
          state: adapter, optimizer state, step.
          key: the run's base PRNG key.
          position: where in the data the run stands, and the hash of its config; JSON. Where its
            ``best`` is a record with a ``step``, that step's checkpoint is kept.
        """
        self._best.step = (position.get("best") or {}).get("step")
        tree = jax.device_get({"state": state._asdict(), "key": jax.random.key_data(key)})
        position = {**position, "sha256": _digest(tree, position)}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(tree), position=ocp.args.JsonSave(position)
            ),
        )

    def restore(
        self, template: grpo.TrainState, step: int
    ) -> tuple[grpo.TrainState, jax.Array, dict[str, Any]]:
        """The state, base key and position saved at a step; ``template`` gives the structure.

        Raises:
          InputError: a checkpoint that is not whole, or not as it was written.
        """
        key = jax.random.key_data(jax.random.key(0))
        tree = {"state": template._asdict(), "key": key}
        folder = self._folder / str(step)
        failure = ""
        with _abandoned_reads_unsaid():
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        train=ocp.args.StandardRestore(tree), position=ocp.args.JsonRestore()
                    ),
                )
                position = dict(restored.position)
                written = position.pop("sha256", None) == _digest(restored.train, position)
            except Exception as error:  # Orbax and what lies below it raise errors of many families
                failure = f"{type(error).__name__}: {_first_line(error)}"
            if failure:
                time.sleep(0.1)
                gc.collect()
        if failure:
            raise InputError(
                f"{folder}: the checkpoint cannot be read ({failure}); delete it to continue from "
                "the one before."
            )
        if not written:
            raise InputError(
                f"{folder}: the checkpoint is not what was written (its checksum differs); delete "
                "it to continue from the one before."
            )
        state = grpo.TrainState(**restored.train["state"])
        return state, jax.random.wrap_key_data(restored.train["key"]), position

    def restore_latest(
        self, template: grpo.TrainState
    ) -> tuple[tuple[grpo.TrainState, jax.Array, dict[str, Any]] | None, list[str]]:
        """The latest checkpoint that is whole, and a sentence for each later one that is not.

        Those are moved out of the way, to ``damaged-<step>``.

        Returns:
          what `restore` gives, or None where there is none, and the sentences.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.restore(template, step), damaged
            except InputError as error:
                damaged.append(str(error))
                aside = self._folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(step)).rename(aside)
                self._manager.reload()
        return None, damaged

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits for saves under way; raises what one of them failed with."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def last_step(workdir: Path) -> int:
    """The step of the last checkpoint of a run directory, whole or not; 0 where there is none."""
    return max(_saved_steps(workdir), default=0)


def last_position(workdir: Path) -> dict[str, Any] | None:
    """The position saved with the last checkpoint whose position can be read; None without one.

    It says whose the checkpoints are, and nothing is changed or moved to read it.
    """
    for step in sorted(_saved_steps(workdir), reverse=True):
        path = workdir / "checkpoints" / str(step) / "position" / "metadata"
        with contextlib.suppress(InputError):
            return read_object(path, fix="delete the checkpoint")
    return None


def _saved_steps(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, whole or not."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if is_folder(folder) else []
    return [int(name) for name in names if name.isdecimal()]


@contextlib.contextmanager
def _abandoned_reads_unsaid() -> Iterator[None]:
    """Keeps a failed restore from filling the screen.

    Where one array cannot be read, Orbax abandons the reads of the others, and each of them prints
    a traceback of its own within the next milliseconds, or when it is collected.
    """
    said, log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, log.disabled = lambda _: None, True
    try:
        yield
    finally:
        sys.unraisablehook, log.disabled = said, False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _digest(tree: Any, position: dict[str, Any]) -> str:
    """SHA-256 of the arrays, with their places and types, and of the position."""
    digest = hashlib.sha256(json.dumps(position, sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    # A NamedTuple comes back from a file as a dict: only names and order are compared.
    for path, leaf in sorted(((_name(path), leaf) for path, leaf in leaves), key=lambda x: x[0]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(map(str, parts))


def config_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of a run's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save_adapter(folder: str | Path, offsets: Offsets, config: dict[str, Any], card: str) -> None:
    """Writes ``adapter_model.safetensors``, ``adapter_config.json`` and the model card.

    Args:
      folder: made if it is not there.
      offsets: the trained offsets; arrays inside a site are named ``SITE/KEY``.
      config: what is needed to use them: base model, kind of adapter, settings; the hash of the
        file of the offsets is added.
      card: text of README.md.
    """
    folder = expand(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    write_safetensors(path, _named(offsets))
    write_json(folder / "adapter_config.json", {**config, "adapter_sha256": _file_hash(path)})
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_adapter(
    folder: str | Path, template: Offsets, *, base_sha256: str | None = None
) -> Offsets:
    """Reads the offsets of a saved adapter.

    Args:
      folder: a folder that `save_adapter` wrote, such as ``runs/TRAINED/adapter`` or that of
        ``grpocem-adapt --save``; relative to the current directory.
      template: offsets of the same shape, `Policy.zero`.
      base_sha256: `Pretrained.sha256` of the model it is for; None does not compare.

    Raises:
      InputError: no adapter there, a damaged one, one of other sites or sizes, or one of another
        model.
    """
    folder = expand(folder, "folder")
    path = folder / "adapter_config.json"
    arrays = folder / "adapter_model.safetensors"
    config = {}
    if base_sha256 is not None or is_file(path):
        config = read_object(path, fix="train the adapter again")
    if base_sha256 is not None:
        trained_on, name = config.get("base_sha256"), config.get("base_model")
        if trained_on is None:
            raise InputError(
                f"{path}: does not say which model the adapter is for (no base_sha256); train it "
                "again."
            )
        if trained_on != base_sha256:
            raise InputError(
                f"{path}: the adapter was trained on {name!r}, whose weights are not those of "
                "this model; use the model it was trained on."
            )
    offsets = _read_arrays(arrays, template)
    # Last: what is wrong with a file says more than that it was changed.
    if config.get("adapter_sha256", found := _file_hash(arrays)) != found:
        raise InputError(
            f"{arrays}: is not the file that was written (its checksum differs from that in "
            "adapter_config.json); copy both again, or train the adapter again."
        )
    return offsets


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_arrays(path: Path, template: Offsets) -> Offsets:
    arrays = read_arrays(path, fix="train the adapter again")
    found = {name: value.shape for name, value in arrays.items()}
    wanted = {name: np.shape(value) for name, value in _named(template).items()}
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name))
        raise InputError(
            f"{path}: does not fit this model: {odd[0]} has shape {found.get(odd[0])} there and "
            f"{wanted.get(odd[0])} here; load it with the model and adapter settings it was "
            "trained with."
        )
    for name in wanted:
        array = arrays[name]
        if not jnp.issubdtype(array.dtype, jnp.floating) or not np.isfinite(array).all():
            raise InputError(
                f"{path}: {name} has numbers that are not finite; train the adapter again."
            )
    leaves = [jax.device_put(arrays[name]) for name in wanted]  # which compiles nothing
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def copy_adapter(source: Path, target: Path) -> None:
    """Copies the files of an adapter folder; makes ``target`` and the folders above it.

    The model card is copied where there is one.
    """
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if name != "README.md" or is_file(source / name):
            shutil.copyfile(source / name, target / name)


def save_trajectory(library: Path, snapshots: Offsets) -> None:
    """Writes a library's snapshots of trainings, ``[S, ...]`` a site."""
    write_safetensors(library / TRAJECTORY, _named(snapshots))


def load_library(
    folder: Path, template: Offsets, *, base_sha256: str | None = None
) -> tuple[dict[str, Offsets], Offsets]:
    """Reads a library of expert adapters, as `grpocem_jax.experts` writes it.

    Args:
      folder: with one adapter folder for each expert.
      template: offsets of the same shape, `Policy.zero`.
      base_sha256: as in `load_adapter`.

    Returns:
      the experts by name, sorted, and all vectors at hand, ``[S, ...]`` a site: the experts and,
      where the library has them, snapshots of their training.

    Raises:
      InputError: no library there, more than `MAX_EXPERTS` in it, or experts of another model.
    """
    files = folder.glob("*/adapter_model.safetensors") if is_folder(folder) else ()
    folders = sorted(path.parent for path in files)
    if not folders:
        raise InputError(
            f"search.experts={str(folder)!r}: no library of experts there; make one with "
            "python -m grpocem_jax.experts --config CONFIG --workdir DIR and give DIR/library."
        )
    if len(folders) > MAX_EXPERTS:
        raise InputError(
            f"search.experts={str(folder)!r}: holds {len(folders)} experts; at most {MAX_EXPERTS} "
            "can be mixed, so move the others away."
        )
    experts = {path.name: load_adapter(path, template, base_sha256=base_sha256) for path in folders}
    vectors = jax.tree.map(lambda *x: jnp.stack(x), *experts.values())
    if (folder / TRAJECTORY).is_file():
        found = read_arrays(folder / TRAJECTORY, fix="delete it or train the library again")
        count = min((len(x) for x in found.values() if x.ndim), default=0)
        if not count:
            raise InputError(
                f"{folder / TRAJECTORY}: holds no snapshots; delete it or train the library again."
            )
        shape = jax.tree.map(lambda x: jnp.zeros((count, *x.shape)), template)
        snapshots = _read_arrays(folder / TRAJECTORY, shape)
        vectors = jax.tree.map(lambda *x: jnp.concatenate(x), vectors, snapshots)
    return experts, vectors


def _named(offsets: Offsets) -> dict[str, Any]:
    """The arrays of an adapter by name, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(offsets)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
