"""A SQLite file that several threads and processes read and write."""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Connection:
    """A connection, which its threads use one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index: sqlite3.Connection | None = None

    def open(self, path: Path) -> None:
        """Opens the file, which is made where it is not there."""
        self._index = sqlite3.connect(
            path, timeout=20, isolation_level=None, check_same_thread=False
        )
        self._index.execute("PRAGMA journal_mode = WAL")
        self._index.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Closes it, if it is open."""
        with self._lock:
            if self._index is not None:
                self._index.close()

    def select(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows that a statement finds."""
        with self._lock:
            return self._opened.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction, on disk when the block ends."""
        with self._lock:
            index = self._opened
            index.execute("BEGIN IMMEDIATE")
            try:
                yield index
                index.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    index.execute("ROLLBACK")
                raise

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._index is None:
            raise sqlite3.ProgrammingError("the index is not open")
        return self._index
