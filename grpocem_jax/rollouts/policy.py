"""A policy: a frozen model, the adapter it carries, its tokenizer and its stop tokens."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax.adapters import base as adapters
from grpocem_jax.adapters import svf
from grpocem_jax.config.schema import AdapterConfig, ModelConfig
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from grpocem_jax.models import tokenizer as tokenizers
from grpocem_jax.utils import devices, memory, user_code
from grpocem_jax.utils.errors import InputError


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
      end_ids: int32 ``[E]``, tokens that end a completion: the model's own, and those that are a
        stop string by themselves.
      pretrained: where the model came from.
      mesh: the devices that work together, each with all parameters; None for a single one.
      stop_strings: what ends a completion wherever it appears in the text.
      stop_table: int32 ``[K, V]``, by which the tokens are watched for them, see
        `models.tokenizer.stop_table`; None where there are none.
      keep_special_tokens: whether completions keep special tokens, such as ``<think>``, but for the
        one that ends them.
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
    stop_strings: tuple[str, ...] = ()
    stop_table: jax.Array | None = None
    keep_special_tokens: bool = True

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
        """Tokens of a text from its beginning, with `start_ids` before it; none of no text.

        They are not put before a text that begins with them, as what a chat template writes does.

        Raises:
          InputError: the text has a token for which the model has no embedding.
        """
        tokens = self._known(self.tokenizer.encode(text, add_special_tokens=False))
        if not tokens or tuple(tokens[: len(self.start_ids)]) == self.start_ids:
            return tokens
        return [*self.start_ids, *tokens]

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of a text that follows another.

        Raises:
          InputError: as `encode`.
        """
        return self._known(self.continuing.encode(text, add_special_tokens=False))

    def _known(self, tokens: list[int]) -> list[int]:
        if max(tokens, default=0) >= self.model.vocab_size:
            name = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise InputError(
                f"a text has {name!r}, token {max(tokens)} of the tokenizer, but the model has "
                f"{self.model.vocab_size} tokens only; take it out of the text."
            )
        return tokens

    def decode_completions(self, ids: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """Texts of completions up to a stop string, each to stand behind its prompt as it is."""
        texts = tokenizers.decode(
            self.continuing, ids, keep_special_tokens=self.keep_special_tokens
        )
        return [text[: self._stop(text)] for text in texts]

    def _stop(self, text: str) -> int | None:
        """Where the first stop string of a text begins."""
        return min((at for at in map(text.find, self.stop_strings) if at >= 0), default=None)

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
    keep_special_tokens: bool = True,
    seed: int = 0,
    method: adapters.Adapter | None = None,
    mesh: Mesh | None = None,
) -> Policy:
    """Loads the model and puts a zero adapter on it.

    Args:
      model: the model section of the config.
      adapter: the adapter section.
      stop: strings that end a completion wherever they appear in it, beside the end-of-text token.
      keep_special_tokens: see `Policy`.
      seed: of random weights, and of the adapter's initialisation.
      method: an adapter of one's own; of the adapter section only ``sites`` is then read.
      mesh: devices that the parameters are put on, see `grpocem_jax.utils.devices`.

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
    stop_strings = tuple(stop)
    table = None
    if stop_strings:
        table = tokenizers.stop_table(
            continuing,
            stop_strings,
            pretrained.config.vocab_size,
            keep_special_tokens=keep_special_tokens,
        )
    written = [continuing.encode(text, add_special_tokens=False) for text in stop_strings]
    end_ids = [*pretrained.end_ids, *(tokens[0] for tokens in written if len(tokens) == 1)]
    carrier = put_adapter(pretrained, adapter, dtype=model.dtype, seed=seed, method=method)
    return Policy(
        **carrier._replace(params=devices.replicate(mesh, carrier.params))._asdict(),
        tokenizer=pretrained.tokenizer,
        continuing=continuing,
        start_ids=_start_ids(pretrained.tokenizer),
        end_ids=jnp.array(end_ids, jnp.int32),
        pretrained=pretrained,
        mesh=mesh,
        stop_strings=stop_strings,
        stop_table=None if table is None else devices.replicate(mesh, jnp.asarray(table)),
        keep_special_tokens=keep_special_tokens,
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
