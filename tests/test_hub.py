"""Checkpoints: what is read, what is written, and the one sentence for each thing that is wrong."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from typing import ClassVar

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from grpocem_jax import adapters
from grpocem_jax.models import gpt2, hub
from grpocem_jax.models.tokenizer import load_tokenizer
from grpocem_jax.utils.errors import InputError
from tests.folders import assert_refused, edit_config, edit_state, shard
from tests.parity import weights
from tests.runs import ROOT

FIELDS = weights.SHAPES["small"]
CONFIG = gpt2.config_from_hf(FIELDS, "small")
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {END: 0, **{f"w{i}": i for i in range(1, CONFIG.vocab_size)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, unk_token=END)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A checkpoint folder as `hub.save_model` writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    params = gpt2.params_from_state(weights.state(FIELDS), CONFIG, "small")
    hub.save_model(folder, CONFIG, params, tokenizer)
    return folder


@pytest.fixture
def folder(tmp_path, saved):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("make", [adapters.lora, adapters.ia3, adapters.svf])
def test_parameters_with_factors_are_saved_merged_or_not_at_all(saved, tmp_path, tokenizer, make):
    pretrained = hub.load_model(str(saved))
    _, params, adapter, sites, zero = adapters.attach(pretrained, make(), ["attn.c_proj"])
    with pytest.raises(InputError, match=r"^params: hold factors .* merge_params"):
        hub.save_model(tmp_path / "model", CONFIG, params, tokenizer)
    assert not (tmp_path / "model").exists()
    merged = adapters.merge_params(adapter, params, zero, sites)
    assert jax.tree.structure(merged) == jax.tree.structure(pretrained.params)
    hub.save_model(tmp_path / "model", CONFIG, merged, tokenizer)


def test_a_config_of_no_model_is_named(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"^config=\{\}: is no config record of a model"):
        hub.save_model(tmp_path / "model", {}, {}, tokenizer)


def assert_loads_the_same(folder):
    expected = weights.state(FIELDS)
    pretrained = hub.load_model(str(folder))
    found = gpt2.params_to_state(pretrained.params, pretrained.config)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    return pretrained


def test_save_and_load_are_inverse_bit_for_bit(saved):
    pretrained = assert_loads_the_same(saved)
    assert pretrained.kind == "folder"
    assert pretrained.source == str(saved)
    assert pretrained.config == CONFIG
    assert pretrained.end_ids == (0,)
    assert pretrained.tokenizer.encode("w5 w60 w1") == [5, 60, 1]
    assert pretrained.tokenizer.decode([5, 60, 1]) == "w5 w60 w1"
    assert pretrained.num_params() == sum(x.size for x in weights.state(FIELDS).values())
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_saving_does_not_depend_on_the_layout_in_memory(tmp_path, tokenizer):
    params = gpt2.params_from_state(weights.state(FIELDS), CONFIG, "small")
    hub.save_model(tmp_path, CONFIG, jax.tree.map(np.asfortranarray, params), tokenizer)
    assert_loads_the_same(tmp_path)


def test_shards_are_joined(folder):
    shard(folder)
    assert_loads_the_same(folder)


def test_the_prefix_may_be_absent(folder):
    edit_state(folder, lambda s: s.update({n.split(".", 1)[1]: s.pop(n) for n in list(s)}))
    assert "wte.weight" in load_file(folder / "model.safetensors")
    assert_loads_the_same(folder)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "base_model.model.{}",
        "module._orig_mod.base_model.model.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_names_of_wrapped_models_are_read(folder, wrapped, bare):
    def rename(state):
        for name in list(state):
            inner = name.split(".", 1)[1] if bare else name
            state[wrapped.format(inner)] = state.pop(name)

    edit_state(folder, rename)
    assert_loads_the_same(folder)


def test_a_wrapper_inside_of_the_model_is_taken_out(folder):
    def rename(state):
        for name in [name for name in state if ".h.1." in name]:
            inside = name.replace(".h.1.", ".h.1._checkpoint_wrapped_module.")
            state[inside] = state.pop(name)

    edit_state(folder, rename)
    assert_loads_the_same(folder)


def test_a_model_wrapped_and_bare_and_one_with_an_adapter_are_named(folder):
    name = "transformer.wpe.weight"
    edit_state(folder, lambda s: s.update({f"module.{name}": s[name]}))
    assert_refused(folder, name, f"module.{name}", "the same tensor")
    edit_state(folder, lambda s: s.pop(f"module.{name}"))
    lora = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    edit_state(folder, lambda s: s.update({lora: np.zeros((1, 40), np.float32)}))
    assert_refused(folder, lora, "has not been merged", "merge_and_unload()")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_mask_buffers_are_passed_over(folder, prefix):
    def add(state):
        for i in range(CONFIG.num_layers):
            state[f"{prefix}h.{i}.attn.bias"] = np.ones((1, 1, 24, 24), bool)
            state[f"{prefix}h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)

    edit_state(folder, add)
    assert_loads_the_same(folder)


def test_an_equal_head_is_passed_over(folder):
    edit_state(folder, lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"]}))
    assert_loads_the_same(folder)


def test_half_precision_checkpoints_become_float32(folder):
    half = weights.state(FIELDS)
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in half.items()}
    save_file(half, folder / "model.safetensors")
    for name, x in gpt2.params_to_state(hub.load_model(str(folder)).params, CONFIG).items():
        np.testing.assert_array_equal(x, half[name].astype(np.float32))


def test_several_end_tokens_and_none(folder):
    edit_config(folder, eos_token_id=[3, 5])
    assert hub.load_model(str(folder)).end_ids == (3, 5)
    edit_config(folder, eos_token_id=None)
    assert hub.load_model(str(folder)).end_ids == ()


@pytest.mark.parametrize(
    ("edit", "fragments"),
    [
        (
            lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"),
            ["h.1.mlp.c_fc.bias", "is missing"],
        ),
        (
            lambda s: s.update({"transformer.h.2.ln_1.weight": s["transformer.ln_f.weight"]}),
            ["transformer.h.2.ln_1.weight", "belongs to no GPT-2 weight"],
        ),
        (
            lambda s: s.update({"score.weight": np.ones((2, 40), np.float32)}),
            ["score.weight", "belongs to no GPT-2 weight"],
        ),
        (
            lambda s: s.update(
                {
                    n: np.ascontiguousarray(s[n].T)
                    for n in s
                    if n.endswith("c_attn.weight")  # as torch.nn.Linear stores it
                }
            ),
            ["h.0.attn.c_attn.weight", "(120, 40)", "(40, 120)"],
        ),
        (
            lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"] + 1}),
            ["lm_head.weight differs from wte.weight"],
        ),
        (
            lambda s: s.update({"wte.weight": s["transformer.wte.weight"] + 1}),
            ["wte.weight and", "transformer.wte.weight", "the same tensor"],
        ),
    ],
    ids=["missing", "another layer", "left over", "transposed", "untied head", "twice"],
)
def test_tensors_that_do_not_fit_are_named(folder, edit, fragments):
    edit_state(folder, edit)
    assert_refused(folder, folder, *fragments)


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"model_type": "bloom"}, ["model_type='bloom'", "gpt2, llama, mistral, qwen2"]),
        ({"model_type": None}, ["model_type='None'"]),
        ({"activation_function": "relu"}, ["activation_function='relu'", "'gelu_new'"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings=False"]),
        ({"n_inner": 100}, ["n_inner=100", "4 * n_embd"]),
        ({"n_head": 7}, ["n_head=7", "n_embd=40"]),
        ({"n_head": 0}, ["n_head=0", "positive integer"]),
        ({"n_layer": "2"}, ["n_layer='2'", "positive integer"]),
        ({"n_layer": 1}, ["transformer.h.1.", "belongs to no GPT-2 weight"]),
        ({"n_layer": 3}, ["h.2.", "is missing"]),
        ({"vocab_size": 60}, ["wte.weight", "(61, 40)", "(60, 40)"]),
    ],
)
def test_configs_that_do_not_fit_are_explained(folder, fields, fragments):
    edit_config(folder, **fields)
    assert_refused(folder, folder, *fragments)


def test_a_config_field_may_not_be_absent(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["n_embd"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_refused(folder, folder / "config.json", "'n_embd' is missing")


@pytest.mark.parametrize(
    ("text", "fragment"), [("{", "cannot be read as JSON"), ("[]", "JSON object")]
)
def test_a_damaged_config_is_named(folder, text, fragment):
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert_refused(folder, folder / "config.json", fragment)


def test_a_folder_without_a_config_is_no_checkpoint(folder):
    (folder / "config.json").unlink()
    assert_refused(folder, folder, "config.json", "model.safetensors")


def test_pickles_are_refused_with_the_way_to_convert_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin", "pickle", "save_pretrained")


def test_a_folder_without_weights_says_what_is_wanted(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, folder, "holds no model.safetensors")


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(folder, path, "not a whole safetensors file")


def test_a_file_with_one_changed_bit_is_another_model(folder):
    before = hub.load_model(str(folder)).sha256
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    # By this hash an adapter knows its model, and a run what it was started on.
    assert hub.load_model(str(folder)).sha256 != before


def test_a_missing_shard_is_named(folder):
    first, _ = shard(folder)
    first.unlink()
    assert_refused(folder, first, "shard is missing")


def test_a_tensor_in_two_shards_is_named(folder):
    first, second = shard(folder)
    state = load_file(second)
    name = next(iter(load_file(first)))
    save_file(state | {name: load_file(first)[name]}, second)
    assert_refused(folder, second, name, "two shards")


def test_an_index_without_a_map_is_named(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}", encoding="utf-8")
    assert_refused(folder, index, "weight_map")


@pytest.mark.parametrize("prefix", ["", "random:"])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder, prefix):
    tokens = load_tokenizer(folder)
    tokens.add_tokens(["one more"])
    tokens.save_pretrained(folder)
    assert_refused(f"{prefix}{folder}", folder, "62 tokens", "vocab_size=61")


def test_a_folder_without_a_tokenizer_says_what_is_wanted(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert_refused(folder, folder, "tokenizer.json", "vocab.json", "merges.txt")
    # Of the special tokens alone transformers makes a tokenizer that knows nothing else.
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert_refused(folder, folder, "the tokenizer is empty", "tokenizer.json")


def test_random_weights_take_the_shape_of_a_folder_and_follow_the_seed(folder):
    edit_config(folder, n_layer=1, n_embd=80)
    first, second = (hub.load_model(f"random:{folder}", seed=seed) for seed in (0, 1))
    assert first.kind == "random"
    assert first.params["wte"].shape == (61, 80)
    assert len(first.tokenizer) == 61
    assert np.abs(first.params["wte"] - second.params["wte"]).max() > 0.01


@pytest.mark.parametrize("shape", ["gpt3", "", "no/such/folder"])
def test_an_unknown_random_shape_lists_those_there_are(shape):
    assert_refused(f"random:{shape}", f"random:{shape}", *gpt2.SHAPES)


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "a/b/c", "~/model", ""])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(source):
    assert_refused(source, repr(source), "no such folder")


def test_the_real_tokenizer_loads(shared):
    tokens = load_tokenizer(shared / "gpt2")
    assert len(tokens) == 50257
    assert tokens.encode("Hello world") == [15496, 995]
    assert tokens.decode([15496, 995]) == "Hello world"


LOAD = """
import sys
from grpocem_jax.utils.errors import InputError
from grpocem_jax.models import hub
for source in sys.argv[1:]:
    try:
        pretrained = hub.load_model(source)
        print(pretrained.kind, pretrained.source, pretrained.params["wte"][:2, :3].tolist())
    except InputError as error:
        print("InputError", error)
