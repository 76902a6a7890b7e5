"""Singular value fine-tuning: a trainable scale on each leading singular value of a kernel.

``W = U diag(s) V^T`` is frozen; with offsets ``o`` of the ``k`` leading singular values,

    y = ((x U) * (s * (1 + o))) V^T

which the report writes as its eq. 10 and Transformer-squared (Sun et al. 2025, arXiv 2501.06252)
as SVF.  ``U`` and ``V`` are shared by all candidates and never multiplied out.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from grpocem_jax.adapters.base import Adapter, Sites, each_site
from grpocem_jax.models.base import dense
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import cache_folder, expand, write_safetensors
from grpocem_jax.utils.settings import number, share


class SVFFactors(NamedTuple):
    """``kernel == (u * s) @ vt``; ``u [in, r]``, ``s [r]`` descending, ``vt [r, out]``."""

    u: jax.Array
    s: jax.Array
    vt: jax.Array


SVD = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def svd(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD ``(u, s, vt)`` in float32, computed in float64 on the host."""
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    return u.astype(np.float32), s.astype(np.float32), vt.astype(np.float32)


def cached_svd(folder: str | Path | None = None) -> SVD:
    """`svd` behind a cache on disk, one file a kernel, named by the SHA-256 of its bytes.

    Args:
      folder: of the cache; by default ``svd`` in `utils.files.cache_folder`, and no cache where
        that is None.

    Returns:
      a function like `svd`. A file that is damaged, or whose product is not the kernel, is computed
      anew; a cache that cannot be written to is only a cache that does not help.
    """
    if folder is not None:
        root = expand(folder, "folder")
    elif (caches := cache_folder()) is not None:
        root = caches / "svd"
    else:
        return svd

    def lookup(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kernel = np.ascontiguousarray(kernel, np.float32)
        digest = hashlib.sha256(repr(kernel.shape).encode() + kernel.tobytes()).hexdigest()
        path = root / f"{digest}.safetensors"
        try:
            stored = load_file(path)
            u, s, vt = stored["u"], stored["s"], stored["vt"]
            # ValueError: shapes that do not fit each other, or the kernel.
            if np.linalg.norm((u * s) @ vt - kernel) <= 1e-4 * np.linalg.norm(kernel):
                return u, s, vt
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        u, s, vt = svd(kernel)
        try:
            root.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, {"u": u, "s": s, "vt": vt})
        except (OSError, SafetensorError):
            pass
        return u, s, vt

    return lookup


def singular_values(params: Any, sites: Sites) -> dict[str, np.ndarray]:
    """The singular values in use at each site, float32 ``[r]`` descending.

    Args:
      params: parameters made by `adapters.base.factor_params`.
      sites: the adapted sites; those of other adapters than `svf` are left out.
    """
    factors = {
        name: functools.reduce(operator.getitem, path, params) for name, path in sites.items()
    }
    return {
        name: np.asarray(own.s, np.float32)
        for name, own in factors.items()
        if isinstance(own, SVFFactors)
    }


def svf(
    *,
    rank_ratio: float = 0.8,
    tail: str = "keep",
    min_singular_value: float = 1e-5,
    svd: SVD = svd,
) -> Adapter:
    """The SVF adapter.

    Args:
      rank_ratio: share of the ``n`` singular values that are trainable, in (0, 1]; ``k`` is
        ``floor(rank_ratio * n)``, 614 of GPT-2's 768.
      tail: what becomes of the others: ``keep`` leaves them as they are, so that a zero adapter is
        the base model; ``drop`` sets them to zero, as the report's eq. 10 does.
      min_singular_value: smaller ones are never trainable.
      svd: the decomposition, e.g. `cached_svd()`.

    Raises:
      InputError: a value outside its range; in ``init``, a site without a trainable singular value.
    """
    rank_ratio = number("rank_ratio", rank_ratio, share())
    if tail not in ("keep", "drop"):
        raise InputError(f"tail={tail!r}: must be 'keep' or 'drop'.")

    def trainable(s: np.ndarray, n: int) -> int:
        # The small term undoes products such as 0.29 * 100 = 28.999999999999996.
        k = min(math.floor(rank_ratio * n + 1e-9), int(np.sum(s >= min_singular_value)))
        if k == 0:
            raise InputError(
                f"rank_ratio={rank_ratio} and min_singular_value={min_singular_value} leave no "
                f"singular value of {n} to train; raise the first or lower the second."
            )
        return k

    def factor(key: jax.Array, kernel: np.ndarray) -> SVFFactors:
        del key  # nothing here is random
        u, s, vt = svd(kernel)
        k = len(s) if tail == "keep" else trainable(s, len(s))
        return SVFFactors(jnp.asarray(u[:, :k]), jnp.asarray(s[:k]), jnp.asarray(vt[:k]))

    def init(key: jax.Array, factors: SVFFactors) -> jax.Array:
        del key  # the base model is one point
        s = np.asarray(factors.s)
        return jnp.zeros(trainable(s, len(s)) if tail == "keep" else len(s), jnp.float32)

    def scaled(factors: SVFFactors, offsets: jax.Array) -> jax.Array:
        return factors.s * (1.0 + jnp.pad(offsets, (0, factors.s.shape[0] - offsets.shape[0])))

    def apply(factors: SVFFactors, offsets: jax.Array, x: jax.Array) -> jax.Array:
        inner = dense(factors.u, x)
        return dense(factors.vt, inner * jnp.broadcast_to(scaled(factors, offsets), inner.shape))

    def merge(factors: SVFFactors, offsets: jax.Array) -> jax.Array:
        scales = scaled(factors, offsets)[None]
        return jnp.dot(factors.u * scales, factors.vt, precision="highest")

    return Adapter(factor, each_site(init), apply, merge)
