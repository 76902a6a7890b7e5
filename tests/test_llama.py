"""Llama, Qwen and Mistral: positions, checkpoints, what is refused, and a run from end to end."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing

from grpocem_jax import adaptation, adapters, rollouts
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.export import model as export
from grpocem_jax.models import base, hub, llama, rope
from grpocem_jax.models.tokenizer import load_tokenizer
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.tasks.base import Example, Task
from grpocem_jax.training import loop as training
from grpocem_jax.utils.errors import InputError
from tests.folders import assert_refused, edit_config, edit_state, shard
from tests.parity import weights
from tests.parity.layers import REFERENCE
from tests.tiny import make_tiny

ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
SITES = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BIASED, QWEN2 = weights.LLAMAS["llama-biases"], weights.LLAMAS["qwen2"]
TEXT = weights.tokens(BIASED, 12)
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


# The network


def test_rotation_turns_each_pair_by_its_own_angle():
    """Entries i and i + d/2 are a complex number; pair i turns by position * theta^(-2i/d)."""
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    positions = jnp.array([0, 1, 2, 7, 400])
    angles = llama.rotary_angles(positions, 6, 100.0)
    found = np.asarray(llama.rotate(x, *angles))
    turn = np.exp(1j * np.asarray(positions)[:, None] * 100.0 ** (-np.array([[0, 2, 4]]) / 6))
    expected = (x[..., :3] + 1j * x[..., 3:]) * turn[None]
    np.testing.assert_allclose(found[..., :3] + 1j * found[..., 3:], expected, atol=1e-4)


def test_only_the_distance_of_two_tokens_counts_in_their_product():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        turned = [
            llama.rotate(x, *llama.rotary_angles(jnp.array([place]), 8, 100.0))
            for x, place in ((query, i), (key, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-5)
    assert abs(product(9, 4) - product(9, 5)) > 0.01


def test_llama3_scaling_stretches_low_frequencies_leaves_high_ones_and_joins_the_two():
    """Angles at position 1: what turns less than once in 64 positions is 8 times slower, what turns
    more than 4 times as before, and between them the share kept is linear in the turns."""
    scaling = rope.Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_context=64)
    frequencies = 2 * np.pi * np.array([0.5, 1.0, 2.5, 4.0, 9.0]) / 64
    expected = frequencies * np.array([1 / 8, 1 / 8, 0.5 + 0.5 / 8, 1.0, 1.0])
    np.testing.assert_allclose(scaling(frequencies), expected, rtol=1e-12)
    cos, sin = llama.rotary_angles(jnp.array([1]), 64, 5e5, scaling)
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0], scaling(plain), rtol=1e-5)


def test_llama3_frequencies_equal_those_of_transformers():
    reference = np.load(REFERENCE / "llama3-frequencies.npz")
    for name, (head_dim, theta, *scaling) in weights.LLAMA3.items():
        found = rope.Llama3Scaling(*scaling)(theta ** (-np.arange(0, head_dim, 2) / head_dim))
        np.testing.assert_allclose(found, reference[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "fields", "window", "types"),
    [
        ("mistral", {"sliding_window": 9}, 9, ()),
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {}, 4096, ()),
        ("llama", {"sliding_window": 7}, 7, ()),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": False}, None, ()),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True}, None, ()),
        (
            "qwen2",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            7,
            ("full_attention", "sliding_attention"),
        ),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True}, None, ()),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            7,
            ("sliding_attention", "full_attention"),
        ),
    ],
)
def test_the_sliding_window_is_read_as_transformers_does_and_bounds_the_context(
    kind, fields, window, types
):
    """28 layers of a Qwen are without a window where its config.json does not say how many."""
    plain = {**weights.LLAMAS["llama"], "model_type": kind}
    config = llama.config_from_hf({**plain, **fields}, "case")
    assert (config.window, config.layer_types) == (window, types)
    assert config.context_length == 24
    model = llama.build(config)
    assert model.context_length == min(24, window or 24)
    bounded = window is not None and window < 24
    assert model.context == (f"{window}, the sliding window of its attention" if bounded else "24")
    assert llama.config_from_hf(llama.config_to_hf(config), "case") == config


def test_a_run_longer_than_the_window_is_refused_with_both_named(tmp_path, saved):
    folder = shutil.copytree(saved["mistral"], tmp_path / "mistral")
    edit_config(folder, sliding_window=20)
    settings = load_config("llama")
    settings.model.source, settings.adapter.sites = str(folder), ("self_attn.o_proj",)
    settings.data.max_prompt_tokens, settings.generation.max_new_tokens = 12, 9
    with pytest.raises(InputError, match=r"make 21 tokens.* context is 20, the sliding window"):
        training.train(settings, tmp_path / "run")


def test_the_heads_of_a_qwen3_are_of_128_where_its_config_does_not_say():
    fields = {**weights.LLAMAS["qwen3"], "head_dim": None}
    assert llama.config_from_hf(fields, "case").head_dim == 128


@pytest.fixture(scope="module")
def biased():
    return make_tiny(BIASED, "self_attn.o_proj")


def test_sites_have_the_names_of_the_checkpoint_without_its_prefix(biased):
    assert list(biased.base.sites) == [f"layers.{i}.{site}" for i in range(2) for site in SITES]
    path = ("layers_1", "self_attn_k_proj", "kernel")
    assert biased.base.sites["layers.1.self_attn.k_proj"] == path
    assert biased.params["layers_1"]["self_attn_k_proj"]["kernel"].shape == (36, 3 * 10)
    assert biased.params["layers_1"]["self_attn_o_proj"]["kernel"].shape == (9 * 10, 36)


def test_all_seven_maps_take_an_adapter_which_has_a_gradient_and_merges(biased):
    method, plain = biased.adapter, biased.base
    sites = adapters.select_sites(plain.sites, SITES)
    assert len(sites) == 14
    params = adapters.factor_params(method, biased.params, sites)
    zero = adapters.init_adapter(method, jax.random.key(0), params, sites)
    everywhere = np.ones(len(TEXT), bool)

    def total(model, params, offsets):
        hidden = model.forward(params, offsets, TEXT, everywhere)
        return jnp.sum(model.logits(params, hidden) ** 2)

    adapted = jax.jit(jax.value_and_grad(lambda offsets: total(biased.model, params, offsets)))
    of_kernels = jax.jit(lambda params: total(plain, params, {}))
    value, gradient = adapted(zero)
    assert value == pytest.approx(float(of_kernels(biased.params)), rel=1e-4)
    assert all(np.abs(x).max() > 1e-4 for x in gradient.values())

    moved = {name: 0.2 * jax.random.normal(jax.random.key(1), x.shape) for name, x in zero.items()}
    found = float(adapted(moved)[0])
    merged = adapters.merge_params(method, params, moved, sites)
    assert found == pytest.approx(float(of_kernels(merged)), rel=1e-4)
    assert abs(found - value) > 0.01 * value


def test_initial_parameters_are_as_transformers_makes_them():
    config = llama.Config(
        vocab_size=500, width=64, inner=96, num_layers=2, num_heads=4, head_dim=16, tied=False
    )
    params = llama.init_params(jax.random.key(0), config)
    assert params["lm_head"].shape == params["embed_tokens"].shape == (500, 64)
    assert np.abs(params["lm_head"] - params["embed_tokens"]).max() > 0.01
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert x.dtype == jnp.float32
        if x.ndim == 1:
            np.testing.assert_array_equal(x, 1.0 if "scale" in name else 0.0, err_msg=name)
        else:
            assert np.std(x) == pytest.approx(0.02, rel=0.05), name


def test_the_backward_pass_keeps_the_large_products_and_no_attention_weights(biased):
    """What `base.remat` keeps of a block: its input, and what is marked."""
    block = llama.Block(biased.config, None, jnp.float32)
    length, width = len(TEXT), biased.config.width
    x = jnp.ones((length, width))
    allowed = jnp.ones((length, length), bool)
    angles = llama.rotary_angles(jnp.arange(length), biased.config.head_dim, 1e4)

    @base.remat
    def run(params, x):
        return block.apply({"params": params}, x, {}, allowed, None, None, None, None, *angles)[0]

    params = biased.params["layers_0"]
    _, backward = jax.vjp(lambda x: run(params, x), x)
    constants = {x.shape for x in jax.tree.leaves((params, allowed, angles))}
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape not in constants]
    heads, inner = biased.config.head_dim, biased.config.inner
    products = [9 * heads, 3 * heads, 3 * heads, width, inner, inner]
    assert sorted(shapes) == sorted([x.shape, *((length, size) for size in products)])


# Checkpoints


def save(fields, folder, tokenizer):
    module = hub.ARCHITECTURES[fields["model_type"]]
    config = module.config_from_hf(fields, "case")
    params = module.params_from_state(weights.state(fields), config, "case")
    hub.save_model(folder, config, params, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A word for each id, from a folder whose config names one of transformers' classes."""
    vocabulary = {"<end>": 0, "<start>": 1, **{f"w{i}": i for i in range(2, 61)}}
    folder = tmp_path_factory.mktemp("tokenizer")
    added = [
        {"id": i, "content": x, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, x in enumerate(("<end>", "<start>"))
    ]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<end>"}
    text = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}}
    text |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(text | {"model": model}))
    special = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<end>", "bos_token": "<start>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return load_tokenizer(folder)


