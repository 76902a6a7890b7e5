"""Searches under way go to the store, whatever fails meanwhile."""

import threading

import pytest
from safetensors import SafetensorError

from grpocem_jax.adaptation import Adaptation
from grpocem_jax.serving import keeper as keeping
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.jobs import Job
from grpocem_jax.serving.keeper import Keeper
from grpocem_jax.serving.options import Limits
from grpocem_jax.serving.store import Store
from tests.serving import thin_run


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def keeper(store):
    return Keeper(Catalogue(thin_run(), store))


def begun(keeper, store):
    """An adapter in the store, and the job that searches for it, which is followed."""
    record = store.add("alice", base="b", limits=Limits(), asked={}, generations=2)
    job = Job("gradient", 2, 0, [])
    job.begin()
    keeper.follow(record, job)
    return record, job


def done(keeper, store):
    """The same, of a search that is done."""
    record, job = begun(keeper, store)
    job.end("done", Adaptation(thin_run().offsets, -1.0, -0.5, None))
    return record, job


def status(store, record):
    return store.find(record.id).status


def test_a_full_disk_is_said_and_what_was_found_is_kept_once_there_is_room(
    keeper, store, monkeypatch, caplog
):
    tried, kept = [], threading.Event()
    save, keep = keeper._catalogue.save, store.keep

    def full_disk(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(*arguments)

    def watched(*arguments):
        keep(*arguments)
        kept.set()

    monkeypatch.setattr(keeper._catalogue, "save", full_disk)
    monkeypatch.setattr(store, "keep", watched)
    monkeypatch.setattr(keeping, "OTHERS_S", 0.01)
    record, _ = done(keeper, store)
    keeper.start()
    assert kept.wait(20)
    keeper.stop()
    assert caplog.text.count("the store fails") == 1
    assert "No space left on device" in caplog.text
    assert status(store, record) == "ready"
