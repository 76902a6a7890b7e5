"""Metrics in TensorBoard and Weights & Biases."""

import importlib.util
import struct

import pytest

from grpocem_jax import trackers
from grpocem_jax.config import LoggingConfig
from grpocem_jax.errors import InputError

VALUES = {"train/reward": 0.25, "train/kl": 0.5}


def settings(*names):
    return LoggingConfig(interval=1, report_to=names, project="some-project")


def records(path):
    """The payloads of an event file: length, its checksum, payload, its checksum, and so on."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_tensorboard_gets_every_value_of_every_step(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    (log,) = trackers.start(settings("tensorboard"), tmp_path, {})
    for step in (1, 2):
        log.log({name: step * value for name, value in VALUES.items()}, step)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(payload) for payload in records(file)]
    found = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert found == {(s, name): s * value for name, value in VALUES.items() for s in (1, 2)}
    assert str(tmp_path) in log.where


def test_without_a_key_weights_and_biases_stays_on_disk_and_asks_for_nothing(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked for something"))
    (log,) = trackers.start(settings("wandb"), tmp_path / "", {"seed": 7})
    assert "offline (no key)" in log.where
    log.log(VALUES, 1)
    log.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = run.read_bytes()
    for text in (b"train/reward", b"0.25", b"some-project", b"seed"):
        assert text in written


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_with_the_fix(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(InputError) as error:
        trackers.check(settings(name))
    assert f"report_to names {name!r}" in str(error.value)
    assert "pip install 'grpocem_jax[logging]'" in str(error.value)
