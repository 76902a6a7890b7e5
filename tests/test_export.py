"""Export: what the folder holds and computes, its model card, the Hub, and mistakes."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from grpocem_jax import adapters
from grpocem_jax.adaptation import load_run
from grpocem_jax.export import command, peft, screens
from grpocem_jax.export import model as export
from grpocem_jax.models import base as models
from grpocem_jax.models import conversion, hub, llama, tokenizer
from grpocem_jax.runs import checkpoints
from grpocem_jax.utils import files
from grpocem_jax.utils.errors import InputError
from tests.parity import bases, weights
from tests.runs import (
    PROMPT,
    ROOT,
    SUMMARY,
    random_offsets,
    tiny_policy,
    write_trained,
)

pytestmark = pytest.mark.usefixtures("one_policy")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """One export for all tests; not to be changed."""
    return export.export_model(workdir, tmp_path_factory.mktemp("exports") / "model")


def logits(params, offsets, model, length=24):
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, length)

    @jax.jit
    def compute(params, offsets):
        hidden = model.forward(params, offsets, tokens, jnp.ones(length, bool))
        return model.logits(params, hidden)

    return np.asarray(compute(params, offsets))


def logits_of(folder):
    loaded = hub.load_model(str(folder))
    return logits(models.cast_params(loaded.params, jnp.float32), {}, loaded.build())


# The folder


def test_the_folder_holds_model_tokenizer_card_and_adapter(exported):
    names = {path.name for path in exported.folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "README.md", "adapter"}
    offsets = {path.name for path in (exported.folder / "adapter").iterdir()}
    assert offsets == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert [path.name for path in exported.folder.parent.iterdir()] == ["model"]


def test_only_adapted_kernels_change_and_they_are_scaled_singular_values(exported, run):
    """W' = W + U_k diag(s_k * offset) V_k^T, here in float64 from numpy's own decomposition."""
    merged = load_file(exported.folder / "model.safetensors")
    base = load_file(hub.BUILTIN / "model.safetensors")
    assert merged.keys() == base.keys()  # so the tied head is not there a second time
    assert not any("lm_head" in name for name in merged)
    for name, kernel in base.items():
        assert merged[name].dtype == np.float32
        site = name.removeprefix("transformer.").removesuffix(".weight")
        if site not in run.offsets:
            np.testing.assert_array_equal(merged[name], kernel, err_msg=name)
            continue
        offsets = np.asarray(run.offsets[site], np.float64)
        k = len(offsets)
        u, s, vt = np.linalg.svd(kernel.astype(np.float64))
        change = (u[:, :k] * (s[:k] * offsets)) @ vt[:k]
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(merged[name], kernel + change, atol=2e-6, err_msg=name)


def test_logits_are_those_of_base_model_and_adapter(exported, run):
    policy = run.policy
    expected = logits(policy.params, run.offsets, policy.model)
    assert np.abs(logits_of(exported.folder) - expected).max() < 1e-4
    assert np.abs(logits_of(hub.BUILTIN) - expected).max() > 0.1
    assert 0 < exported.difference < 1e-4


def test_the_saved_adapter_gives_the_same_logits_on_its_base_and_no_other(exported, run):
    policy = run.policy
    folder, sha256 = exported.folder / "adapter", policy.pretrained.sha256
    loaded = checkpoints.load_adapter(folder, policy.zero, base_sha256=sha256)
    expected = logits(policy.params, run.offsets, policy.model)
    np.testing.assert_array_equal(logits(policy.params, loaded, policy.model), expected)
    merged = hub.load_model(str(exported.folder)).sha256
    assert merged != sha256
    with pytest.raises(InputError, match="whose weights are not those of this model"):
        checkpoints.load_adapter(folder, policy.zero, base_sha256=merged)


def test_tokenizer_and_stop_tokens_are_those_of_the_run(exported, run):
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer.encode(PROMPT) == run.policy.tokenizer.encode(PROMPT)
    assert tokenizer.eos_token_id == run.policy.tokenizer.eos_token_id
    generation = GenerationConfig.from_pretrained(exported.folder)
    (comma,) = tokenizer.encode(",")
    assert sorted(generation.eos_token_id) == sorted([tokenizer.eos_token_id, comma])
    assert generation.pad_token_id == tokenizer.eos_token_id


def test_a_run_in_bfloat16_is_exported_in_float32(exported, tmp_path):
    """From rounded factors the kernels would differ by about 2**-8 of their size."""
    workdir = write_trained(tmp_path / "run", changes={"model.dtype": "bfloat16"})
    again = export.export_model(workdir, tmp_path / "model")
    found, expected = (load_file(x.folder / "model.safetensors") for x in (again, exported))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_another_adapter_of_the_same_model_is_merged_instead(workdir, exported, run, tmp_path):
    other = write_trained(tmp_path / "other", offsets=random_offsets(run.policy.zero, seed=2))
    found = export.export_model(workdir, tmp_path / "a" / "model", adapter=other / "adapter")
    expected = logits(run.policy.params, load_run(other).offsets, run.policy.model)
    assert np.abs(logits_of(found.folder) - expected).max() < 1e-4
    assert np.abs(logits_of(exported.folder) - expected).max() > 0.01
    card = (found.folder / "README.md").read_text()
    assert "no held-out reward was measured" in card
    assert "0.375" not in card
    assert (found.folder / "adapter" / "README.md").read_text() == "An adapter for tests."


def test_an_adapter_without_a_model_card_is_copied_without_one(workdir, tmp_path):
    bare = shutil.copytree(workdir / "adapter", tmp_path / "bare")
    (bare / "README.md").unlink()
    checkpoints.copy_adapter(bare, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}


# What the base model brings along


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Writes a base model and a run on it: `bases.write_base`, with fields of its files."""

    def make(case="llama", changes=None, **files):
        folder, base = tmp_path_factory.mktemp("made"), bases.BASES[case]
        bases.write_base(folder / "base", base, **files)
        bases.write_run(folder / "run", folder / "base", base.sites, **(changes or {}))
        return folder

    return make


