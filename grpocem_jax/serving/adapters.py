"""``/v1/adapters``: searching for adapters, and keeping them."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from grpocem_jax.serving import archive, asked
from grpocem_jax.serving.answers import KEEP_ALIVE_S
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.errors import ApiError, brief
from grpocem_jax.serving.http import Call, Events, Json
from grpocem_jax.serving.jobs import QueueFullError
from grpocem_jax.serving.keeper import INTERVAL_S, Keeper
from grpocem_jax.serving.store import FullError, Record
from grpocem_jax.serving.tenants import PUBLIC, Tenant
from grpocem_jax.utils.errors import InputError

MOST_LISTED = 1000


def describe(record: Record) -> dict[str, Any]:
    """An adapter as the interface shows it."""
    return {
        "id": record.id,
        "object": "adapter",
        "name": record.name,
        "owned_by": record.tenant,
        "public": record.tenant == PUBLIC,
        "status": record.status,
        "created_at": int(record.created),
        "ended_at": None if record.ended is None else int(record.ended),
        "asked": record.asked,
        "generation": record.generation,
        "generations": record.generations,
        "result": record.result,
        "error": record.error,
        "sha256": record.sha256,
    }


class Adapters:
    """The endpoints.

    Args:
      catalogue: which knows the store.
      searches: with `submit`, which starts a search by likelihood.
      rewarded: the same by reward.
      keeper: which follows them.
      check: raises `ApiError` where the server ends.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        searches: Any,
        rewarded: Any,
        keeper: Keeper,
        check: Callable[[], None],
    ):
        self._catalogue, self._store = catalogue, catalogue.store
        self._searches, self._rewarded, self._keeper = searches, rewarded, keeper
        self._check = check
        leaves = jax.tree.leaves(catalogue.run.policy.zero)
        # The arrays in full precision, the header and the settings.
        self._most_upload = 8 * sum(leaf.size for leaf in leaves) + 2**18

    async def create(self, call: Call) -> Response:
        """POST: starts a search."""
        body = await call.json()
        run, limits = self._catalogue.run, call.tenant.limits
        experts = bool(self._catalogue.experts)
        search = await run_in_threadpool(lambda: asked.read(body, run, limits, experts=experts))
        record = await run_in_threadpool(self._start, call.tenant, search)
        return Json(describe(record), 202, {"Location": f"/v1/adapters/{record.id}"})

    def _start(self, tenant: Tenant, search: asked.Search) -> Record:
        record = self._add(tenant, search.name, search.record, search.generations, "queued")
        try:
            job = (self._rewarded if search.reward else self._searches).submit(
                search.subject,
                method=search.method,
                seed=search.seed,
                generations=search.generations,
            )
        except BaseException as error:
            self._store.delete(tenant.name, record.id)
            if isinstance(error, QueueFullError):
                raise ApiError(
                    429,
                    "the server has as many searches waiting as it takes; try again later.",
                    code="rate_limit_exceeded",
                    retry_after=10,
                ) from None
            if isinstance(error, InputError):
                raise ApiError(400, str(error)) from None
            raise
        self._keeper.follow(record, job)
        return record

    def _add(
        self, tenant: Tenant, name: str, what: dict[str, Any], generations: int, status: str
    ) -> Record:
        try:
            return self._store.add(
                tenant.name,
                base=self._catalogue.fits,
                limits=tenant.limits,
                asked=what,
                name=name,
                generations=generations,
                status=status,
            )
        except FullError as full:
            if full.limit == "max_jobs":
                raise ApiError(
                    429,
                    f"max_jobs={full.most} searches have not ended; wait for one, or delete one.",
                    code="rate_limit_exceeded",
                    retry_after=5,
                ) from None
            raise ApiError(
                403,
                f"{full.limit}={full.most} adapters are there already; delete some.",
                code="too_many_adapters",
            ) from None

    async def list(self, call: Call) -> Response:
        """GET: the tenant's own adapters and the public ones, the newest first."""
        query = call.request.query_params
        limit, after = query.get("limit", "100"), query.get("after")
        is_number = limit.isascii() and limit.isdecimal() and len(limit) < 10
        if not (is_number and 1 <= int(limit) <= MOST_LISTED):
            raise ApiError(
                400,
                f"limit={brief(limit)}: must be an integer from 1 to {MOST_LISTED}.",
                param="limit",
            )
        if after is not None:
            await run_in_threadpool(self._record, call.tenant, after, "after")
        found = await run_in_threadpool(
            lambda: self._store.list(call.tenant.name, limit=int(limit) + 1, after=after)
        )
        data = [describe(record) for record in found[: int(limit)]]
        return Json({"object": "list", "data": data, "has_more": len(found) > len(data)})

    async def show(self, call: Call) -> Response:
        """GET one: its state, and what came of its search."""
        return Json(await run_in_threadpool(self._in_full, await self._asked_for(call)))

    async def events(self, call: Call) -> Response:
        """GET its events: its state whenever it changes, until the search has ended."""
        record = await self._asked_for(call)
        return Events(self._changes(call.tenant, record))

    async def _changes(
        self, tenant: Tenant, record: Record
    ) -> AsyncIterator[Mapping[str, Any] | None]:
        yield await run_in_threadpool(self._in_full, record)
        sent = time.monotonic()
        while record.ended is None:
            await asyncio.sleep(INTERVAL_S)
            self._check()
            now = await run_in_threadpool(self._record, tenant, record.id, "id")
            if now != record:
                record, sent = now, time.monotonic()
                yield await run_in_threadpool(self._in_full, record)
            elif time.monotonic() - sent > KEEP_ALIVE_S:
                sent = time.monotonic()
                yield None

    async def delete(self, call: Call) -> Response:
        """DELETE: the adapter, or the search for it."""
        record = await self._asked_for(call)
        if record.tenant != call.tenant.name:
            raise ApiError(
                403, f"id={record.id!r}: a public adapter is the operator's to delete.", param="id"
            )
        self._keeper.cancel(record.id)
        await run_in_threadpool(self._store.delete, call.tenant.name, record.id)
        return Json({"id": record.id, "object": "adapter", "deleted": True})

    async def download(self, call: Call) -> Response:
        """GET its files: a zip of the folder that `load_adapter` takes."""
        record = await self._asked_for(call)
        self._catalogue.check_usable(record, "id")

        def pack() -> bytes:
            folder = self._store.path(record)
            try:
                self._catalogue.read(folder, sha256=record.sha256)
                return archive.pack(folder)
            except (InputError, FileNotFoundError) as error:
                # Deleted meanwhile, or damaged: the record knows which.
                self._record(call.tenant, record.id, "id")
                raise ApiError(500, f"the adapter is damaged: {error}") from None

        name = f'attachment; filename="{record.id}.zip"'
        return Response(
            await run_in_threadpool(pack),
            media_type="application/zip",
            headers={"Content-Disposition": name},
        )

    async def upload(self, call: Call) -> Response:
        """POST a zip: keeps an adapter that was saved elsewhere."""
        name = asked.read_name(call.request.query_params.get("name") or None)
        content = await call.body(media="application/zip", most=self._most_upload)
        record = await run_in_threadpool(self._keep, call.tenant, name, content)
        return Json(describe(record), 201, {"Location": f"/v1/adapters/{record.id}"})

    def _keep(self, tenant: Tenant, name: str, content: bytes) -> Record:
        with tempfile.TemporaryDirectory(prefix="grpocem-upload-") as temporary:
            folder = Path(temporary)
            archive.unpack(content, folder, most=self._most_upload)
            try:
                offsets = self._catalogue.read(folder)
            except InputError as error:
                text = str(error).replace(f"{folder}/", "")
                raise ApiError(400, text, code="invalid_adapter") from None
        record = self._add(tenant, name, {"method": "upload"}, 0, "running")
        card = f"# Adapter of {self._catalogue.base}\n\nUploaded to grpocem-serve.\n"
        try:
            self._store.keep(record, lambda path: self._catalogue.save(path, offsets, card), {}, 0)
        except BaseException:
            self._store.delete(tenant.name, record.id)
            raise
        return self._record(tenant, record.id, "id")

    def _in_full(self, record: Record) -> dict[str, Any]:
        """An adapter with the fitness of its search after each generation."""
        return {**describe(record), "curve": self._store.curve(record.id)}

    async def _asked_for(self, call: Call) -> Record:
        return await run_in_threadpool(
            self._record, call.tenant, call.request.path_params["id"], "id"
        )

    def _record(self, tenant: Tenant, id: str, field: str) -> Record:
        record = self._store.get(tenant.name, id)
        if record is None:
            raise ApiError(
                404,
                f"{field}={brief(id)}: there is no such adapter; GET /v1/adapters lists them all.",
                param=field,
                code="adapter_not_found",
            )
        return record
