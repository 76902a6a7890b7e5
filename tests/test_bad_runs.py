"""Damaged runs, models and data: a status, one sentence, and nothing written over."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import grpocem_jax as gj
from grpocem_jax.models import hub
from grpocem_jax.utils.errors import InputError
from tests.command_line import TINY
from tests.runs import PROMPT, SMALL

pytestmark = pytest.mark.usefixtures("one_policy")


# Run directories


def write(name, content):
    """A change of a run directory: a file's new content, None to remove it."""

    def change(folder):
        path = folder / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )

    return change


def edit(name, **fields):
    """A change of some fields of a JSON file."""

    def change(folder):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | fields))

    return change


def setting(section, name, value):
    """A change of a value in config.json."""

    def change(folder):
        stored = json.loads((folder / "config.json").read_text())
        stored[section][name] = value
        (folder / "config.json").write_text(json.dumps(stored))

    return change


def cut(name, size):
    """A file that ends early."""
    return lambda folder: os.truncate(folder / name, size)


def offsets(**changes):
    """Other arrays in the adapter; None removes one."""

    def change(folder):
        path = folder / WEIGHTS
        arrays = load_file(path)
        arrays.update({f"h.{name[1]}.attn.c_proj": x for name, x in changes.items()})
        save_file({name: x for name, x in arrays.items() if x is not None}, path)

    return change


def array(name, value):
    """Another tensor in the weights of a model."""

    def change(folder):
        path = folder / "model.safetensors"
        save_file({**load_file(path), name: value}, path)

    return change


WEIGHTS = "adapter/adapter_model.safetensors"
ABOUT = "adapter/adapter_config.json"
DEEP = b"[" * 100_000
SITE = np.zeros(102, np.float32)
SETTINGS = [
    (write("config.json", None), "config.json: cannot be read"),
    (write("config.json", b""), "config.json: cannot be read as JSON"),
    (write("config.json", b'{"seed": '), "config.json: cannot be read as JSON"),
    (write("config.json", b"\xff\xfe"), "config.json: cannot be read"),
    (write("config.json", DEEP), "config.json: cannot be read as JSON"),
    (write("config.json", [1]), "config.json: is no JSON object"),
    (write("config.json", "text"), "config.json: is no JSON object"),
    (write("config.json", {}), "config.data.qa is missing"),
    (write("config.json", {"a.b": 1}), "config.json: holds no settings"),
    (edit("config.json", seed=None), "config.seed=None"),
    (edit("config.json", seed=True), "config.seed=True"),
    (edit("config.json", model=3), "config.model=3"),
    (edit("config.json", data=[]), "config.data=[]"),
    (edit("config.json", sed=1), "did you mean 'seed'?"),
    (setting("model", "source", "/nowhere"), "there is no such folder"),
    (setting("model", "source", "random:gpt2"), "no tokenizer"),
    (setting("model", "dtype", "int8"), "config.model.dtype='int8'"),
    (setting("adapter", "sites", ["mlp.c_fc"]), "does not fit this model"),
    (setting("adapter", "rank_ratio", 0.5), "has shape (102,) there and (64,) here"),
    (setting("adapter", "type", "nowhere:f"), "nowhere cannot be imported"),
    (setting("adapter", "options", {"x": 1}), "config.adapter.options"),
    (setting("search", "buckets", [0]), "config.search.buckets"),
    (setting("cem", "elite_ratio", 1e-9), "leaves no elite"),
]
ADAPTERS = [
    (write(ABOUT, None), "adapter_config.json: cannot be read"),
    (write(ABOUT, b"{"), "adapter_config.json: cannot be read as JSON"),
    (write(ABOUT, DEEP), "adapter_config.json: cannot be read as JSON"),
    (write(ABOUT, []), "adapter_config.json: is no JSON object"),
    (write(ABOUT, {}), "does not say which model"),
    (edit(ABOUT, base_sha256="0" * 64), "weights are not those of this model"),
    (edit(ABOUT, base_sha256=3, base_model="\x1b[2J"), "\\x1b[2J"),
    (write(WEIGHTS, None), "holds no trained adapter"),
    (write(WEIGHTS, b""), "cannot be read as safetensors"),
    (write(WEIGHTS, b"\x80\x04K\x01."), "cannot be read as safetensors"),  # a pickle
    (write(WEIGHTS, b"\xff" * 100), "cannot be read as safetensors"),
    (cut(WEIGHTS, 100), "cannot be read as safetensors"),
    (cut(WEIGHTS, 500), "cannot be read as safetensors"),
    (offsets(h0=None), "h.0.attn.c_proj has shape None there"),
    (offsets(h9=SITE), "h.9.attn.c_proj has shape (102,) there and None here"),
    (offsets(h0=SITE[1:]), "has shape (101,) there"),
    (offsets(h0=SITE[:, None]), "has shape (102, 1) there"),
    (offsets(h0=SITE + np.nan), "not finite"),
    (offsets(h1=SITE - np.inf), "not finite"),
    (offsets(h2=SITE.astype(np.int32)), "not finite"),
]