@pytest.fixture(scope="module")
def half(make):
    """A Llama in bfloat16 and its export; not to be changed."""
    folder = make()
    export.export_model(folder / "run", folder / "out")
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def in_float64(array):
    return np.asarray(array, np.float32).astype(np.float64)


def adapted_kernels(folder):
    """By tensor of the checkpoint the kernel ``[in, out]`` and its change, by numpy in float64."""
    loaded = load_run(folder / "run")
    pretrained = loaded.policy.pretrained
    names = {
        t.path: n for n, t in pretrained.architecture.layout(pretrained.config).tensors.items()
    }
    for site, path in loaded.policy.sites.items():
        kernel = in_float64(adapters.get(pretrained.params, path))
        offsets = in_float64(loaded.offsets[site])
        u, s, vt = np.linalg.svd(kernel)
        k = len(offsets)
        yield names[path], kernel, u[:, :k], s[:k] * offsets, vt[:k]


def test_weights_in_bfloat16_stay_so_and_are_rounded_once(half):
    base, merged = (load_file(half / part / "model.safetensors") for part in ("base", "out"))
    sizes = [(half / part / "model.safetensors").stat().st_size for part in ("base", "out")]
    assert sizes[0] == sizes[1]
    adapted = set()
    for name, kernel, u, change, vt in adapted_kernels(half):
        adapted.add(name)
        exact = (kernel + (u * change) @ vt).T
        # 8 bits of a significand: half a unit in the last place is 2^-8 of the number at most.
        error = np.abs(in_float64(merged[name]) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 1e-6).all()
        assert error.max() > 1e-6
    for name, x in base.items():
        assert merged[name].dtype == x.dtype == jnp.bfloat16
        if name not in adapted:
            np.testing.assert_array_equal(merged[name], x, err_msg=name)


