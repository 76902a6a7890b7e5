"""Puts an adapter on a model: the one way to a model that carries one."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.adapters.base import (
    Adapter,
    Offsets,
    Sites,
    factor_params,
    get,
    init_adapter,
    select_sites,
)
from grpocem_jax.models.base import Model, Params, SiteFunction, cast_params
from grpocem_jax.utils import memory
from grpocem_jax.utils.errors import InputError


class AdapterError(InputError):
    """An adapter whose functions fail, or do not keep to `Adapter`."""


class Source(Protocol):
    """A model to put an adapter on, such as a `grpocem_jax.Pretrained`."""

    @property
    def params(self) -> Params:
        """Plain float32 parameters."""

    def build(self, site_fn: SiteFunction | None = None) -> Model:
        """The model's functions; ``site_fn`` is the ``apply`` of the adapter it will carry."""


class Attached(NamedTuple):
    """A frozen model that carries an adapter.

    Attributes:
      model: its pure functions, which take offsets in the form of ``zero``.
      params: its parameters on the device, kernels at the sites replaced by factors.
      adapter: the adapter.
      sites: the adapted sites.
      zero: offsets at the base model, where training begins.
    """

    model: Model
    params: Params
    adapter: Adapter
    sites: Sites
    zero: Offsets


def attach(
    pretrained: Source,
    adapter: Adapter,
    sites: Iterable[str],
    *,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    place: Callable[[Any], Any] = lambda array: array,
) -> Attached:
    """Puts an adapter on a model and the model on the device.

    >>> import grpocem_jax as gj
    >>> model, params, adapter, sites, zero = gj.attach(
    ...     gj.load_model("builtin"), gj.svf(rank_ratio=0.5), ["attn.c_proj"]
    ... )
    >>> {name: x.shape for name, x in zero.items()}["h.0.attn.c_proj"]
    (64,)

    Args:
      pretrained: the model.
      adapter: the adapter.
      sites: the linear maps to adapt, as `select_sites` takes them.
      key: PRNG key of the adapter's random arrays; by default that of seed 0.
      dtype: of the matrices, ``float32``, ``bfloat16`` or ``float16``, see `cast_params`.
      place: puts arrays of parameters, a pytree, where they are to lie; by default on the first
        device. Those of a site come as soon as they are made, so that no device needs room for all.

    Raises:
      InputError: a site that the model lacks, or settings of the adapter that leave nothing to
        train; no adapter, such as `svf` itself; another ``dtype``.
      AdapterError: a function of the adapter that raises, cannot be traced, or returns something
        else than `Adapter` says.
    """
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"adapter={adapter!r}: is no Adapter; call a function that makes one, as in gj.svf()."
        )
    matrices = _matrices(dtype)
    key = jax.random.key(0) if key is None else key
    model = pretrained.build(adapter.apply)
    chosen = select_sites(model.sites, sites)
    with calling("factor"):
        params = factor_params(adapter, pretrained.params, chosen, key=key, place=place)
    _check_arrays("factor", {name: get(params, path) for name, path in chosen.items()})
    with calling("init"):
        zero = init_adapter(adapter, key, params, chosen)
    _check_arrays("init", zero)
    params = cast_params(params, matrices, place)
    _check_apply(adapter, pretrained.params, params, zero, chosen)
    return Attached(_through(model, adapter.view), params, adapter, chosen, zero)


def _matrices(dtype: Any) -> jnp.dtype:
    """The type of the matrices."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype={dtype!r}: must be 'float32', 'bfloat16' or 'float16'.")
    return found


def _through(model: Model, view: Callable[[Offsets], Mapping[str, Any]]) -> Model:
    """The model with functions of what is trained, which ``view`` hands out to the sites."""
    if view is Adapter._field_defaults["view"]:
        return model

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        def viewed(params: Params, offsets: Any, *rest: Any, **options: Any) -> Any:
            return function(params, view(offsets) if offsets else offsets, *rest, **options)

        return viewed

    return dataclasses.replace(
        model,
        forward=of(model.forward),
        prefill=of(model.prefill),
        decode_step=of(model.decode_step),
    )


@contextlib.contextmanager
def calling(part: str) -> Iterator[None]:
    """Says in one sentence that a part of an adapter fails inside the block.

    Raises:
      AdapterError: it does. An InputError passes through, as does memory that runs out.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever the function's own code may raise
        if memory.ran_out(error):
            raise
        reason = (str(error).splitlines() or ["no message"])[0]
        raise AdapterError(
            f"the adapter's {part} raised {type(error).__name__} ({reason}); correct it."
        ) from error


def _check_arrays(part: str, made: Any) -> None:
    """Refuses what ``factor`` or ``init`` made where it is no arrays, or offsets of integers."""
    if not isinstance(made, dict):
        raise AdapterError(
            f"the adapter's {part} returned {type(made).__name__}; return a dict from names to "
            "arrays of float32."
        )
    for name, tree in made.items():
        for leaf in jax.tree.leaves(tree):
            kind = getattr(leaf, "dtype", None)
            if kind is None or (part == "init" and not jnp.issubdtype(kind, jnp.floating)):
                raise AdapterError(
                    f"the adapter's {part} returned {kind or type(leaf).__name__} at {name}; "
                    "return arrays of float32."
                )


def _check_apply(
    adapter: Adapter, plain: Params, params: Params, zero: Offsets, sites: Sites
) -> None:
    """Refuses a ``view`` that leaves a site out, and an ``apply`` of another shape."""
    with calling("view"):
        shapes = jax.eval_shape(adapter.view, zero)
    missing = [name for name in sites if name not in shapes]
    if missing:
        raise AdapterError(
            f"the adapter's view has nothing for {missing[0]}; return an entry for every site."
        )
    checked = set()
    for name, path in sites.items():
        rows, columns = np.shape(get(plain, path))
        if (rows, columns) in checked:
            continue
        checked.add((rows, columns))
        x = jax.ShapeDtypeStruct((2, rows), jnp.float32)
        with calling("apply"):
            y = jax.eval_shape(adapter.apply, get(params, path), shapes[name], x)
        if getattr(y, "shape", None) != (2, columns):
            found = getattr(y, "shape", type(y).__name__)
            raise AdapterError(
                f"the adapter's apply returned {found} at {name} for x of shape (2, {rows}); it "
                f"must return an array of shape (2, {columns})."
            )