@pytest.mark.parametrize(("change", "fragment"), SETTINGS)
def test_settings_of_a_run_that_were_damaged_are_named(
    change, fragment, refused, workdir, tmp_path
):
    change(workdir)
    assert fragment in refused("export", f"--workdir={workdir}", f"--out={tmp_path / 'made'}")
    with pytest.raises(InputError, match=re.escape(fragment)):
        gj.load_run(workdir)


@pytest.mark.parametrize(("change", "fragment"), ADAPTERS)
def test_an_adapter_that_was_damaged_is_named(change, fragment, refused, workdir, tmp_path):
    change(workdir)
    where = f"--workdir={workdir}"
    assert fragment in refused("export", where, f"--out={tmp_path / 'made'}")
    assert fragment in refused("adapt", TINY, where, f"--prompt={PROMPT}")
    with pytest.raises(InputError) as error:
        gj.load_run(workdir)
    assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (write("summary.json", None), "summary.json: the model card cannot be filled"),
        (write("summary.json", DEEP), "summary.json: the model card cannot be filled"),
        (write("summary.json", [1]), "summary.json: the model card cannot be filled"),
        (write("summary.json", {}), "summary.json: the model card cannot be filled"),
        (edit("summary.json", heldout=[]), "summary.json: the model card cannot be filled"),
        (edit("summary.json", heldout={"qa": {}}), "summary.json: the model card cannot"),
        (edit("summary.json", builtin_data=3), "summary.json: the model card cannot be filled"),
    ],
)
def test_a_run_that_cannot_be_exported_is_named(change, fragment, refused, workdir, tmp_path):
    change(workdir)
    assert fragment in refused("export", f"--workdir={workdir}", f"--out={tmp_path / 'made'}")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (write("config.json", b"{"), "config.json: cannot be read as JSON"),
        (write("config.json", [1]), "config.json: is no JSON object"),
        (write("summary.json", DEEP), "summary.json: cannot be read as JSON"),
        (write("summary.json", b"\xff"), "summary.json: cannot be read"),
        (write("metrics.jsonl", b'{"step": 1}\n{"st'), "metrics.jsonl, line 2: cannot be read"),
        (write("metrics.jsonl", b"\n3\n"), "metrics.jsonl, line 2: is no JSON object"),
        (write("metrics.jsonl", b"\0\n"), "metrics.jsonl, line 1: cannot be read"),
        (write("heldout.jsonl", b"null\n"), "heldout.jsonl, line 1: is no JSON object"),
        (write("evaluation.json", b"{]"), "evaluation.json: cannot be read as JSON"),
        (write("spectrum.safetensors", b"x"), "spectrum.safetensors: cannot be read"),
        (cut(WEIGHTS, 9), "cannot be read as safetensors"),
        (edit("config.json", train=3), "is not as training and adaptation write it"),
        (edit("summary.json", heldout=[3]), "is not as training and adaptation write it"),
        (
            write("metrics.jsonl", b'{"step": 1, "kl": 1%s}\n' % (b"0" * 400)),
            "is not as training and adaptation write it",
        ),
    ],
)
def test_a_run_of_which_no_report_can_be_made_is_named(change, fragment, refused, workdir):
    change(workdir)
    assert fragment in refused("report", f"--workdir={workdir}")


