"""A policy: a frozen model, the adapter it carries, its tokenizer and its stop tokens."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax import devices, memory, user_code
from grpocem_jax.adapters import base as adapters
from grpocem_jax.adapters import svf
from grpocem_jax.config import AdapterConfig, ModelConfig
from grpocem_jax.errors import InputError
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from grpocem_jax.models import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """Everything but the trainable offsets.

    Attributes:
      model: pure functions of the model, with the adapter's sites.
      params: its parameters on the device, kernels at the sites replaced by factors.
      method: the adapter's pure functions.
      sites: the adapted sites.
      zero: offsets of the base model.
      tokenizer: a transformers tokenizer, of whole texts.
      continuing: the same of what follows other text, see `models.tokenizer.continuing`.
      start_ids: tokens that it puts before every text, such as Llama's; none for GPT-2.
      end_ids: int32 ``[E]``, tokens that end a completion.
      pretrained: where the model came from.
      mesh: the devices that work together, each with all parameters; None for a single one.
    """

    model: models.Model
    params: models.Params
    method: adapters.Adapter
    sites: adapters.Sites
    zero: adapters.Offsets
    tokenizer: Any
    continuing: Any
    start_ids: tuple[int, ...]
    end_ids: jax.Array
    pretrained: hub.Pretrained
    mesh: Mesh | None = None

    @property
    def num_devices(self) -> int:
        """How many devices work together."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def dtype(self) -> str:
        """The type of the matrices, ``model.dtype``."""
        found = {str(x.dtype) for x in jax.tree.leaves(self.params)}
        return next((name for name in ("float16", "bfloat16") if name in found), "float32")

    def nonfinite_logits(self, fix: str) -> str:
        """That logits are not finite and what to do; ``fix`` where the type is not to blame."""
        if self.dtype == "float16":
            fix = (
                "its largest number is 65504, so set config.model.dtype to 'bfloat16', or to "
                "'float32'"
            )
        return f"the logits are not finite in {self.dtype}; {fix}"

    def encode(self, text: str) -> list[int]:
        """Tokens of a text from its beginning, with `start_ids` before it; none of no text."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return [*self.start_ids, *tokens] if tokens else []

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of a text that follows another."""
        return self.continuing.encode(text, add_special_tokens=False)

    def decode_completions(self, ids: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """Texts of completions without special tokens, each to stand behind its prompt as it is."""
        return self.continuing.batch_decode(ids, skip_special_tokens=True)

    def adapter_config(self, settings: AdapterConfig) -> dict[str, Any]:
        """What ``adapter_config.json`` says of an adapter of this policy."""
        return {
            "base_model": self.pretrained.source,
            "base_sha256": self.pretrained.sha256,
            **vars(settings),
            "options": dict(settings.options),
        }


class Carrier(NamedTuple):
    """A model that carries an adapter; the fields are those of `Policy`."""

    model: models.Model
    params: models.Params
    method: adapters.Adapter
    sites: adapters.Sites
    zero: adapters.Offsets


def load_policy(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    stop: Iterable[str] = (),
    seed: int = 0,
    method: adapters.Adapter | None = None,
    mesh: Mesh | None = None,
) -> Policy:
    """Loads the model and puts a zero adapter on it.

    Args:
      model: the model section of the config.
      adapter: the adapter section.
      stop: single-token strings that end a completion beside the end-of-text token.
      seed: of random weights, and of the adapter's initialisation.
      method: an adapter of one's own; of the adapter section only ``sites`` is then read.
      mesh: devices that the parameters are put on, see `grpocem_jax.devices`.

    Raises:
      InputError: a source, site, stop string or adapter that cannot be used.
    """
    if method is not None and not isinstance(method, adapters.Adapter):
        raise InputError(
            f"method: is {type(method).__name__}; give a grpocem_jax.Adapter, which a function "
            "such as svf() returns."
        )
    # Asked before the weights are drawn, which takes long for a large shape.
    if model.source.startswith("random:") and hub.load_outline(model.source).tokenizer is None:
        raise InputError(
            f"model.source={model.source!r} has no tokenizer and text is needed; use "
            "random:FOLDER with a folder that holds config.json and the tokenizer's files."
        )
    pretrained = hub.load_model(model.source, seed=seed)
    continuing = tokenizers.continuing(pretrained.tokenizer)
    end_ids = [*pretrained.end_ids, *(_single_token(continuing, s) for s in stop)]
    carrier = put_adapter(pretrained, adapter, dtype=model.dtype, seed=seed, method=method)
    return Policy(
        **carrier._replace(params=devices.replicate(mesh, carrier.params))._asdict(),
        tokenizer=pretrained.tokenizer,
        continuing=continuing,
        start_ids=_start_ids(pretrained.tokenizer),
        end_ids=jnp.array(end_ids, jnp.int32),
        pretrained=pretrained,
        mesh=mesh,
    )


def put_adapter(
    pretrained: hub.Pretrained,
    adapter: AdapterConfig,
    *,
    dtype: str = "float32",
    seed: int = 0,
    method: adapters.Adapter | None = None,
) -> Carrier:
    """Puts a zero adapter on a model and the model on the device.

    Args:
      pretrained: the model.
      adapter: the adapter section of the config.
      dtype: of the matrices, see `models.base.cast_params`.
      seed: of the adapter's initialisation, where it has any.
      method: as in `load_policy`.

    Raises:
      InputError: a site that the model lacks, settings that leave nothing to train, or an adapter
        of the user's own that cannot be made or does not keep to `adapters.base.Adapter`.
    """
    method = make_adapter(adapter) if method is None else method
    model = pretrained.build(method.apply)
    sites = adapters.select_sites(model.sites, adapter.sites)
    with own_code(adapter, "factor"):
        params = adapters.factor_params(method, pretrained.params, sites)
    factors = {name: adapters.get(params, path) for name, path in sites.items()}
    _check_arrays(adapter, "factor", factors)
    with own_code(adapter, "init"):
        zero = adapters.init_adapter(method, jax.random.key(seed), params, sites)
    _check_arrays(adapter, "init", zero)
    params = models.cast_params(params, jnp.dtype(dtype))
    if user_code.is_reference(adapter.type):
        _check_apply(adapter, method, pretrained.params, params, zero, sites)
    return Carrier(model=model, params=params, method=method, sites=sites, zero=zero)


@contextlib.contextmanager
def own_code(settings: AdapterConfig, part: str) -> Iterator[None]:
    """Says in one sentence that a part of an adapter of the user's own fails inside the block.

    Raises:
      InputError: it does. Where memory runs out, that error passes through.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever the function's own code may raise
        if not user_code.is_reference(settings.type) or memory.ran_out(error):
            raise
        reason = (str(error).splitlines() or ["no message"])[0]
        raise InputError(
            f"{_own_field(settings)}: the adapter's {part} raised {type(error).__name__} "
            f"({reason}); correct it."
        ) from error


def _own_field(settings: AdapterConfig) -> str:
    return f"config.adapter.type={settings.type!r} with options {dict(settings.options)}"


def _check_arrays(settings: AdapterConfig, part: str, made: Mapping[str, Any]) -> None:
    """Refuses what ``factor`` or ``init`` made where it is no arrays, or offsets of integers."""
    for name, tree in made.items() if user_code.is_reference(settings.type) else ():
        for leaf in jax.tree.leaves(tree):
            kind = getattr(leaf, "dtype", None)
            if kind is None or (part == "init" and not jnp.issubdtype(kind, jnp.floating)):
                raise InputError(
                    f"{_own_field(settings)}: the adapter's {part} returned "
                    f"{kind or type(leaf).__name__} at {name}; return arrays of float32."
                )


def _check_apply(
    settings: AdapterConfig,
    method: adapters.Adapter,
    plain: models.Params,
    params: models.Params,
    zero: adapters.Offsets,
    sites: adapters.Sites,
) -> None:
    """Refuses an ``apply`` that cannot be traced, or whose result has another shape."""
    checked = set()
    for name, path in sites.items():
        rows, columns = np.shape(adapters.get(plain, path))
        if (rows, columns) in checked:
            continue
        checked.add((rows, columns))
        x = jax.ShapeDtypeStruct((2, rows), jnp.float32)
        with own_code(settings, "apply"):
            y = jax.eval_shape(method.apply, adapters.get(params, path), zero[name], x)
        if getattr(y, "shape", None) != (2, columns):
            found = getattr(y, "shape", type(y).__name__)
            raise InputError(
                f"{_own_field(settings)}: the adapter's apply returned {found} at {name} for x of "
                f"shape (2, {rows}); it must return an array of shape (2, {columns})."
            )


def make_adapter(settings: AdapterConfig) -> adapters.Adapter:
    """The adapter's pure functions.

    Raises:
      InputError: a function of the user's own that fails or returns something else.
    """
    if settings.type == "svf":
        return svf.svf(
            rank_ratio=settings.rank_ratio,
            tail=settings.tail,
            min_singular_value=settings.min_singular_value,
            svd=svf.cached_svd(),
        )
    function = user_code.load_function(settings.type, field="config.adapter.type")
    field = _own_field(settings)
    try:
        method = function(**settings.options)
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(f"{field}: the function raised {kind} ({message}); correct it.") from error
    if not isinstance(method, adapters.Adapter):
        raise InputError(
            f"{field}: the function returned {type(method).__name__}; return a grpocem_jax.Adapter."
        )
    return method


def _start_ids(tokenizer: Any) -> tuple[int, ...]:
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for count in range(len(whole) - len(bare) + 1):
        if whole[count : count + len(bare)] == bare:
            return tuple(whole[:count])
    raise InputError(
        f"model.source: its tokenizer makes {whole} of 'a' with special tokens and {bare} without, "
        "so it changes the text as well; only tokens before and after it are implemented."
    )


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(
            f"generation.stop: {text!r} is {len(ids)} tokens of this tokenizer; a stop string must "
            "be one."
        )
    return ids[0]
