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
from safetensors.numpy import load_file
from transformers import AutoTokenizer, GenerationConfig

from grpocem_jax import checkpoints, export, files
from grpocem_jax.adaptation import load_run
from grpocem_jax.adapters import base as adapters
from grpocem_jax.errors import InputError
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from tests.test_adaptation import (
    PROMPT,
    ROOT,
    cheap_programs,
    get_config,
    random_offsets,
    tiny_policy,
    write_run,
)

GAIN = {"before": 0.125, "after": 0.375, "gain": 0.25, "gain_ci95": [0.125, 0.5], "n": 7}
SUMMARY = {
    "heldout": {"qa": GAIN, "overall": {**GAIN, "after": 0.5}},
    "heldout_greedy": {"qa": {**GAIN, "after": 0.875}},
    "steps": 11,
    "trainable_parameters": 408,
    "model": "builtin",
    "builtin_model": True,
    "random_weights": False,
    "builtin_data": {"qa": True, "general": False},
}


@pytest.fixture(scope="module", autouse=True)
def _cheap_programs():
    with cheap_programs():
        yield


def make_run(folder, summary=SUMMARY, changes=(), **options):
    """A run directory with an adapter nobody trained and a summary nobody measured."""
    write_run(folder, **options)
    settings = get_config(**{"generation.stop": (",",), **dict(changes)})
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """One export for all tests; not to be changed."""
    return export.export_model(workdir, tmp_path_factory.mktemp("exports") / "model")


def logits(params, adapter, model, length=24):
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, length)

    @jax.jit
    def compute(params, adapter):
        hidden = model.forward(params, adapter, tokens, jnp.ones(length, bool))
        return model.logits(params, hidden)

    return np.asarray(compute(params, adapter))


def logits_of(folder):
    loaded = hub.load_model(str(folder))
    return logits(models.cast_params(loaded.params, jnp.float32), {}, loaded.build())


# The folder


def test_the_folder_holds_model_tokenizer_card_and_adapter(exported):
    names = {path.name for path in exported.folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "README.md", "adapter"}
    adapter = {path.name for path in (exported.folder / "adapter").iterdir()}
    assert adapter == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
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
        if site not in run.adapter:
            np.testing.assert_array_equal(merged[name], kernel, err_msg=name)
            continue
        offsets = np.asarray(run.adapter[site], np.float64)
        k = len(offsets)
        u, s, vt = np.linalg.svd(kernel.astype(np.float64))
        change = (u[:, :k] * (s[:k] * offsets)) @ vt[:k]
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(merged[name], kernel + change, atol=2e-6, err_msg=name)


def test_logits_are_those_of_base_model_and_adapter(exported, run):
    policy = run.policy
    expected = logits(policy.params, run.adapter, policy.model)
    assert np.abs(logits_of(exported.folder) - expected).max() < 1e-4
    assert np.abs(logits_of(hub.BUILTIN) - expected).max() > 0.1
    assert 0 < exported.difference < 1e-4


def test_the_saved_adapter_gives_the_same_logits_on_its_base_and_no_other(exported, run):
    policy = run.policy
    folder, sha256 = exported.folder / "adapter", policy.pretrained.sha256
    loaded = checkpoints.load_adapter(folder, policy.zero, base_sha256=sha256)
    expected = logits(policy.params, run.adapter, policy.model)
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
    workdir = make_run(tmp_path / "run", changes={"model.dtype": "bfloat16"})
    again = export.export_model(workdir, tmp_path / "model")
    found, expected = (load_file(x.folder / "model.safetensors") for x in (again, exported))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_another_adapter_of_the_same_model_is_merged_instead(workdir, exported, run, tmp_path):
    other = make_run(tmp_path / "other", offsets=random_offsets(run.policy.zero, seed=2))
    found = export.export_model(workdir, tmp_path / "a" / "model", adapter=other / "adapter")
    expected = logits(run.policy.params, load_run(other).adapter, run.policy.model)
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
def test_a_full_disk_leaves_nothing_half_written(where, workdir, run, tmp_path, monkeypatch):
    full = os.strerror(errno.ENOSPC)

    errors = {  # what safetensors, tokenizers and Python raise
        "weights": SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)"),
        "tokenizer": Exception(f"{full} (os error 28)"),
        "adapter": OSError(errno.ENOSPC, full, "file"),
    }

    def refuse(*args, **kwargs):
        raise errors[where]

    if where == "weights":
        monkeypatch.setattr(files, "save_file", refuse)
    elif where == "tokenizer":
        monkeypatch.setattr(type(run.policy.tokenizer), "save_pretrained", refuse)
    else:
        monkeypatch.setattr(checkpoints.shutil, "copyfile", refuse)
    assert_refused(workdir, tmp_path / "model", "--out=", full)


def test_a_merge_that_changes_the_logits_is_not_kept(workdir, tmp_path, monkeypatch):
    merge = adapters.merge_params

    def wrong(method, params, offsets, sites):
        return merge(method, params, jax.tree.map(lambda x: 1.05 * x, offsets), sites)

    monkeypatch.setattr(adapters, "merge_params", wrong)
    assert_refused(workdir, tmp_path / "model", "logits", "read back", "more than 0.001")


def test_an_adapter_that_is_not_finite_is_not_kept(tmp_path):
    offsets = jax.tree.map(lambda x: x.at[0].set(jnp.nan), tiny_policy()[0].zero)
    workdir = make_run(tmp_path / "run", offsets=offsets)
    assert_refused(workdir, tmp_path / "model", "h.0.attn.c_proj", "not finite")


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    workdir = make_run(tmp_path / "run", base_sha256="0" * 64)
    assert_refused(workdir, tmp_path / "model", "whose weights are not those of this model")


@pytest.mark.parametrize(
    "changes",
    [{"adapter.rank_ratio": 0.5}, {"adapter.sites": ("h.0.attn.c_proj",)}],
    ids=["rank", "sites"],
)
def test_an_adapter_of_other_ranks_or_sites_is_refused(changes, tmp_path):
    workdir = make_run(tmp_path / "run", changes=changes)
    assert_refused(workdir, tmp_path / "model", "does not fit this model")


def test_another_adapter_made_with_other_settings_is_refused(workdir, tmp_path):
    """Its arrays have the same names and shapes, but it means another model."""
    other = make_run(tmp_path / "other", tail="drop") / "adapter"
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
        export.run(**flags)


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
        monkeypatch.setattr(export, "export_model", lambda *args, **kwargs: exported)
        given = {"workdir": str(workdir), "out": str(tmp_path / "model"), "repository": "me/tiny"}
        return export.run(**{**given, **flags})

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
