"""A policy: a frozen model, the adapter it carries, its tokenizer and its stop tokens."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpocem_jax import adapters
from grpocem_jax.config import AdapterConfig, Config, section
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from grpocem_jax.models import tokenizer as tokenizers
from grpocem_jax.tasks import PromptFormat
from grpocem_jax.utils import devices, user_code
from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """Everything but the trainable offsets.

    Attributes:
      model: pure functions of the model, with the adapter's sites.
      params: its parameters on the device, kernels at the sites replaced by factors.
      adapter: the adapter's pure functions.
      sites: the adapted sites.
      zero: offsets of the base model.
      tokenizer: a transformers tokenizer, of whole texts.
      continuing: the same of what follows other text, see `models.tokenizer.continuing`.
      start_ids: tokens that it puts before every text, such as Llama's; none for GPT-2.
      end_ids: int32 ``[E]``, tokens that end a completion: the model's own, and those that are a
        stop string by themselves.
      pretrained: where the model came from.
      mesh: the devices of this process that work together, each with all parameters or a part of
        them; None for a single one.
      processes: those that work together, each with a policy of its own.
      stop_strings: what ends a completion wherever it appears in the text.
      stop_table: int32 ``[K, V]``, by which the tokens are watched for them, see
        `models.tokenizer.stop_table`; None where there are none.
      keep_special_tokens: whether completions keep special tokens, such as ``<think>``, but for the
        one that ends them.
      prompt_format: how prompts are written, without examples before them; see `data.chat`.
    """

    model: models.Model
    params: models.Params
    adapter: adapters.Adapter
    sites: adapters.Sites
    zero: adapters.Offsets
    tokenizer: Any
    continuing: Any
    start_ids: tuple[int, ...]
    end_ids: jax.Array
    pretrained: hub.Pretrained
    mesh: Mesh | None = None
    processes: Processes = ALONE
    stop_strings: tuple[str, ...] = ()
    stop_table: jax.Array | None = None
    keep_special_tokens: bool = True
    prompt_format: PromptFormat = dataclasses.field(default_factory=PromptFormat)

    @property
    def num_devices(self) -> int:
        """How many devices work together, those of all processes."""
        return self.processes.count * (1 if self.mesh is None else self.mesh.size)

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
        return [text[: self._stop(text)] for text in self._decode(ids)]

    def stopped(self, ids: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Which completions have a stop string in their text, bool ``[n]``."""
        texts = self._decode(ids) if self.stop_strings else [""] * len(ids)
        return np.array([self._stop(text) is not None for text in texts], bool)

    def _decode(self, ids: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        return tokenizers.decode(self.continuing, ids, keep_special_tokens=self.keep_special_tokens)

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


def load_policy(
    config: Config,
    *,
    adapter: adapters.Adapter | None = None,
    mesh: Mesh | None = None,
    processes: Processes = ALONE,
) -> Policy:
    """Loads the model of a config and puts a zero adapter on it.

    Args:
      config: of which the model, the adapter, the stop strings and the seed are read.
      adapter: an adapter of one's own, in place of the config's on the config's sites.
      mesh: devices among which the parameters are divided, or which all have them, see
        `grpocem_jax.utils.devices`.
      processes: those that share the work, see `grpocem_jax.utils.processes`.

    Raises:
      InputError: a source, site, stop string or adapter that cannot be used; a chat without a
        template.
    """
    if adapter is not None and not isinstance(adapter, adapters.Adapter):
        raise InputError(
            f"adapter: is {type(adapter).__name__}; give a grpocem_jax.Adapter, which a function "
            "such as svf() returns."
        )
    source, generation = config.model.source, config.generation
    # Asked before the weights are drawn, which takes long for a large shape.
    if source.startswith("random:") and hub.load_outline(source).tokenizer is None:
        raise InputError(
            f"model.source={source!r} has no tokenizer and text is needed; use "
            "random:FOLDER with a folder that holds config.json and the tokenizer's files."
        )
    pretrained = hub.load_model(source, seed=config.seed)
    render = tokenizers.chat_writer(pretrained.tokenizer)
    prompt_format = PromptFormat(render, config.data.chat, config.data.system)
    if config.data.chat and render is None:
        raise InputError(
            f"config.data.chat=True: the tokenizer of {source} has no chat template; use a model "
            "that was trained to chat, or leave it False."
        )
    continuing = tokenizers.continuing(pretrained.tokenizer)
    table = None
    if generation.stop:
        table = tokenizers.stop_table(
            continuing,
            generation.stop,
            pretrained.config.vocab_size,
            keep_special_tokens=generation.keep_special_tokens,
        )
    written = [continuing.encode(text, add_special_tokens=False) for text in generation.stop]
    end_ids = [*pretrained.end_ids, *(tokens[0] for tokens in written if len(tokens) == 1)]
    attached = attach(pretrained, config, adapter=adapter, mesh=mesh)
    return Policy(
        **attached._asdict(),
        tokenizer=pretrained.tokenizer,
        continuing=continuing,
        start_ids=_start_ids(pretrained.tokenizer),
        end_ids=jnp.array(end_ids, jnp.int32),
        pretrained=pretrained,
        mesh=mesh,
        processes=processes,
        stop_strings=generation.stop,
        stop_table=None if table is None else devices.replicate(mesh, jnp.asarray(table)),
        keep_special_tokens=generation.keep_special_tokens,
        prompt_format=prompt_format,
    )


def attach(
    pretrained: hub.Pretrained,
    config: Config,
    *,
    adapter: adapters.Adapter | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> adapters.Attached:
    """Puts the adapter of a config on a model, see `adapters.attach`.

    Args:
      pretrained: the model.
      config: of which the adapter, the seed and the model's type are read.
      adapter: as in `load_policy`.
      dtype: another type of the matrices.
      mesh: as in `load_policy`.

    Raises:
      InputError: as `adapters.attach`, with the config's field.
    """
    settings = config.adapter
    with section("adapter", AdapterConfig), naming(settings):
        return adapters.attach(
            pretrained,
            make_adapter(settings) if adapter is None else adapter,
            settings.sites,
            key=jax.random.key(config.seed),
            dtype=jnp.dtype(devices.matrix_dtype(dtype or config.model.dtype)),
            place=functools.partial(devices.place_weights, mesh),
        )


@contextlib.contextmanager
def naming(settings: AdapterConfig) -> Iterator[None]:
    """Names the field of the config where an adapter does not keep to the interface.

    Raises:
      InputError: it does not.
    """
    try:
        yield
    except adapters.AdapterError as error:
        raise InputError(f"{_own_field(settings)}: {error}") from error


def _own_field(settings: AdapterConfig) -> str:
    return f"config.adapter.type={settings.type!r} with options {dict(settings.options)}"


def make_adapter(settings: AdapterConfig) -> adapters.Adapter:
    """The adapter's pure functions.

    Raises:
      InputError: options that it does not take; a function of the user's own that fails or returns
        something else.
    """
    if settings.type == "svf":
        return adapters.svf(
            rank_ratio=settings.rank_ratio,
            tail=settings.tail,
            min_singular_value=settings.min_singular_value,
            svd=adapters.cached_svd(),
        )
    field = _own_field(settings)
    if settings.type in adapters.ADAPTERS:
        function: Any = adapters.ADAPTERS[settings.type]
        if "svd" in inspect.signature(function).parameters:
            function = functools.partial(function, svd=adapters.cached_svd())
    else:
        function = user_code.load_function(settings.type, field="config.adapter.type")
    try:
        made = function(**settings.options)
    except InputError as error:
        raise InputError(f"{field}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the function's own code may raise
        kind, message = user_code.failure(error)
        raise InputError(f"{field}: the function raised {kind} ({message}); correct it.") from error
    if not isinstance(made, adapters.Adapter):
        raise InputError(
            f"{field}: the function returned {type(made).__name__}; return a grpocem_jax.Adapter."
        )
    return made


def _start_ids(tokenizer: Any) -> tuple[int, ...]:
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for count in range(len(whole) - len(bare) + 1):
        if whole[count : count + len(bare)] == bare:
            return tuple(whole[:count])
    raise InputError(
        f"model.source: its tokenizer makes {whole} of 'a' with special tokens and {bare} without, "
        "so it changes the text as well; only tokens before and after it are implemented."
    )