"""


def run(*arguments, **environment):
    """A new process, since the Hub's settings are read when its library is imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_hub_path_loads_from_the_local_cache(tmp_path, saved):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some-org--tiny"
    shutil.copytree(saved, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    process = run(
        "-c", LOAD, "some-org/tiny", "some-org/absent", HF_HUB_CACHE=tmp_path, HF_HUB_OFFLINE="1"
    )
    loaded, refused = process.stdout.splitlines()
    values = weights.state(FIELDS)["transformer.wte.weight"][:2, :3].tolist()
    assert loaded == f"hub some-org/tiny {values}"
    assert refused.startswith("InputError model.source='some-org/absent' is not in the local")
    assert process.stderr == ""


def test_without_network_training_ends_with_one_sentence(tmp_path):
    workdir = tmp_path / "run"
    process = run(
        "train.py",
        "--config=configs/gpt2.py",
        f"--workdir={workdir}",
        HF_HUB_CACHE=tmp_path / "cache",
        HF_HUB_OFFLINE="1",
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: model.source='openai-community/gpt2' ")
    assert "no network" in line
    assert "local folder" in line
    assert "--config tiny" in line
    assert process.stdout == ""
    assert not workdir.exists()


class _Refusals(http.server.BaseHTTPRequestHandler):
    """The Hub's answers to requests for a model that does not exist and one that wants a login."""

    def do_GET(self):
        status, code = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *args):
        pass


def test_refusals_of_the_hub_are_told_apart_from_a_missing_network(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusals) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = run(
            *("-c", LOAD, "some-org/absent", "some-org/gated", "not a/name"),
            HF_HUB_CACHE=tmp_path,
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            NO_PROXY="127.0.0.1",
        )
        server.shutdown()
    absent, gated, misnamed = process.stdout.splitlines()
    for line, name in ((absent, "some-org/absent"), (misnamed, "not a/name")):
        assert line.startswith(f"InputError model.source='{name}': neither a local folder nor")
    assert gated.startswith("InputError model.source='some-org/gated': the Hub wants a login")


REVISION = "89abcdef0123456789abcdef0123456789abcdef"


class _Hub(http.server.BaseHTTPRequestHandler):
    """A Hub with one model; ``files`` are its contents and ``fetched`` what was asked for."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        name = path.split(f"/resolve/{REVISION}/")[-1]
        sizes = {name: len(content) for name, content in self.files.items()}
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": sizes[n], "oid": n.encode().hex().zfill(40)}
                for n in sizes
            ]
            self.reply(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/models/"):
            model = {"id": "some-org/tiny", "sha": REVISION, "siblings": []}
            self.reply(json.dumps(model).encode(), {"Content-Type": "application/json"})
        elif name in self.files:
            if self.command == "GET":
                self.fetched.append(name)
            etag = name.encode().hex().zfill(40)
            self.reply(self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION})
        else:
            self.reply(b"", {}, 404)

    def do_HEAD(self):
        self.do_GET()

    def reply(self, body, headers, status=200):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub_of(tmp_path):
    """Loads a folder as a model of a Hub that has it; returns the output and what was fetched."""

    def load(folder, *, offline=False):
        contents = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        handler = type("Handler", (_Hub,), {"files": contents, "fetched": []})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            process = run(
                *("-c", LOAD, "some-org/tiny"),
                HF_HUB_CACHE=tmp_path / "cache",
                HF_HUB_OFFLINE=str(int(offline)),
                HF_HUB_DISABLE_XET="1",
                HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                NO_PROXY="127.0.0.1",
            )
            server.shutdown()
        return process.stdout.strip() or process.stderr, sorted(handler.fetched)

    return load


def test_of_a_hub_model_only_what_is_needed_is_fetched_and_that_is_enough_offline(
    folder, hub_of, tmp_path
):
    """Shards that the index names; the cache then is one of which the Hub's library says that it
    is not whole."""
    shards = [path.name for path in shard(folder)]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    useless = (
        "README.md", "consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
        "original/model.safetensors", "original/params.json", "onnx/config.json", "training.json",
    )  # fmt: skip
    for name in useless:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    loaded, fetched = hub_of(folder)
    assert loaded.startswith("hub some-org/tiny [[")
    assert set(shards) <= set(fetched)
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= set(fetched)
    assert not set(fetched) & set(useless)
    assert len(fetched) == len(set(fetched))
    assert hub_of(folder, offline=True) == (loaded, [])
    # Another program fetched less than we would have, but all that it takes.
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    (snapshot / "additional_chat_templates" / "tools.jinja").unlink()
    (snapshot / "generation_config.json").unlink()
    assert hub_of(folder, offline=True) == (loaded, [])
    (snapshot / shards[1]).unlink()
    refused, _ = hub_of(folder, offline=True)
    assert f"is not whole ({shards[1]} is missing) in the local Hub cache" in refused


def test_a_hub_model_with_whole_weights_is_fetched_without_its_shards(folder, hub_of):
    whole = (folder / "model.safetensors").read_bytes()
    shards = [path.name for path in shard(folder)]
    (folder / "model.safetensors").write_bytes(whole)
    loaded, fetched = hub_of(folder)
    assert loaded.startswith("hub some-org/tiny [[")
    assert "model.safetensors" in fetched
    assert not set(shards) & set(fetched)