# Continuing a run


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (write("config.json", b""), "config.json: cannot be read as JSON"),
        (write("config.json", b"\xff"), "config.json: cannot be read"),
        (write("config.json", [1]), "config.json: is no JSON object"),
        (setting("train", "weight_decay", 0.5), "train.weight_decay is 0.5 there and 0.01 here"),
        (edit("config.json", seed=8), "seed is 8 there and 0 here"),
        (edit("config.json", extra=8), "extra is 8 there and None here"),
        (write("run.json", b"{"), "run.json: cannot be read as JSON"),
        (write("run.json", []), "run.json: is no JSON object"),
        (write("run.json", {}), "started on another model"),
        (write("summary.json", b"{"), "summary.json: cannot be read as JSON"),
        (write("summary.json", DEEP), "summary.json: cannot be read as JSON"),
    ],
)
def test_a_run_that_cannot_be_continued_is_named(change, fragment, refused, workdir):
    if "summary" not in fragment:
        (workdir / "summary.json").unlink()
    (workdir / ".lock").touch()
    change(workdir)
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    assert fragment in refused("train", TINY, f"--workdir={workdir}", *small)


# Models


def panic(folder):
    """A tokenizer at which the library underneath panics."""
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["continuing_subword_prefix"] = "longer than a token"
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (edit("config.json", model_type=["gpt2"]), "is not implemented"),
        (edit("config.json", n_layer=10**9), "n_layer is too large"),
        (edit("config.json", n_embd=2**40), "n_embd is too large"),
        (edit("config.json", n_positions=True), "n_positions=True: must be a positive integer"),
        (edit("config.json", layer_norm_epsilon="x"), "layer_norm_epsilon='x'"),
        (edit("config.json", layer_norm_epsilon=-1), "layer_norm_epsilon=-1"),
        (edit("config.json", eos_token_id=-1), "eos_token_id=-1: must be a token"),
        (edit("config.json", eos_token_id=[0, 10**12]), "[0, 1000000000000]: must be a token"),
        (write("generation_config.json", b"{"), "generation_config.json: cannot be read as JSON"),
        (write("generation_config.json", {"eos_token_id": "end"}), "eos_token_id='end'"),
        (write("config.json", DEEP), "config.json: cannot be read as JSON"),
        (write("tokenizer.json", b""), "no tokenizer could be loaded"),
        (write("tokenizer.json", {"model": 3}), "no tokenizer could be loaded"),
        (write("tokenizer.json", DEEP), "no tokenizer could be loaded"),
        (panic, "no tokenizer could be loaded (PanicException)"),
        (write("tokenizer_config.json", [1]), "no tokenizer could be loaded"),
        (write("model.safetensors", b""), "not a whole safetensors file"),
        (write("model.safetensors", b"\x80\x04K\x01."), "not a whole safetensors file"),
        (write("model.safetensors", b"\xff" * 64), "not a whole safetensors file"),
        (cut("model.safetensors", 1000), "not a whole safetensors file"),
        (array("transformer.ln_f.bias", np.full(128, np.nan, np.float32)), "not finite"),
        (array("transformer.ln_f.bias", np.zeros(128, np.int32)), "holds int32 numbers"),
        (array("transformer.ln_f.bias", np.zeros(127, np.float32)), "has shape (127,)"),
    ],
)
def test_a_model_that_was_damaged_is_named(change, fragment, refused, tmp_path):
    model = shutil.copytree(hub.BUILTIN, tmp_path / "model")
    change(model)
    where = f"--workdir={tmp_path / 'new'}"
    assert fragment in refused("train", TINY, f"--config.model.source={model}", where)
