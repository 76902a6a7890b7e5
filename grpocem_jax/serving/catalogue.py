"""The names that a request's ``model`` may have, and the adapters that they stand for."""

import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from grpocem_jax import adaptation
from grpocem_jax.adapters.base import Offsets
from grpocem_jax.runs import checkpoints
from grpocem_jax.runs.trained import TrainedRun, load_fitting_adapter
from grpocem_jax.serving.errors import ApiError
from grpocem_jax.serving.store import ID, Record, Store
from grpocem_jax.serving.tenants import Tenant
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import read_object

log = logging.getLogger("grpocem_jax.serving")

BASE = "base"
"""The engine's name of the base model, where what it starts from is a trained adapter."""


class Catalogue:
    """The base model, a trained run on it, and the adapters of a store.

    Attributes:
      base: the name of the base model.
      default: the name of what the engine starts from: the run's adapter where there is one.
      fits: what an adapter has to be of, `Record.base`.
      experts: the library of experts, as ``config.search.experts`` names it; "" for none.

    Args:
      run: what is served.
      store: where adapters are kept.
      trained: the name of the run's adapter; None where the base alone is served.

    Raises:
      InputError: a name that another model has.
    """

    def __init__(self, run: TrainedRun, store: Store, *, trained: str | None = None):
        self.run, self.store, self.trained = run, store, trained
        pretrained = run.policy.pretrained
        is_path = pretrained.kind in ("folder", "gguf")
        self.base = Path(pretrained.source).name if is_path else pretrained.source
        if trained is not None and (trained == self.base or ID.fullmatch(trained)):
            raise InputError(
                f"name={trained!r}: is the name of the base model or of an adapter; give another, "
                "or rename the folder of the run."
            )
        self.default = self.base if trained is None else trained
        settings = run.policy.adapter_config(run.config.adapter)
        del settings["base_model"]
        text = json.dumps(settings, sort_keys=True, default=str)
        self.fits = hashlib.sha256(text.encode()).hexdigest()
        self.experts = _library(run)
        self._created = int(time.time())

    def engine_name(self, tenant: Tenant, model: str) -> str | None:
        """The name that the engine knows an adapter by, None for what it starts from.

        Raises:
          ApiError: no such model, one that is not ready, or an adapter of another base model.
        """
        if model == self.default:
            return None
        if model == self.base:
            return BASE
        record = self.store.get(tenant.name, model)
        if record is None:
            raise ApiError(
                404,
                f"model={model[:80]!r}: there is no such model; GET /v1/models lists those there "
                "are.",
                param="model",
                code="model_not_found",
            )
        self.check_usable(record, "model")
        return record.id

    def check_usable(self, record: Record, field: str) -> None:
        """Refuses an adapter that is not ready or does not fit.

        Raises:
          ApiError: with ``field`` as what is to blame.
        """
        if record.status != "ready":
            raise ApiError(
                409,
                f"{field}={record.id!r}: the adapter is {record.status}, not ready; GET "
                f"/v1/adapters/{record.id} says how far it has come.",
                param=field,
                code="adapter_not_ready",
            )
        if record.base != self.fits:
            raise ApiError(
                400,
                f"{field}={record.id!r}: the adapter is of another base model or of other adapter "
                f"settings than {self.base!r} has here; use a server of its own.",
                param=field,
                code="adapter_of_another_base",
            )

    def load(self, name: str) -> Offsets:
        """The adapter of a name that `engine_name` gave.

        Raises:
          InputError: it has been deleted or damaged.
        """
        if name == BASE:
            return self.run.policy.zero
        record = self.store.find(name)
        if record is None or record.status != "ready":
            raise InputError(f"model={name!r}: the adapter has been deleted; make another.")
        return self.read(self.store.path(record), sha256=record.sha256)

    def read(self, folder: Path, *, sha256: str | None = None) -> Offsets:
        """The adapter in a folder.

        Args:
          folder: as `checkpoints.save_adapter` writes it.
          sha256: of its arrays; None for that which the folder itself names.

        Raises:
          InputError: no adapter, one that does not fit, or another than was kept.
        """
        offsets = load_fitting_adapter(self.run.config, self.run.policy, folder)
        path = folder / "adapter_config.json"
        found = read_object(path, fix="upload the adapter again").get("adapter_sha256")
        if found is None or (sha256 is not None and found != sha256):
            raise InputError(
                f"{path}: adapter_sha256={found!r} is not the hash of the adapter; upload the "
                "folder as it was saved."
            )
        return offsets

    def save(self, folder: Path, offsets: Offsets, card: str) -> str:
        """Writes an adapter into a folder; returns the hash of its arrays."""
        settings = self.run.policy.adapter_config(self.run.config.adapter)
        checkpoints.save_adapter(folder, offsets, settings, card)
        fields = read_object(folder / "adapter_config.json", fix="")
        return str(fields["adapter_sha256"])

    def models(self, tenant: Tenant) -> list[dict[str, Any]]:
        """All models that a tenant may use, as ``/v1/models`` lists them."""
        names = [self.default, self.base] if self.trained else [self.base]
        listed = [self._model(name, self._created, "operator") for name in names]
        records = self.store.list(tenant.name, limit=100_000, base=self.fits)
        return listed + [self._model(x.id, int(x.created), x.tenant) for x in records]

    def model(self, tenant: Tenant, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
          ApiError: as `engine_name`.
        """
        engine_name = self.engine_name(tenant, name)
        if engine_name is None or engine_name == BASE:
            return self._model(name, self._created, "operator")
        record = self.store.get(tenant.name, name)
        if record is None:
            raise ApiError(404, "the adapter has been deleted.", param="model")
        return self._model(record.id, int(record.created), record.tenant)

    def _model(self, name: str, created: int, owner: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": owner}


def _library(run: TrainedRun) -> str:
    """The library of experts that fits the run; "" where there is none."""
    is_builtin = run.policy.pretrained.kind == "builtin"
    name = run.config.search.experts or ("builtin" if is_builtin else "")
    if not name:
        return ""
    settings = dataclasses.replace(run.config.search, space="experts", experts=name)
    try:
        adaptation.make_space(run.policy, run.offsets, settings)
    except InputError as error:
        log.warning("no searches by experts: %s", error)
        return ""
    return name