def test_what_rounding_does_to_the_logits_is_measured_and_said(half):
    """Against weights rounded here; in float32 the same export is as exact as ever."""
    loaded = load_run(half / "run")
    exact = logits(loaded.policy.params, loaded.offsets, loaded.policy.model)
    plain = hub.load_model(str(half / "base"))
    record = read(half / "out", "export")
    assert record["dtype"] == "bfloat16"
    assert 1e-3 < record["rounding"] < record["effect"] / 10
    assert record["difference"] == pytest.approx(record["rounding"], abs=1e-3)
    found = np.abs(logits_of(half / "out") - exact).max()
    assert record["rounding"] / 4 < found < 4 * record["rounding"]
    moved = np.abs(logits(models.cast_params(plain.params, jnp.float32), {}, plain.build()) - exact)
    assert record["effect"] / 4 < moved.max() < 4 * record["effect"]
    card = (half / "out" / "README.md").read_text()
    assert f"rounding to bfloat16 makes {record['rounding']:.2g}" in card
    exported = export.export_model(half / "run", half / "exact", dtype="float32")
    assert exported.difference < 1e-4
    assert exported.rounding == 0
    assert {x.dtype for x in load_file(half / "exact" / "model.safetensors").values()} == {
        np.dtype(np.float32)
    }
    assert read(half / "exact", "config")["dtype"] == "float32"
    assert read(half / "base", "config")["dtype"] == "bfloat16"


def test_each_tensor_keeps_the_dtype_that_it_has_in_the_base(make):
    """Norms in float32 beside matrices in bfloat16, under names without a prefix."""
    folder = make(tokenizer_config={"chat_template": None})
    path = folder / "base" / "model.safetensors"
    mixed = {
        name.removeprefix("model."): x.astype(np.float32) if x.ndim == 1 else x
        for name, x in load_file(path).items()
    }
    save_file(mixed, path)
    export.export_model(folder / "run", folder / "out")
    merged = load_file(folder / "out" / "model.safetensors")
    for name, x in merged.items():
        assert x.dtype == (np.float32 if x.ndim == 1 else jnp.bfloat16), name
    assert "model.norm.weight" in merged


def test_a_tied_head_in_place_of_the_embedding_has_its_dtype():
    fields = weights.LLAMAS["llama-tied"]
    config = llama.config_from_hf(fields, "case")
    state = {name: x.astype(np.float16) for name, x in weights.state(fields).items()}
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight").astype(np.float64)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    state["module.model.layers.1.wrapped.mlp.up_proj.weight"] = state.pop(
        "model.layers.1.mlp.up_proj.weight"
    )
    dtypes = conversion.stored_dtypes(state, llama.layout(config))
    assert dtypes.pop("model.embed_tokens.weight") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.float16)}
    assert len(dtypes) == len(weights.state(fields)) - 1


def test_weights_that_are_too_large_for_float16_are_refused(make, tmp_path):
    folder = make("qwen2-untied")
    path = folder / "base" / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"][3] = 70000
    save_file(state, path)
    bases.write_run(folder / "run", folder / "base", ("mlp.up_proj",))
    assert_refused(
        folder / "run", tmp_path / "out", "--dtype=float16", "model.norm.weight", dtype="float16"
    )


def test_config_json_is_the_bases_with_what_others_take_for_granted(half, make):
    base, exported = (read(half / part, "config") for part in ("base", "out"))
    assert base.items() <= exported.items()
    assert exported["eos_token_id"] == [1, 2]
    assert exported["initializer_range"] == 0.03
    assert exported["architectures"] == ["LlamaForCausalLM"]
    folder = make("qwen2-untied", config={"auto_map": {"AutoConfig": "own.Config"}})
    export.export_model(folder / "run", folder / "out")
    base, exported = (read(folder / part, "config") for part in ("base", "out"))
    # transformers 4 knows no rope_parameters, and would take a base of 10,000.
    assert base["rope_parameters"] == {"rope_type": "default", "rope_theta": 30.0}
    assert base["rope_theta"] == 100.0
    assert exported["rope_theta"] == 30.0
    assert not exported.keys() & {"rope_parameters", "rope_scaling", "auto_map"}


