"""Who may use the server, and how much: API keys in a file, and limits of each tenant.

The file holds hashes alone, so that reading it gives no key away:

    {"keys": [{"tenant": "alice", "sha256": "...", "limits": {"max_jobs": 1}}]}

A key has 256 random bits, for which one round of SHA-256 is enough.  The tenant ``public`` is the
operator's: what it owns is seen and used by all, and its key reads the metrics.
"""

import contextlib
import dataclasses
import hashlib
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from grpocem_jax.serving.options import Limits
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import expand, is_file, read_object, write_json

PUBLIC = "public"
"""The tenant whose adapters all may use."""

PREFIX = "gj-"
"""What every key begins with, so that a leaked one is recognised."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

_FIX = "correct it, or make a new file with grpocem-serve --keys FILE --add_key TENANT"


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A user of the server.

    Attributes:
      name: lower-case letters, digits, - and _; at most 64.
      limits: what it may ask for.
    """

    name: str
    limits: Limits

    @property
    def is_operator(self) -> bool:
        """Whether it is the one whose adapters all may use."""
        return self.name == PUBLIC


class Keys:
    """The keys of a file; a change of the file holds from the next request on.

    Args:
      path: the file; None for a server without keys, whose users all are the operator.
      limits: those of tenants for which the file has no others.

    Raises:
      InputError: a file that cannot be used.
    """

    def __init__(self, path: str | Path | None, limits: Limits | None = None):
        self._path = None if path is None else expand(path, "--keys")
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._tenants: dict[str, Tenant] = {}
        self._read()

    @property
    def are_open(self) -> bool:
        """Whether there are none, and all who reach the server may do everything."""
        return self._path is None

    def find(self, key: str | None) -> Tenant | None:
        """The tenant of a key, None where there is none.

        Args:
          key: what a request gave, None where it gave nothing.
        """
        if self._path is None:
            return Tenant(PUBLIC, self._limits)
        if key is None:
            return None
        with self._lock:
            # While the file is damaged, the keys read last hold; a start says what is wrong.
            with contextlib.suppress(InputError):
                self._read()
            return self._tenants.get(_hash(key))

    def _read(self) -> None:
        if self._path is None:
            return
        try:
            stat = self._path.stat()
        except OSError as error:
            raise InputError(f"--keys={self._path}: {error.strerror}; {_FIX}.") from None
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp == self._stamp:
            return
        self._tenants = {
            entry["sha256"]: Tenant(
                entry["tenant"], dataclasses.replace(self._limits, **entry.get("limits", {}))
            )
            for entry in _entries(self._path)
        }
        self._stamp = stamp


def add_key(path: str | Path, tenant: str) -> str:
    """Makes a key and adds its hash to a file, which is made where it is not there.

    Returns:
      the key, which is kept nowhere.

    Raises:
      InputError: a name that no tenant can have, or a file that cannot be used.
    """
    path = expand(path, "--keys")
    if not NAME.fullmatch(tenant):
        raise InputError(
            f"--add_key={tenant!r}: a tenant's name is up to 64 lower-case letters, digits, - and "
            "_; give another."
        )
    entries = _entries(path) if is_file(path) else []
    key = f"{PREFIX}{secrets.token_urlsafe(32)}"
    entries.append({"tenant": tenant, "sha256": _hash(key)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"keys": entries})
        path.chmod(0o600)
    except OSError as error:
        raise InputError(
            f"--keys={path}: cannot be written ({error.strerror}); give another file."
        ) from None
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = read_object(path, fix=_FIX).get("keys")
    if not isinstance(entries, list):
        raise InputError(f"--keys={path}: has no list 'keys'; {_FIX}.")
    known = {field.name for field in dataclasses.fields(Limits)}
    for number, entry in enumerate(entries):
        where = f"--keys={path}: keys[{number}]"
        if not isinstance(entry, dict) or not entry.keys() <= {"tenant", "sha256", "limits"}:
            raise InputError(f"{where} is no object with tenant, sha256 and limits; {_FIX}.")
        name, digest = entry.get("tenant"), entry.get("sha256")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"{where}.tenant={name!r} is no tenant's name; {_FIX}.")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise InputError(f"{where}.sha256 is no hash; {_FIX}.")
        limits = entry.get("limits", {})
        if not isinstance(limits, dict) or not limits.keys() <= known:
            raise InputError(f"{where}.limits: the limits are {', '.join(sorted(known))}; {_FIX}.")
        for field, value in limits.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{where}.limits.{field}={value!r} is no integer; {_FIX}.")
        try:
            Limits(**limits)
        except InputError as error:
            raise InputError(f"{where}.limits.{error}") from None
    return entries


class Bucket:
    """A token bucket: ``rate`` a minute, of which one minute's may be used at once."""

    def __init__(self, rate: float):
        self._rate = rate / 60
        self._most = self._level = float(rate)
        self._filled = time.monotonic()

    def take(self, amount: float) -> float:
        """Takes an amount.

        Returns:
          0 where it was there, otherwise the seconds after which it will be; nothing is taken then.
        """
        now = time.monotonic()
        self._level = min(self._most, self._level + (now - self._filled) * self._rate)
        self._filled = now
        if amount > self._level:
            return (amount - self._level) / self._rate
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Gives back what was taken and not used."""
        self._level = min(self._most, self._level + amount)
