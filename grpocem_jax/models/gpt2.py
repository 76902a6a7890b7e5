"""GPT-2 (Radford et al. 2019) in Flax Linen: the network, its parameters and its checkpoints.

Parameter names mirror the Hugging Face checkpoint; GPT-2 stores its linear maps as ``[in, out]``,
which is Flax's layout too, so nothing is transposed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpocem_jax.models import conversion, decoder
from grpocem_jax.models.base import Model, Params, SiteFunction, attend, keep, remat
from grpocem_jax.models.conversion import Tensor
from grpocem_jax.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are GPT-2 124M's."""

    vocab_size: int = 50257
    context_length: int = 1024
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    layer_norm_epsilon: float = 1e-5


Config = GPT2Config
"""The config record under the name every architecture's module gives it."""

SHAPES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(width=1024, num_layers=24, num_heads=16),
    "gpt2-large": GPT2Config(width=1280, num_layers=36, num_heads=20),
    "gpt2-xl": GPT2Config(width=1600, num_layers=48, num_heads=25),
}
"""The published sizes, for ``random:NAME``."""


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: GPT2Config
    site_fn: SiteFunction | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, offsets, allowed, past, cache, index, places):
        """Returns the block's output ``[T, D]``, or ``[M, D]``, and its keys and values.

        The arguments are those that `decoder.run_layers` gives to a layer.
        """
        config = self.config
        length, width = x.shape
        heads = (config.num_heads, width // config.num_heads)

        def linear(features: int, path: str) -> decoder.Linear:
            return decoder.Linear(features, path, self.site_fn, name=path.replace(".", "_"))

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(config.layer_norm_epsilon, use_fast_variance=False, name=name)

        qkv = keep(linear(3 * width, "attn.c_attn")(norm("ln_1")(x), offsets))
        query, key, value = (
            jnp.swapaxes(part.reshape(length, *heads), 0, 1).astype(self.dtype)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        keys, values = decoder.extend(cache, key, value, index)
        segments = [] if past is None else [past]
        segments.append((keys, values, allowed))
        x, query, segments = decoder.narrow(places, x, query, segments)
        mixed = jnp.swapaxes(attend(query, segments), 0, 1)
        x = keep(x + linear(width, "attn.c_proj")(mixed.reshape(x.shape), offsets))

        wide = keep(linear(4 * width, "mlp.c_fc")(norm("ln_2")(x), offsets))
        x = x + linear(width, "mlp.c_proj")(nn.gelu(wide, approximate=True), offsets)
        return x, keys, values


class GPT2(nn.Module):
    """The network up to the final norm, on one sequence; the head is `Model.logits`.

    Attributes:
      config: the shape.
      site_fn: the ``apply`` of the adapter.
      run_block: `Block` as a function of its parameters and arguments, for all layers; without it
        every layer is a module of its own, as to make parameters or to look inside.
    """

    config: GPT2Config
    site_fn: SiteFunction | None = None
    run_block: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, tokens, positions, allowed, offsets, context, cache, index, places):
        """Hidden states float32 ``[T, D]``, or ``[M, D]``, and the own keys and values.

        ``tokens`` and ``positions`` are int32 ``[T]``; the other arguments and the results are
        those of `decoder.run_layers`.
        """
        config = self.config
        init = nn.initializers.normal(0.02)
        wte = self.param("wte", init, (config.vocab_size, config.width))
        wpe = self.param("wpe", init, (config.context_length, config.width))
        x = jnp.take(wte, tokens, axis=0).astype(jnp.float32)
        x = x + jnp.take(wpe, positions, axis=0).astype(jnp.float32)

        def run(layer: int, *arguments: Any) -> Any:
            if self.run_block is not None:
                return self.run_block(self.variables["params"][f"h_{layer}"], *arguments)
            return Block(config, self.site_fn, wte.dtype, name=f"h_{layer}")(*arguments)

        x, own = decoder.run_layers(
            run, config.num_layers, "h", x, allowed, offsets, context, cache, index, places
        )
        norm = nn.LayerNorm(config.layer_norm_epsilon, use_fast_variance=False, name="ln_f")
        return norm(x), own


def layout(config: GPT2Config) -> conversion.Layout:
    """The tensors of its checkpoints, and where each goes in the parameters."""
    d = config.width
    norm = {"weight": "scale", "bias": "bias"}
    tensors = {
        "wte.weight": Tensor(("wte",), (config.vocab_size, d)),
        "wpe.weight": Tensor(("wpe",), (config.context_length, d)),
    }
    linears: dict[str, tuple[int, ...]] = {
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (d, 4 * d),
        "mlp.c_proj": (4 * d, d),
    }
    for i in range(config.num_layers):
        for part, leaf in norm.items():
            for ln in ("ln_1", "ln_2"):
                tensors[f"h.{i}.{ln}.{part}"] = Tensor((f"h_{i}", ln, leaf), (d,))
        for path, shape in linears.items():
            module = path.replace(".", "_")
            tensors[f"h.{i}.{path}.weight"] = Tensor((f"h_{i}", module, "kernel"), shape)
            tensors[f"h.{i}.{path}.bias"] = Tensor((f"h_{i}", module, "bias"), shape[1:])
    for part, leaf in norm.items():
        tensors[f"ln_f.{part}"] = Tensor(("ln_f", leaf), (d,))
    return conversion.Layout(
        name="GPT-2",
        prefix="transformer.",
        tensors={f"transformer.{name}": tensor for name, tensor in tensors.items()},
        tied="transformer.wte.weight",
        # The attention's mask buffers of old checkpoints.
        passed_over=r"h\.\d+\.attn\.(masked_)?bias",
    )


def build(config: GPT2Config, site_fn: SiteFunction | None = None) -> Model:
    """The model's pure functions; ``site_fn`` is the ``apply`` of the adapter it will carry."""

    def network(dtype: jnp.dtype) -> GPT2:
        block = Block(config, site_fn, dtype)
        return GPT2(config, site_fn, remat(lambda params, *x: block.apply({"params": params}, *x)))

    return decoder.make_model(
        network,
        lambda params: params["wte"],
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        num_layers=config.num_layers,
        cache_heads=config.num_heads,
        head_dim=config.width // config.num_heads,
        sites=layout(config).sites(),
    )


def init_params(key: jax.Array, config: GPT2Config) -> Params:
    """Random float32 parameters as GPT-2 was initialised: normal(0.02), residual maps smaller.

    The two maps of a block that write to the residual stream have standard deviation
    ``0.02 / sqrt(2 * num_layers)``.
    """
    params = decoder.init_params(key, GPT2(config))

    def scale(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        residual = path[-1].key == "kernel" and path[-2].key.endswith("c_proj")
        return x * (2 * config.num_layers) ** -0.5 if residual else x

    return jax.tree_util.tree_map_with_path(scale, params)


def config_from_hf(fields: Mapping[str, Any], where: str) -> GPT2Config:
    """Reads the fields of a ``config.json``; ``where`` names the file in errors.

    Raises:
      InputError: a field is missing, or asks for something that is not implemented.
    """
    implemented = {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "is_causal": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "quantization_config": None,
    }
    conversion.check_implemented(fields, implemented, where)
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    conversion.check_positive(fields, sizes, where)
    config = GPT2Config(
        vocab_size=fields["vocab_size"],
        context_length=fields["n_positions"],
        width=fields["n_embd"],
        num_layers=fields["n_layer"],
        num_heads=fields["n_head"],
        layer_norm_epsilon=conversion.positive(
            fields.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon", where
        ),
    )
    if fields.get("n_inner") not in (None, 4 * config.width):
        raise InputError(
            f"{where}: n_inner={fields['n_inner']} is not implemented; it must be 4 * n_embd."
        )
    if config.width % config.num_heads:
        raise InputError(
            f"{where}: n_head={config.num_heads} does not divide n_embd={config.width}."
        )
    return config


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """The ``config.json`` that transformers reads, without token ids."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # what llama.cpp and mlx read
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "activation_function": "gelu_new",
    }


def params_from_state(
    state: Mapping[str, np.ndarray], config: GPT2Config, where: str
) -> dict[str, Any]:
    """Parameters float32 from a checkpoint's tensors; see `conversion.params_from_state`."""
    return conversion.params_from_state(state, layout(config), where)


def params_to_state(params: Params, config: GPT2Config) -> dict[str, np.ndarray]:
    """The inverse of `params_from_state`, with the names transformers writes; tied head once."""
    return conversion.params_to_state(params, layout(config))