def test_a_gpt2_says_its_context_in_every_name_for_it(exported):
    config = read(exported.folder, "config")
    assert config["n_positions"] == config["n_ctx"] == 128


NO_END = {
    "config": {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None},
    "generation_config": None,
    "tokenizer_config": {"eos_token": None, "pad_token": None, "bos_token": None},
}


@pytest.mark.parametrize(
    ("files", "changes", "expected"),
    [
        ({}, {}, bases.GENERATION),
        ({}, {"generation.stop": ("w9",)}, bases.GENERATION | {"eos_token_id": [1, 2, 9]}),
        # transformers refuses to write what it reads: settings of sampling without sampling.
        (
            {"generation_config": {"do_sample": False, "_from_model_config": True}},
            {},
            bases.GENERATION | {"do_sample": False},
        ),
        (
            {"generation_config": None, "config": {"temperature": 0.4, "eos_token_id": 2}},
            {},
            {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3, "temperature": 0.4},
        ),
        ({"generation_config": {"eos_token_id": None}}, {}, bases.GENERATION),
        (NO_END, {}, {}),
        (NO_END, {"generation.stop": ("w9",)}, {"eos_token_id": [9], "pad_token_id": 9}),
    ],
    ids=["kept", "stop", "odd", "config", "no end in it", "no end", "only a stop"],
)
def test_generation_settings_are_the_bases_with_the_runs_stop_tokens(
    files, changes, expected, make
):
    folder = make(changes=changes, **files)
    found = export._generation_config(load_run(folder / "run"), folder / "base")
    assert found == expected


def test_tokenizer_files_and_templates_are_copied_as_they_are(make):
    folder = make(tokenizer_config={"chat_template": None})
    templates = folder / "base" / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    (folder / "base" / "chat_template.jinja").write_text(bases.TEMPLATE)
    (folder / "base" / "pytorch_model.bin").touch()
    export.export_model(folder / "run", folder / "out")
    for name in (
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "additional_chat_templates/rag.jinja",
    ):
        assert (folder / "out" / name).read_bytes() == (folder / "base" / name).read_bytes()
    assert not (folder / "out" / "pytorch_model.bin").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer.chat_template == {"default": bases.TEMPLATE, "rag": "{{ messages }}"}


def test_what_only_transformers_5_writes_is_put_as_transformers_4_has_it(half, tmp_path):
    source = tmp_path / "five"
    five = AutoTokenizer.from_pretrained(half / "base")
    five.save_pretrained(source)
    assert read(source, "tokenizer_config")["tokenizer_class"] == "TokenizersBackend"
    (tmp_path / "out").mkdir()
    tokenizer.copy_tokenizer(source, tmp_path / "out")
    config = read(tmp_path / "out", "tokenizer_config")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<turn>"]
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.extra_special_tokens == five.extra_special_tokens == ["<turn>"]
    text = "w7<turn>w9 other"
    assert again.encode(text) == five.encode(text) == [0, 7, 4, 9, 5]
    named = {"tokenizer_class": "Own", "model_specific_special_tokens": {"think_token": "w8"}}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer.copy_tokenizer(source, tmp_path / "out")
    assert read(tmp_path / "out", "tokenizer_config") == {
        "tokenizer_class": "Own",
        "extra_special_tokens": {"think_token": "w8"},
    }


