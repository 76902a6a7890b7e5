"""Adapters on disk: a folder for each, by tenant, and an index of all in SQLite.

    index.sqlite             what is known of every adapter, and the state of its search
    adapters/TENANT/ID/      as `checkpoints.save_adapter` writes it
    servers/ID               locked by a server for as long as it lives

A row is there before its folder and goes before it, and a folder is on disk before the row says
``ready``, so that whatever kills a server, each adapter that was acknowledged is whole, and what
has no row is left over.  Several servers may use one folder: the searches of one that has died are
marked ``interrupted`` by the next one that looks.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpocem_jax.serving.database import Connection
from grpocem_jax.serving.options import Limits
from grpocem_jax.serving.tenants import PUBLIC
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import new_folder

UNFINISHED = ("queued", "running")
ENDED = ("ready", "failed", "cancelled", "interrupted")
ID = re.compile(r"adapter-[0-9a-f]{24}")

_VERSION = 1
_TABLE = """
CREATE TABLE adapters (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT UNIQUE NOT NULL,
  tenant TEXT NOT NULL,
  name TEXT NOT NULL,
  base TEXT NOT NULL,
  status TEXT NOT NULL,
  server TEXT NOT NULL,
  asked TEXT NOT NULL,
  generation INTEGER NOT NULL,
  generations INTEGER NOT NULL,
  created REAL NOT NULL,
  ended REAL,
  result TEXT,
  error TEXT,
  sha256 TEXT,
  curve TEXT
)
"""
_INDICES = (
    "CREATE INDEX by_tenant ON adapters (tenant, number)",
    "CREATE INDEX by_status ON adapters (status)",
)


class FullError(Exception):
    """A tenant has as many adapters or searches as it may.

    Attributes:
      limit: the field of `Limits`.
      most: its value.
    """

    def __init__(self, limit: str, most: int):
        super().__init__(f"{limit}={most}")
        self.limit, self.most = limit, most


@dataclasses.dataclass(frozen=True)
class Record:
    """What the index says of an adapter.

    Attributes:
      id: ``adapter-`` and 24 hexadecimal digits, the same in all stores.
      tenant: whose it is.
      name: a label that the tenant gave it, "" for none.
      base: what it fits: a hash of the base model and the adapter's settings.
      status: one of `UNFINISHED` or `ENDED`.
      server: the one that searches.
      asked: the search that was asked for, without its texts.
      generation: generations done.
      generations: of how many.
      created: seconds since 1970.
      ended: the same; None where the search has not ended.
      result: what came of the search; None before.
      error: why there is no adapter; None where there is one.
      sha256: of the file of the arrays, where there is one.
    """

    id: str
    tenant: str
    name: str
    base: str
    status: str
    server: str
    asked: dict[str, Any]
    generation: int
    generations: int
    created: float
    ended: float | None
    result: dict[str, Any] | None
    error: str | None
    sha256: str | None


_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Record))


def _record(row: Sequence[Any]) -> Record:
    values = dict(zip((field.name for field in dataclasses.fields(Record)), row, strict=True))
    for name in ("asked", "result"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Record(**values)


class Store:
    """An open store; safe to use from several threads and processes.

    Args:
      folder: made where it is not there.

    Raises:
      InputError: a folder or an index that cannot be used.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.server = secrets.token_hex(8)
        where = f"--store={self.folder}"
        try:
            (self.folder / "adapters").mkdir(parents=True, exist_ok=True)
            (self.folder / "servers").mkdir(exist_ok=True)
            self._claim = (self.folder / "servers" / self.server).open("w")
            fcntl.flock(self._claim, fcntl.LOCK_EX)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{where}: cannot be written ({reason}); give another folder."
            ) from None
        # Reads do not wait for a write to be on disk.
        self._reading, self._writing = Connection(), Connection()
        try:
            for connection in (self._writing, self._reading):
                connection.open(self.folder / "index.sqlite")
            self._open()
            self.mark_interrupted()
            self._sweep()
        except sqlite3.Error as error:
            self.close()
            raise InputError(
                f"{where}: index.sqlite cannot be used ({error}); bring it back from a copy, or "
                "give another folder."
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Marks the searches of this server as interrupted, and lets go of the folder."""
        with contextlib.suppress(sqlite3.Error):
            self._interrupt(self.server)
        for connection in (self._reading, self._writing):
            connection.close()
        (self.folder / "servers" / self.server).unlink(missing_ok=True)
        self._claim.close()

    def _open(self) -> None:
        with self._writing.transaction() as index:
            (version,) = index.execute("PRAGMA user_version").fetchone()
            if version == 0:
                if any((self.folder / "adapters").iterdir()):
                    raise InputError(
                        f"--store={self.folder}: holds adapters, but no index.sqlite that knows "
                        "them; bring it back from a copy, or give another folder."
                    )
                for statement in (_TABLE, *_INDICES, f"PRAGMA user_version = {_VERSION}"):
                    index.execute(statement)
            elif version != _VERSION:
                raise InputError(
                    f"--store={self.folder}: was written by another version of the server "
                    f"(index {version}, not {_VERSION}); give another folder."
                )

    def _read(self, condition: str, values: Sequence[Any], order: str = "") -> list[Record]:
        rows = self._reading.select(
            f"SELECT {_COLUMNS} FROM adapters WHERE {condition} {order}", values
        )
        return [_record(row) for row in rows]

    def add(
        self,
        tenant: str,
        *,
        base: str,
        limits: Limits,
        asked: dict[str, Any],
        name: str = "",
        generations: int = 0,
        status: str = "queued",
    ) -> Record:
        """Adds an adapter that is to be made.

        Raises:
          FullError: the tenant has as many as ``limits`` allow.
        """
        record = Record(
            id=f"adapter-{secrets.token_hex(12)}",
            tenant=tenant,
            name=name,
            base=base,
            status=status,
            server=self.server,
            asked=asked,
            generation=0,
            generations=generations,
            created=time.time(),
            ended=None,
            result=None,
            error=None,
            sha256=None,
        )
        values = dataclasses.astuple(dataclasses.replace(record, asked=json.dumps(asked)))  # type: ignore[arg-type]
        with self._writing.transaction() as index:
            for limit, condition in (
                ("max_adapters", "1"),
                ("max_jobs", "status IN ('queued', 'running')"),
            ):
                (count,) = index.execute(
                    f"SELECT COUNT(*) FROM adapters WHERE tenant = ? AND {condition}", (tenant,)
                ).fetchone()
                if count >= getattr(limits, limit):
                    raise FullError(limit, getattr(limits, limit))
            marks = ", ".join("?" * len(values))
            index.execute(f"INSERT INTO adapters ({_COLUMNS}) VALUES ({marks})", values)
        return record

    def get(self, tenant: str, id: str) -> Record | None:
        """An adapter that the tenant may see: its own or a public one."""
        if not ID.fullmatch(id):
            return None
        found = self._read("id = ? AND tenant IN (?, ?)", (id, tenant, PUBLIC))
        return found[0] if found else None

    def find(self, id: str) -> Record | None:
        """An adapter, whosever it is."""
        found = self._read("id = ?", (id,))
        return found[0] if found else None

    def list(
        self, tenant: str, *, limit: int = 100, after: str | None = None, base: str | None = None
    ) -> list[Record]:
        """Adapters that the tenant may see, the newest first.

        Args:
          tenant: who asks.
          limit: at most how many.
          after: the id of the last one of the page before.
          base: ready ones that fit a model alone, `Record.base`; None for all.
        """
        condition, values = "tenant IN (?, ?)", [tenant, PUBLIC]
        if after is not None:
            condition += " AND number < (SELECT number FROM adapters WHERE id = ?)"
            values.append(after)
        if base is not None:
            condition += " AND status = 'ready' AND base = ?"
            values.append(base)
        return self._read(condition, values, f"ORDER BY number DESC LIMIT {int(limit)}")

    def curve(self, id: str) -> Sequence[dict[str, Any]]:
        """How the search of an adapter went, generation by generation; see `update`."""
        rows = self._reading.select("SELECT curve FROM adapters WHERE id = ?", (id,))
        return json.loads(rows[0][0]) if rows and rows[0][0] else []

    def counts(self) -> dict[str, int]:
        """How many adapters there are of each status."""
        return dict(self._reading.select("SELECT status, COUNT(*) FROM adapters GROUP BY status"))

    def update(
        self,
        states: dict[str, tuple[str, int]],
        curves: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    ) -> set[str]:
        """Writes how far searches of this server have come.

        Args:
          states: the status, one of `UNFINISHED`, and the generations done, by id.
          curves: the fitness after each generation, as JSON has it, by id; None where it is as it
            was.

        Returns:
          the ids that are there no more: their searches are to be cancelled.
        """
        gone = set()
        with self._writing.transaction() as index:
            for id, (status, generation) in states.items():
                changed = index.execute(
                    "UPDATE adapters SET status = ?, generation = ?, curve = "
                    "COALESCE(?, curve) WHERE id = ? AND ended IS NULL",
                    (status, generation, None if curves is None else json.dumps(curves[id]), id),
                )
                if not changed.rowcount:
                    gone.add(id)
        return gone

    def keep(
        self, record: Record, save: Callable[[Path], str], result: dict[str, Any], generation: int
    ) -> bool:
        """Keeps an adapter that was found or uploaded; where that fails, it may be tried again.

        Args:
          record: from `add`.
          save: writes the adapter into a folder and returns the hash of its arrays.
          result: what came of the search.
          generation: generations done.

        Returns:
          whether it was kept; False where it has been deleted meanwhile.
        """
        folder = self.path(record)
        if self._read("id = ? AND status = 'ready'", (record.id,)):
            return True
        # There is one where the index did not take the row after the folder had its name.
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as partial:
            sha256 = save(partial)
            for path in (*partial.iterdir(), partial):
                _sync(path)
        _sync(folder.parent)
        _sync(folder.parent.parent)
        ended = (time.time(), json.dumps(result), sha256, generation, record.id)
        with self._writing.transaction() as index:
            changed = index.execute(
                "UPDATE adapters SET status = 'ready', ended = ?, result = ?, sha256 = ?, "
                "generation = ? WHERE id = ? AND ended IS NULL",
                ended,
            )
        if not changed.rowcount:
            shutil.rmtree(folder, ignore_errors=True)
        return bool(changed.rowcount)

    def end(self, id: str, status: str, error: str) -> None:
        """Says that a search has ended without an adapter: failed, cancelled or interrupted."""
        with self._writing.transaction() as index:
            index.execute(
                "UPDATE adapters SET status = ?, ended = ?, error = ? "
                "WHERE id = ? AND ended IS NULL",
                (status, time.time(), error, id),
            )

    def delete(self, tenant: str, id: str) -> bool:
        """Deletes an adapter of the tenant's own, whose search ends with it where there is one.

        Returns:
          whether it was there.
        """
        with self._writing.transaction() as index:
            gone = index.execute("DELETE FROM adapters WHERE id = ? AND tenant = ?", (id, tenant))
        if gone.rowcount:
            shutil.rmtree(self.folder / "adapters" / tenant / id, ignore_errors=True)
        return bool(gone.rowcount)

    def path(self, record: Record) -> Path:
        """The folder of an adapter, as `checkpoints.load_adapter` takes it."""
        return self.folder / "adapters" / record.tenant / record.id

    def mark_interrupted(self) -> None:
        """Marks the searches of servers that live no more."""
        unfinished = "SELECT DISTINCT server FROM adapters WHERE ended IS NULL"
        for (server,) in self._reading.select(unfinished):
            if server != self.server and not self._lives(server):
                self._interrupt(server)
                (self.folder / "servers" / server).unlink(missing_ok=True)

    def _interrupt(self, server: str) -> None:
        with self._writing.transaction() as index:
            index.execute(
                "UPDATE adapters SET status = 'interrupted', ended = ?, error = ? "
                "WHERE server = ? AND ended IS NULL",
                (time.time(), "the server ended before the search did; ask for it again", server),
            )

    def _lives(self, server: str) -> bool:
        try:
            with (self.folder / "servers" / server).open("r") as claim:
                fcntl.flock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _sweep(self) -> None:
        """Removes folders that no row says are ready or under way, and parts that nobody writes."""
        for folder in (self.folder / "adapters").glob("*/*"):
            name, _, partial = folder.name.partition(".")
            condition = "ended IS NULL" if partial else "(ended IS NULL OR status = 'ready')"
            if ID.fullmatch(name) and not self._read(f"id = ? AND {condition}", (name,)):
                shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
