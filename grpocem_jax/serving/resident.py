"""The adapters that are on the device: rows of a table, those that were used last."""

import collections
import threading
from collections.abc import Callable, Collection

import jax
import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.serving import slots as device
from grpocem_jax.serving.requests import AdapterKey
from grpocem_jax.utils.errors import InputError


class Resident:
    """A table of adapters on the device, with the one of the start in row 0.

    Attributes:
      table: the offsets, a leading axis of rows.
      evictions: adapters that made room for others.
    """

    def __init__(self, start: Offsets, *, rows: int, load: Callable[[str], Offsets]):
        """Makes a table with room for ``rows`` adapters beside the start's; ``load`` finds them."""
        self._start, self._rows, self._load = start, rows, load
        self._lock = threading.Lock()
        self._versions: dict[str, int] = {}
        self.evictions = 0
        self.clear()

    def clear(self) -> None:
        """Makes the table anew, with nothing but the start in it."""
        self.table = device.make_table(self._start, rows=self._rows + 1)
        with self._lock:
            self._row_of: collections.OrderedDict[AdapterKey, int] = collections.OrderedDict()
            self._free = list(range(self._rows, 0, -1))

    def warm_up(self) -> None:
        """Compiles the program that writes a row."""
        self.table = device.put_row(self.table, np.int32(0), jax.device_get(self._start))

    def __len__(self) -> int:
        return len(self._row_of)

    def key(self, name: str) -> AdapterKey:
        """What the name stands for now."""
        return name, self._versions.get(name, 0)

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._row_of

    def forget(self, name: str) -> None:
        """Frees the row of an adapter whose name is free, or stands for another from now on."""
        with self._lock:
            row = self._row_of.pop(self.key(name), None)
            if row is not None:
                self._free.append(row)
            self._versions[name] = self._versions.get(name, 0) + 1

    def load(self, name: str) -> Offsets:
        """An adapter's offsets on the host.

        Raises:
          InputError: there is none, or it is of another form than the start's, or not finite.
        """
        offsets = jax.tree.map(np.asarray, self._load(name))
        form, own = (
            jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (self._start, offsets)
        )
        if form != own:
            raise InputError(
                f"adapter={name!r}: is of another form than the model's adapter; give one that was "
                "made with the same settings."
            )
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(offsets)):
            raise InputError(f"adapter={name!r}: has numbers that are not finite; give another.")
        return offsets

    def row(self, key: AdapterKey, offsets: Offsets | None, taken: Collection[int]) -> int:
        """The row of an adapter, where it is put if it is not there.

        The one that was not used for longest makes room.

        Args:
          key: the adapter.
          offsets: what it is, where that is known; else it is loaded.
          taken: rows that must keep what they hold, fewer than there are.

        Raises:
          Exception: whatever loading raises.
        """
        with self._lock:
            if key in self._row_of:
                self._row_of.move_to_end(key)
                return self._row_of[key]
        offsets = self.load(key[0]) if offsets is None else offsets
        with self._lock:
            row = next((row for row in reversed(self._free) if row not in taken), None)
            if row is not None:
                self._free.remove(row)
            else:
                oldest = next(own for own, row in self._row_of.items() if row not in taken)
                row = self._row_of.pop(oldest)
                self.evictions += 1
            self._row_of[key] = row
            # What was forgotten since is for requests that still wait, and the first to go.
            self._row_of.move_to_end(key, last=key == self.key(key[0]))
        self.table = device.put_row(self.table, np.int32(row), offsets)
        return row