def test_random_weights_are_exported_in_float32_whatever_their_config_says(half, tmp_path):
    bases.write_run(tmp_path / "run", f"random:{half / 'base'}", ("self_attn.o_proj",))
    export.export_model(tmp_path / "run", tmp_path / "out")
    assert read(tmp_path / "out", "config")["dtype"] == "float32"
    dtypes = {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {np.dtype(np.float32)}


# A LoRA


def lora_changes(folder):
    """By module of transformers' model, what PEFT adds to the kernel ``[in, out]``."""
    config, arrays = read(folder, "adapter_config"), load_file(folder / "adapter_model.safetensors")
    changes = {}
    for name in sorted(arrays):
        module, part = name.removesuffix(".weight").rsplit(".", 1)
        assert arrays[name].dtype == np.float32
        if part == "lora_A":
            a, b = arrays[name], arrays[f"{module}.lora_B.weight"]
            assert (len(a), b.shape[1]) == (config["r"], config["r"])
            scale = config["lora_alpha"] / config["r"]
            changes[module.removeprefix("base_model.model.")] = scale * (in_float64(b @ a).T)
    return config, changes


@pytest.mark.parametrize("case", ["gpt2", "llama-biases"])
def test_a_lora_of_full_rank_is_the_change_of_the_weights(case, make):
    """Of GPT-2 two maps of every layer; of the Llama maps with sides of 36, 30 and 72."""
    folder = make(case)
    found = export.export_model(folder / "run", folder / "lora", format="peft")
    config, changes = lora_changes(folder / "lora")
    assert found.rank == config["r"] == {"gpt2": 40, "llama-biases": 36}[case]
    assert found.difference < 1e-4
    assert found.effect > 1
    assert found.kept == pytest.approx(1)
    expected = {
        name.removesuffix(".weight"): (u * change) @ vt
        for name, _, u, change, vt in adapted_kernels(folder)
    }
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(changes[name], change, atol=1e-5, err_msg=name)
    gpt2 = case == "gpt2"
    assert config["fan_in_fan_out"] == gpt2
    assert config["target_modules"] == (
        ["attn.c_proj", "c_attn"] if gpt2 else ["down_proj", "k_proj"]
    )
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")


def test_a_lora_of_a_lower_rank_keeps_the_largest_changes_of_singular_values(half):
    """The squares of the s_i o_i left out are the squared distance, and no rank 4 comes closer."""
    found = export.export_model(half / "run", half / "lora4", format="peft", rank=4)
    config, changes = lora_changes(half / "lora4")
    assert config["r"] == 4
    lost = total = 0.0
    for name, _, u, change, vt in adapted_kernels(half):
        left_out = np.sort(np.abs(change))[:-4]
        distance = np.linalg.norm(changes[name.removesuffix(".weight")] - (u * change) @ vt)
        assert distance == pytest.approx(np.linalg.norm(left_out), rel=1e-4)
        lost, total = lost + np.sum(left_out**2), total + np.sum(change**2)
    assert found.kept == pytest.approx(np.sqrt(1 - lost / total), rel=1e-4)
    assert 0.1 < found.difference < found.effect
    record = read(half / "lora4", "export")
    assert (record["format"], record["rank"]) == ("peft", 4)
    assert record["difference"] == found.difference
    card = huggingface_hub.ModelCard.load(half / "lora4" / "README.md")
    assert card.data.library_name == "peft"
    assert f"its logits differ by at most {found.difference:.2g}" in card.text
    assert "PeftModel.from_pretrained(model, FOLDER)" in card.text


def test_the_screen_says_rank_and_error_of_a_lora():
    result = export.Exported(export.Path("lora"), 0.25, None, 2.0, rank=8, kept=0.875)
    lines = screens.exported(result).splitlines()
    assert lines[0] == "lora      rank 8, 87.50% of the change of the weights"
    assert "differ by at most 2.5e-01" in lines[1]
    assert "the adapter moves them by at most 2.0e+00" in lines[2]
    assert "AutoPeftModelForCausalLM.from_pretrained('lora')" in lines[3]


def test_the_screen_says_where_rounding_drowns_the_adapter():
    small = export.Exported(export.Path("out"), 0.02, None, 0.1, "bfloat16", rounding=0.02)
    assert "bfloat16; the adapter was merged in float32 and the result" in screens.exported(small)
    assert "--dtype=float32" in screens.exported(small)
    assert "--dtype=float32" not in screens.exported(small._replace(effect=1.0))


def test_a_stop_string_of_several_tokens_is_said_to_be_left_out(run):
    generation = dataclasses.replace(run.config.generation, stop=(",", "Review: The"))
    long = run._replace(config=dataclasses.replace(run.config, generation=generation))
    (line,) = [x for x in screens.exporting(long, export.Path("a")).splitlines() if "stop" in x]
    assert line.startswith("stop      'Review: The' is several tokens")
    assert "stop_strings" not in screens.exporting(long, export.Path("a"), lora=True)


def test_a_lora_whose_logits_are_no_numbers_is_not_kept(half, monkeypatch):
    factor = peft.factor
    monkeypatch.setattr(
        peft, "factor", lambda *given: factor(*given)._replace(b=factor(*given).b * np.nan)
    )
    assert_refused(half / "run", half / "none", "rank 2", "differ by nan", format="peft", rank=2)


def test_targets_are_the_shortest_ends_that_name_nothing_else():
    every = [f"h.{i}.{x}" for i in (1, 11) for x in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    assert peft.target_modules(["h.1.mlp.c_fc", "h.11.mlp.c_fc"], every) == ["c_fc"]
    assert peft.target_modules([x for x in every if "attn" in x], every) == ["attn.c_proj"]
    assert peft.target_modules(["h.1.mlp.c_fc"], every) == ["1.mlp.c_fc"]
    assert peft.target_modules(every, every) == ["c_fc", "c_proj"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"format": "gguf"}, ["--format=gguf", "merged, peft"]),
        ({"format": "peft", "rank": 0}, ["--rank=0", "from 1 to 128"]),
        ({"format": "peft", "rank": -3}, ["--rank=-3", "from 1 to 128"]),
        ({"format": "peft", "rank": 129}, ["--rank=129", "from 1 to 128"]),
        ({"format": "peft", "dtype": "bfloat16"}, ["--dtype=bfloat16", "--format=merged"]),
        ({"rank": 4}, ["--rank=4", "--format=peft"]),
        ({"dtype": "int8"}, ["--dtype=int8", "float32, bfloat16, float16"]),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(
    options, parts, workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "attach", None)
    assert_refused(workdir, tmp_path / "out", *parts, **options)


def test_a_merge_that_changes_a_bias_is_no_lora(workdir, tmp_path, monkeypatch):
    merge = adapters.merge_params

    def shifted(*args):
        params = merge(*args)
        block = params["h_2"]
        linear = block["mlp_c_fc"]
        linear = {**linear, "bias": linear["bias"] + 0.5}
        return {**params, "h_2": {**block, "mlp_c_fc": linear}}

    monkeypatch.setattr(adapters, "merge_params", shifted)
    assert_refused(workdir, tmp_path / "out", "h.2.mlp.c_fc.bias", "--format=merged", format="peft")


def test_a_site_that_is_no_linear_map_of_transformers_is_no_lora(run):
    pretrained = run.policy.pretrained
    layout = pretrained.architecture.layout(pretrained.config)
    for site, path in {"wte": ("wte",), "own": ("h_0", "own", "kernel")}.items():
        with pytest.raises(InputError, match=f"'{site}' is no linear map .*--format=merged"):
            peft.modules({site: path}, layout)


def test_random_weights_are_no_base_of_a_lora(half, tmp_path):
    source = f"random:{half / 'base'}"
    bases.write_run(tmp_path / "run", source, ("self_attn.o_proj",))
    assert_refused(tmp_path / "run", tmp_path / "out", source, "--format=merged", format="peft")


# The model card


def test_the_card_has_the_hubs_metadata_and_the_rewards_of_the_summary(exported):
    card = huggingface_hub.ModelCard.load(exported.folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a path or "builtin" is no name on the Hub
    assert card.data.license is None
    assert "| qa | 0.125 | 0.375 | +0.250 [+0.125, +0.500] | 7 |" in card.text
    assert "| qa | 0.125 | 0.875 |" in card.text
    assert "408 scales of singular values (attn.c_proj)" in card.text
    assert "trained with GRPO for 11 steps" in card.text


def test_the_card_names_a_base_model_from_the_hub(workdir, run):
    pretrained = dataclasses.replace(run.policy.pretrained, kind="hub", source="some-org/tiny")
    policy = dataclasses.replace(run.policy, pretrained=pretrained)
    text = export._card(run._replace(policy=policy), workdir / "summary.json", own_adapter=True)
    assert huggingface_hub.ModelCard(text).data.base_model == "some-org/tiny"


def test_the_card_says_what_was_built_in_or_random(exported, run, tmp_path):
    card = (exported.folder / "README.md").read_text()
    assert "base model is the tiny one that comes with grpocem_jax" in card
    assert "The data of qa are templates" in card
    assert "random" not in card
    path = tmp_path / "summary.json"
    summary = {**SUMMARY, "builtin_model": False, "random_weights": True, "builtin_data": {}}
    path.write_text(json.dumps(summary))
    card = export._card(run, path, own_adapter=True)
    assert "weights are random" in card
    assert "templates" not in card
    assert "tiny one" not in card


# Mistakes


def assert_refused(workdir, out, *parts, **options):
    """One sentence with these parts, and nothing at ``out`` or beside it."""
    there = set(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(InputError) as error:
        export.export_model(workdir, out, **options)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert (set(out.parent.iterdir()) if out.parent.is_dir() else None) == there


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_refused_before_any_work(kind, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_run", None)
    out = tmp_path / "model"
    make = {
        "folder": out.mkdir,
        "file": out.touch,
        "link": lambda: out.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    assert_refused(workdir, out, f"--out={out}", "exists already")


def test_a_folder_inside_a_file_is_refused(workdir, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "model"
    assert_refused(workdir, out, f"--out={out}", "cannot be written", "Not a directory")


def test_a_folder_that_cannot_be_made_is_refused(workdir, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.Path, "mkdir", refuse)
    assert_refused(workdir, tmp_path / "model", "cannot be written", "Permission denied")


@pytest.mark.parametrize("where", ["weights", "tokenizer", "adapter"])
def test_a_full_disk_leaves_nothing_half_written(where, workdir, tmp_path, monkeypatch):
    full = os.strerror(errno.ENOSPC)

    errors = {  # what safetensors and Python raise
        "weights": SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)"),
        "tokenizer": OSError(errno.ENOSPC, full, "file"),
        "adapter": OSError(errno.ENOSPC, full, "file"),
    }

    def refuse(*args, **kwargs):
        raise errors[where]

    if where == "weights":
        monkeypatch.setattr(files, "save_file", refuse)
    elif where == "tokenizer":
        monkeypatch.setattr(export.tokenizers, "copy_tokenizer", refuse)
    else:
        monkeypatch.setattr(checkpoints, "copy_adapter", refuse)
    assert_refused(workdir, tmp_path / "model", "--out=", full)


def test_a_merge_that_changes_the_logits_is_not_kept(workdir, tmp_path, monkeypatch):
    merge = adapters.merge_params

    def wrong(method, params, offsets, sites):
        return merge(method, params, jax.tree.map(lambda x: 1.05 * x, offsets), sites)

    monkeypatch.setattr(adapters, "merge_params", wrong)
    assert_refused(workdir, tmp_path / "model", "logits", "in float32", "more than 0.001")


def test_an_adapter_that_is_not_finite_is_not_kept(tmp_path):
    offsets = jax.tree.map(lambda x: x.at[0].set(jnp.nan), tiny_policy()[0].zero)
    workdir = write_trained(tmp_path / "run", offsets=offsets)
    assert_refused(workdir, tmp_path / "model", "h.0.attn.c_proj", "not finite")


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    workdir = write_trained(tmp_path / "run", base_sha256="0" * 64)
    assert_refused(workdir, tmp_path / "model", "whose weights are not those of this model")


@pytest.mark.parametrize(
    "changes",
    [{"adapter.rank_ratio": 0.5}, {"adapter.sites": ("h.0.attn.c_proj",)}],
    ids=["rank", "sites"],
)
def test_an_adapter_of_other_ranks_or_sites_is_refused(changes, tmp_path):
    workdir = write_trained(tmp_path / "run", changes=changes)
    assert_refused(workdir, tmp_path / "model", "does not fit this model")


def test_another_adapter_made_with_other_settings_is_refused(workdir, tmp_path):
    """Its arrays have the same names and shapes, but it means another model."""
    other = write_trained(tmp_path / "other", tail="drop") / "adapter"
    assert_refused(
        workdir, tmp_path / "model", "tail='drop', but config.adapter has 'keep'", adapter=other
    )


def test_a_run_without_adapter_or_summary_is_refused(workdir, tmp_path):
    assert_refused(tmp_path, tmp_path / "model", f"--workdir={tmp_path}", "no trained adapter")
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "summary.json").write_text('{"steps": 3')
    assert_refused(copy, tmp_path / "model", "summary.json", "model card")
    (copy / "summary.json").write_text('{"steps": 3}')
    assert_refused(copy, tmp_path / "model", "summary.json", "model card")
    (copy / "summary.json").unlink()
    assert_refused(copy, tmp_path / "model", "summary.json", "model card")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"workdir": None, "out": "model"}, "--workdir is missing"),
        ({"workdir": "run", "out": None}, "--out is missing"),
        ({"workdir": "run", "out": "model", "private": True}, "--private is for the Hub"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        command.run(**flags)


# The Hub


class FakeHub:
    """Stands for `huggingface_hub.HfApi` and remembers what it is asked."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repository, *, private=None):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repository, private))
        return types.SimpleNamespace(repo_id=repository)

    def upload_folder(self, *, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(x.name for x in folder_path.iterdir())))


@pytest.fixture
def push(workdir, exported, tmp_path, monkeypatch):
    """The command with ``--push_to_hub=me/tiny``, a token, and an export that is there already."""

    def call(hub=None, token="hf_token", **flags):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        monkeypatch.setattr(command, "export_model", lambda *args, **kwargs: exported)
        given = {"workdir": str(workdir), "out": str(tmp_path / "model"), "repository": "me/tiny"}
        return command.run(**{**given, **flags})

    return call


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_is_pushed_after_it_is_whole(private, push, exported):
    fake = FakeHub()
    push(fake, private=private)
    create, upload = fake.calls
    assert create == ("create", "me/tiny", True if private else None)
    assert upload == ("upload", "me/tiny", sorted(x.name for x in exported.folder.iterdir()))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"token": None}, ["no token", "hf auth login"]),
        ({"repository": "not a name"}, ["--push_to_hub=not a name", "USER/NAME"]),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(options, parts, push, monkeypatch):
    fake = FakeHub()
    with pytest.raises(InputError) as error:
        push(fake, **options)
    assert all(part in str(error.value) for part in parts)
    assert fake.calls == []


def test_when_the_hub_refuses_the_folder_stays(push, exported):
    error = OSError("409 Client Error: Conflict\n\nYou already created this model repo")
    with pytest.raises(InputError, match="--push_to_hub=me/tiny") as found:
        push(FakeHub(error))
    assert f"hf upload me/tiny {exported.folder}" in str(found.value)
    assert "\n" not in str(found.value)
    assert (exported.folder / "model.safetensors").is_file()


# The command


def test_the_command_needs_no_config_and_prints_the_difference(workdir, tmp_path):
    flags = ["--workdir", workdir, "--out", tmp_path / "model"]
    result = subprocess.run(
        [sys.executable, "-m", "grpocem_jax.export", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "logits    differ by at most" in result.stdout
    assert f"from_pretrained('{tmp_path / 'model'}')" in result.stdout
    assert "the built-in tiny model" in result.stderr
