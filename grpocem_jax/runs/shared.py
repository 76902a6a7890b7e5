"""The checkpoints of a run that several processes train: one keeps them, and tells the others."""

from pathlib import Path
from typing import Any

import jax

from grpocem_jax import grpo
from grpocem_jax.runs.checkpoints import Checkpoints
from grpocem_jax.utils.processes import ALONE, Processes

Restored = tuple[grpo.TrainState, jax.Array, dict[str, Any]]


class SharedCheckpoints:
    """`Checkpoints` of process 0, whose state all processes have; as those, of one process.

    The state is replicated and small, so no other process needs the run directory.

    Args:
      workdir: the run directory.
      keep: as `Checkpoints`.
      processes: the processes.

    Raises:
      InputError: as `Checkpoints`, in all processes.
    """

    def __init__(self, workdir: Path, *, keep: int = 0, processes: Processes = ALONE):
        self._processes = processes
        self._own: Checkpoints | None = None

        def open_own() -> None:
            self._own = Checkpoints(workdir, keep=keep)

        processes.first(open_own)

    @property
    def own(self) -> Checkpoints:
        """Those of process 0, for what it does alone."""
        assert self._own is not None
        return self._own

    def save(self, state: grpo.TrainState, key: jax.Array, position: dict[str, Any]) -> None:
        """Saves in the background; see `Checkpoints.save`."""
        if self._own is not None:
            self._own.save(state, key, position)

    def restore(self, template: grpo.TrainState, step: int) -> Restored:
        """As `Checkpoints.restore`, in all processes."""
        return self._spread(
            template, self._processes.first(lambda: _packed(self.own.restore(template, step)))
        )

    def restore_latest(self, template: grpo.TrainState) -> tuple[Restored | None, list[str]]:
        """As `Checkpoints.restore_latest`, in all processes."""

        def packed() -> dict[str, Any]:
            found, damaged = self.own.restore_latest(template)
            return {"found": None if found is None else _packed(found), "damaged": damaged}

        told = self._processes.first(packed)
        found = told["found"]
        return None if found is None else self._spread(template, found), told["damaged"]

    def wait(self) -> None:
        """Waits for saves under way; raises what one of them failed with."""
        if self._own is not None:
            self._own.wait()

    def close(self) -> None:
        """Waits for saves under way."""
        if self._own is not None:
            self._own.close()

    def _spread(self, template: grpo.TrainState, packed: dict[str, Any]) -> Restored:
        state = jax.tree.unflatten(jax.tree.structure(template), packed["state"])
        if self._processes.count > 1:  # they come as arrays on the host
            state = jax.tree.map(jax.numpy.asarray, state)
        return state, jax.random.wrap_key_data(packed["key"]), packed["position"]


def _packed(found: Restored) -> dict[str, Any]:
    state, key, position = found
    return {
        "state": jax.tree.leaves(state),
        "key": jax.random.key_data(key),
        "position": position,
    }
