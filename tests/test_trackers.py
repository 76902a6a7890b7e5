"""Metrics in TensorBoard and Weights & Biases."""

import importlib.util
import struct
import sys
import types

import pytest

from grpocem_jax.config import LoggingConfig
from grpocem_jax.runs import trackers
from grpocem_jax.utils.errors import InputError

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
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked for something"))
    (log,) = trackers.start(settings("wandb"), tmp_path / "", {"seed": 7})
    assert "offline (no key)" in log.where
    log.log(VALUES, 1)
    log.close()
    wandb.teardown()  # finish() does not wait for its service to write the file, this does
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


class Broken:
    """A tracker that fails where it is told to."""

    where = "nowhere"

    def __init__(self, fails, calls):
        self.fails, self.calls = fails, calls
        self.call("start")

    def call(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise ConnectionError("the network is gone")

    def log(self, values, step):
        self.call("log")

    def close(self):
        self.call("close")


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ("start", ["start"]),
        ("log", ["start", "log"]),
        ("close", ["start", "log", "log", "close"]),
    ],
)
def test_a_tracker_that_fails_is_said_once_and_left_out(
    fails, expected, tmp_path, monkeypatch, capsys
):
    calls = []
    monkeypatch.setattr(trackers, "TensorBoard", lambda *args: Broken(fails, calls))
    (log,) = trackers.start(settings("tensorboard"), tmp_path, {})
    log.log(VALUES, 1)
    log.log(VALUES, 2)
    log.close()
    assert calls == expected
    assert capsys.readouterr().err.count("tensorboard failed and is left out from here on") == 1
    assert log.where


@pytest.mark.parametrize(("fails", "mode"), [("login", None), ("init", None), ("init", "online")])
def test_weights_and_biases_without_a_network_goes_on_offline_and_says_so(
    fails, mode, tmp_path, monkeypatch, capsys
):
    modes = []

    def login(**options):
        if fails == "login":
            raise TimeoutError("no answer")
        return True

    def init(*, mode, **options):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no route to host")
        return types.SimpleNamespace(
            dir=str(tmp_path / "wandb" / "offline-run-1" / "files"), finish=lambda: None
        )

    fake = types.SimpleNamespace(login=login, init=init, Settings=lambda **options: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    (log,) = trackers.start(settings("wandb"), tmp_path, {})
    assert modes[-1] == "offline"
    assert f"wandb sync {tmp_path / 'wandb' / 'offline-run-1'}" in log.where
    assert "Weights & Biases goes on offline (online it failed: " in capsys.readouterr().err
    log.close()


def test_an_upload_that_fails_at_the_end_is_said_with_the_command_that_makes_up_for_it(
    tmp_path, capsys
):
    def finish():
        raise TimeoutError("still uploading")

    tracker = object.__new__(trackers.WeightsAndBiases)
    tracker._run = types.SimpleNamespace(finish=finish)
    tracker._folder = tmp_path / "run-1"
    tracker.close()
    err = capsys.readouterr().err
    assert f"(TimeoutError: still uploading); later, wandb sync {tmp_path / 'run-1'}" in err
