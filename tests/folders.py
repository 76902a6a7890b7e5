"""Checkpoint folders, damaged."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from grpocem_jax.models import hub
from grpocem_jax.utils.errors import InputError


def edit_state(folder, edit):
    """Rewrites the weights by a function that changes the dict of tensors in place."""
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


def edit_config(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(config), encoding="utf-8")


def shard(folder):
    """Splits the weights in two files with an index, as transformers does with large models."""
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        save_file({n: x for n, x in state.items() if parts[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return [folder / file for file in files]


def assert_refused(source, *fragments):
    """One sentence that holds every fragment."""
    with pytest.raises(InputError) as caught:
        hub.load_model(str(source))
    message = str(caught.value)
    assert all(str(fragment) in message for fragment in fragments), message
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    return message
