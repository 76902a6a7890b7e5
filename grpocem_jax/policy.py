"""A policy: a frozen model, the adapter it carries, its tokenizer and its stop tokens."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax import user_code
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
) -> Policy:
    """Loads the model and puts a zero adapter on it.

    Args:
      model: the model section of the config.
      adapter: the adapter section.
      stop: single-token strings that end a completion beside the end-of-text token.
      seed: of random weights, and of the adapter's initialisation.
      method: an adapter of one's own; of the adapter section only ``sites`` is then read.

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
        **carrier._asdict(),
        tokenizer=pretrained.tokenizer,
        continuing=continuing,
        start_ids=_start_ids(pretrained.tokenizer),
        end_ids=jnp.array(end_ids, jnp.int32),
        pretrained=pretrained,
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
        of the user's own that cannot be made.
    """
    method = make_adapter(adapter) if method is None else method
    model = pretrained.build(method.apply)
    sites = adapters.select_sites(model.sites, adapter.sites)
    params = adapters.factor_params(method, pretrained.params, sites)
    zero = adapters.init_adapter(method, jax.random.key(seed), params, sites)
    return Carrier(
        model=model,
        params=models.cast_params(params, jnp.dtype(dtype)),
        method=method,
        sites=sites,
        zero=zero,
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
    field = f"config.adapter.type={settings.type!r} with options {dict(settings.options)}"
    try:
        method = function(**settings.options)
    except Exception as error:  # whatever the function's own code may raise
        raise InputError(
            f"{field}: the function raised {type(error).__name__} ({error}); correct it."
        ) from error
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