def test_the_tokenizers_file_counts_and_not_the_class_that_its_config_names(tokenizer):
    """The class of that name would join words by its own sign and drop what it does not know."""
    assert tokenizer.encode("w5 w60 other w2") == [5, 60, 0, 2]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)


@pytest.mark.parametrize("case", weights.LLAMAS)
def test_save_and_load_are_inverse_bit_for_bit(case, tmp_path, tokenizer):
    fields = weights.LLAMAS[case]
    save(fields, tmp_path, tokenizer)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == fields["model_type"]
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 0)
    pretrained = hub.load_model(str(tmp_path))
    assert pretrained.config == llama.config_from_hf(fields, case)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == weights.state(fields).keys()
    for name, x in llama.params_to_state(pretrained.params, pretrained.config).items():
        np.testing.assert_array_equal(x, weights.state(fields)[name], err_msg=name)
        np.testing.assert_array_equal(x, state[name], err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Folders by model type; not to be changed."""
    fields = {"llama": BIASED, "qwen2": QWEN2, "mistral": weights.LLAMAS["mistral"]}
    folder = tmp_path_factory.mktemp("saved")
    return {kind: save(own, folder / kind, tokenizer) for kind, own in fields.items()}


@pytest.fixture
def folder(tmp_path, saved):
    """A copy of the Llama to damage."""
    return shutil.copytree(saved["llama"], tmp_path / "llama")


@pytest.fixture
def tied(tmp_path, saved):
    """A copy of the Qwen2, which has no head of its own."""
    return shutil.copytree(saved["qwen2"], tmp_path / "qwen2")


def embedding(folder):
    return hub.load_model(str(folder)).params["embed_tokens"]


def test_a_tied_checkpoint_may_have_the_embedding_the_head_or_both(tied):
    expected = weights.state(QWEN2)[EMBEDDING]
    np.testing.assert_array_equal(embedding(tied), expected)
    edit_state(tied, lambda s: s.update({HEAD: s[EMBEDDING]}))
    np.testing.assert_array_equal(embedding(tied), expected)
    edit_state(tied, lambda s: s.pop(EMBEDDING))
    np.testing.assert_array_equal(embedding(tied), expected)
    # What is wrong with the head is said of it, not of an embedding that the file does not have.
    edit_state(tied, lambda s: s.update({HEAD: s[HEAD][:-1].copy()}))
    assert_refused(tied, tied, f"the tensor {HEAD} has shape")
    edit_config(tied, tie_word_embeddings=False)
    assert_refused(tied, tied, f"{EMBEDDING} is missing", "tie_word_embeddings in config.json")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_checkpoints_become_float32(folder, dtype):
    half = {name: x.astype(dtype) for name, x in weights.state(BIASED).items()}
    save_file(half, folder / "model.safetensors")
    shard(folder)
    pretrained = hub.load_model(str(folder))
    for name, x in llama.params_to_state(pretrained.params, pretrained.config).items():
        np.testing.assert_array_equal(x, half[name].astype(np.float32))


def test_end_tokens_are_those_of_the_generation_config_then_the_config_then_the_tokenizer(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 5]}))
    edit_config(folder, eos_token_id=3)
    assert hub.load_model(str(folder)).end_ids == (7, 5)
    path.write_text("{}")
    assert hub.load_model(str(folder)).end_ids == (3,)
    drop_field(folder, "eos_token_id")
    assert hub.load_model(str(folder)).end_ids == (0,)
    path.write_text(json.dumps({"eos_token_id": "</s>"}))
    assert_refused(folder, path, "eos_token_id='</s>'", "must be a token")


def drop_field(folder, field):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 5000}, 5000.0),
        ({"rope_scaling": None, "rope_parameters": None}, 100.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5),
        ({"rope_scaling": {"type": "default"}}, 100.0),
    ],
)
def test_the_rotary_base_is_read_from_where_transformers_puts_it(fields, theta):
    assert llama.config_from_hf({**BIASED, **fields}, "case").rope_theta == theta


def test_transformers_defaults_stand_for_fields_that_are_missing():
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    needed += ("num_attention_heads", "max_position_embeddings", "model_type")
    config = llama.config_from_hf({name: BIASED[name] for name in needed}, "case")
    assert (config.num_kv_heads, config.head_dim) == (9, 4)
    assert (config.rms_norm_epsilon, config.rope_theta) == (1e-6, 1e4)
    assert not any((config.tied, config.qkv_bias, config.out_bias, config.mlp_bias))


# What is refused

WINDOW = {"use_sliding_window": True, "sliding_window": 8}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("kind", "fields", "fragments"),
    [
        ("llama", {"model_type": "gemma2"}, ["model_type='gemma2'", "gpt2, llama, mistral, qwen2"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling={", "lin"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling=", "'llama3'"]),
        ("qwen2", {"rope_parameters": YARN}, ["rope_parameters=", "yarn", "rope scaling"]),
        ("llama", {"rope_parameters": {"full_attention": {}}}, ["rope_parameters=", "full_att"]),
        ("llama", {"rope_scaling": "linear"}, ["rope_scaling='linear'"]),
        (
            "llama",
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 7.0}},
            ["rope_parameters={'rope_theta': 7.0}", "rope_scaling={'type': 'default'}", "differ"],
        ),
        ("mistral", {"is_causal": False}, ["is_causal=False", "only True is"]),
        ("llama", {"use_cache": None}, ["config.json", "'use_cache'", "correct that field"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["config.json", "layer_types", "correct"]),
        ("llama", {"rope_theta": 0}, ["rope_theta=0", "positive number"]),
        ("llama", {"rms_norm_eps": "1e-6"}, ["rms_norm_eps='1e-6'", "positive number"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window=0", "positive integer"]),
        ("llama", {"sliding_window": "8"}, ["sliding_window='8'", "positive integer"]),
        ("qwen2", {"use_sliding_window": 1}, ["use_sliding_window=1", "true or false"]),
        (
            "qwen2",
            WINDOW | {"max_window_layers": "1"},
            ["max_window_layers='1'", "integer"],
        ),
        (
            "qwen2",
            WINDOW | {"layer_types": ["sliding_attention"]},
            ["layer_types has 1 entries", "num_hidden_layers=2"],
        ),
        (
            "qwen2",
            WINDOW | {"layer_types": ["chunked_attention"] * 2},
            ["'chunked_attention'", "'full_attention' and 'sliding_attention'"],
        ),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 0.5}}, ["rope_scaling=", "at least 1"]),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 5}}, ["below high_freq_factor"]),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": None}}, ["high_freq_factor"]),
        ("llama", {"rope_scaling": LLAMA3 | {"beta_fast": 32}}, ["beta_fast", "not implemented"]),
        ("llama", {"rope_scaling": LLAMA3, "rope_parameters": YARN}, ["'yarn'", "not implemented"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "only 'def"]),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sli"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu' is"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ("llama", {"num_key_value_heads": 2}, ["num_key_value_heads=2", "attention_heads=9"]),
        ("llama", {"head_dim": 5}, ["head_dim=5", "odd"]),
        ("mistral", {"head_dim": None}, ["num_attention_heads=6", "hidden_size=40"]),
        ("llama", {"head_dim": "8"}, ["head_dim='8'", "positive integer"]),
        ("qwen2", {"num_key_value_heads": None}, ["num_key_value_heads=None", "positive"]),
        ("llama", {"intermediate_size": 0}, ["intermediate_size=0", "positive integer"]),
        ("llama", {"attention_bias": "yes"}, ["attention_bias='yes'", "true or false"]),
        ("llama", {"vocab_size": 62}, [EMBEDDING, "(61, 36)", "(62, 36)"]),
        ("llama", {"num_hidden_layers": 3}, ["model.layers.2.", "is missing", "Llama"]),
        ("llama", {"num_hidden_layers": 1}, ["model.layers.1.", "belongs to no Llama weight"]),
        ("llama", {"mlp_bias": False}, ["mlp.down_proj.bias", "correct mlp_bias in"]),
        ("llama", {"attention_bias": False}, ["self_attn.", "correct attention_bias in"]),
        ("llama", {"tie_word_embeddings": True}, ["lm_head.weight differs", "tie_word_embeddings"]),
        ("qwen2", {"tie_word_embeddings": False}, [HEAD, "is missing", "tie_word_embeddings"]),
        ("llama", {"vocab_size": 60}, [EMBEDDING, "(61, 36)"]),
    ],
)
def test_configs_that_do_not_fit_are_explained(kind, fields, fragments, tmp_path, saved):
    folder = shutil.copytree(saved[kind], tmp_path / kind)
    edit_config(folder, **fields)
    assert_refused(folder, folder, *fragments)


@pytest.mark.parametrize("field", ["hidden_size", "max_position_embeddings", "model_type"])
def test_a_field_that_is_missing_is_named(folder, field):
    drop_field(folder, field)
    assert_refused(folder, folder / "config.json", f"'{field}' is missing")


@pytest.mark.parametrize(
    ("edit", "fragments"),
    [
        (lambda s: s.pop("model.norm.weight"), ["model.norm.weight is missing", "no complete"]),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": np.ones(10, "f4")}),
            ["self_attn.q_norm.weight belongs to no Llama weight"],
        ),
        (
            lambda s: s.update({n: s[n].T.copy() for n in s if n.endswith("gate_proj.weight")}),
            ["layers.0.mlp.gate_proj.weight", "(36, 72)", "(72, 36)"],
        ),
        (
            lambda s: s.update({HEAD: np.ones((61, 36), np.int8)}),
            [HEAD, "int8", "not quantised"],
        ),
        (
            lambda s: s.update({"embed_tokens.weight": s[EMBEDDING]}),
            [EMBEDDING, "embed_tokens.weight", "the same tensor"],
        ),
    ],
    ids=["missing", "left over", "transposed", "quantised", "twice"],
)
def test_tensors_that_do_not_fit_are_named(folder, edit, fragments):
    edit_state(folder, edit)
    assert_refused(folder, folder / "model.safetensors", *fragments)


def test_a_missing_shard_and_a_tensor_missing_from_the_shards_are_named(folder):
    edit_state(folder, lambda s: s.pop("model.norm.weight"))
    first, second = shard(folder)
    index = folder / "model.safetensors.index.json"
    assert_refused(folder, index, "model.norm.weight", "is missing")
    names = json.loads(index.read_text())["weight_map"]
    part = {"weight_map": {name: file for name, file in names.items() if file == first.name}}
    index.write_text(json.dumps(part))  # of one shard of two
    assert_refused(folder, index, "is missing")
    index.write_text(json.dumps({"weight_map": names}))
    second.unlink()
    assert_refused(folder, second, "shard is missing")


@pytest.mark.parametrize("shards", [{}, {"a": 1}, {"a": None}, ["model.safetensors"], None])
def test_an_index_without_shards_is_named(folder, shards):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert_refused(folder, index, "has no weight_map")


def test_numbers_that_numpy_does_not_have_are_named(folder):
    """The header of a safetensors file: its length, then JSON; the numbers are bytes here."""
    path = folder / "model.safetensors"
    header = json.dumps({HEAD: {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    assert_refused(folder, path, HEAD, "F8_E4M3 numbers", "not quantised")


def test_numbers_beyond_float32_are_named_and_nothing_else_is_said(folder):
    edit_state(folder, lambda s: s.update({HEAD: np.full((61, 36), 1e300)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(folder, folder / "model.safetensors", HEAD, "not finite")


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_state(folder, lambda s: s.update({name: np.ones(5, np.float32)}))
    assert hub.load_model(str(folder)).config.num_layers == 2


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder):
    tokens = load_tokenizer(folder)
    tokens.add_tokens(["one more"])
    tokens.save_pretrained(folder)
    assert_refused(folder, folder, "62 tokens", "vocab_size=61")


@pytest.mark.parametrize(("template", "count"), [("$A", 0), ("<s> $A </s>", 1), ("$A </s>", 0)])
def test_the_start_token_of_a_tokenizer_stands_before_every_text(
    template, count, tmp_path, saved, monkeypatch
):
    folder = shutil.copytree(saved["llama"], tmp_path / "llama")
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    plain = sorted(word for word in vocabulary if word.startswith("w"))
    (start, end), words = plain[-2:], " ".join(plain[:3])
    template = template.replace("<s>", start).replace("</s>", end)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    tokenizer.save_pretrained(folder)
    settings = load_config("llama")
    settings.model.source = str(folder)
    settings = parse_config(settings)
    policy = load_policy(settings)
    bare = policy.tokenizer.encode(words, add_special_tokens=False)
    expected = [vocabulary[start]] * count + bare
    assert len(bare) == 3
    assert policy.encode(words) == expected
    assert policy.encode("") == []
    task = Task("echo", {"text": ""}, "{text}", (), None)
    (item,) = rollouts.encode(policy, task, [Example(words, {})])
    np.testing.assert_array_equal(item.tokens, expected)
    # Given the start token, the first word has a likelihood too.
    tokens, scored = adaptation.encode(policy, words, settings.search)
    np.testing.assert_array_equal(tokens, expected)
    assert scored.sum() == 2 + count


# A run


def test_a_qwen2_is_trained_adapted_and_exported_by_the_same_functions(tmp_path):
    tokenizer = load_tokenizer(hub.BUILTIN)
    shape = llama.Config(
        vocab_size=2048, context_length=256, width=32, inner=48, num_layers=1, head_dim=8,
        num_heads=4, num_kv_heads=2, tied=False,
    )  # fmt: skip
    params = jax.device_get(llama.init_params(jax.random.key(0), shape))
    hub.save_model(tmp_path / "model", shape, params, tokenizer)
    config = load_config("llama")
    changes = {
        "model.source": str(tmp_path / "model"),
        "adapter.sites": ("self_attn.o_proj", "mlp.down_proj"),
        "data.max_samples": 8,
        "data.heldout_samples": 2,
        "data.tasks": ("general",),
        "train.max_steps": 1,
        "train.batch_size": 16,
        "train.warmup_steps": 0,
        "train.eval_samples": 1,
        "generation.max_new_tokens": 4,
        "search.generations": 2,
        "cem.population_size": 4,
        "cem.elite_ratio": 0.5,
    }
    config.update_from_flattened_dict(changes)
    training.train(config, tmp_path / "run")
    run = adaptation.load_run(tmp_path / "run")
    # floor(0.8 * 32) of the singular values of both maps; AdamW's first step is about its rate.
    assert [x.shape for x in run.offsets.values()] == [(25,)] * 2
    assert all(np.abs(x).max() > 1e-3 for x in run.offsets.values())
    found = adaptation.adapt(run, "Review: The soup was cold, but the waiter was kind.")
    assert found.search.generations == 2
    assert found.returned in ("mean", "start")
    exported = export.export_model(tmp_path / "run", tmp_path / "exported")
    assert exported.difference < 1e-4
    merged = load_file(exported.folder / "model.safetensors")
    assert merged.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    assert merged["lm_head.weight"].shape == (2048, 32)
    assert json.loads((exported.folder / "config.json").read_text())["model_type"] == "qwen2"


def test_sites_of_gpt2_on_a_llama_name_the_config_with_its_own():
    sites = llama.build(llama.config_from_hf(BIASED, "case")).sites
    with pytest.raises(InputError, match=r"'attn.c_proj': is no .*mlp.up_proj.*--config llama has"):
        adapters.select_sites(sites, ["attn.c_proj"])
    gpt2 = hub.load_outline("random:gpt2").build().sites
    with pytest.raises(InputError, match=r"choose from attn.c_attn, .*mlp.c_proj\.$"):
        adapters.select_sites(gpt2, ["self_attn.o_proj"])
