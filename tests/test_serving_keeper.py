"""Searches under way go to the store, whatever fails meanwhile."""

import threading

import pytest
from safetensors import SafetensorError

from grpocem_jax.adaptation import Adaptation
from grpocem_jax.serving import keeper as keeping
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.jobs import Job, Progress
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


def test_a_search_that_cannot_be_kept_does_not_stop_the_others(keeper, store, monkeypatch):
    keep = store.keep

    def keep_others(record, *arguments):
        if record == first:
            raise OSError(39, "Directory not empty")
        return keep(record, *arguments)

    (first, _), (second, _) = done(keeper, store), done(keeper, store)
    third, running = begun(keeper, store)
    running.note(Progress(1, -0.5, -1.0))
    with monkeypatch.context() as patch:
        patch.setattr(store, "keep", keep_others)
        with pytest.raises(OSError, match="not empty"):
            keeper.look()
    assert [status(store, x) for x in (first, second, third)] == ["running", "ready", "running"]
    assert store.find(third.id).generation == 1
    keeper.look()
    assert status(store, first) == "ready"


def test_searches_of_dead_servers_are_looked_for_whatever_cannot_be_kept(
    keeper, store, monkeypatch
):
    looked = threading.Event()

    def fail(*arguments):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(store, "keep", fail)
    monkeypatch.setattr(store, "mark_interrupted", looked.set)
    monkeypatch.setattr(keeping, "OTHERS_S", 0.01)
    done(keeper, store)
    keeper.start()
    assert looked.wait(20)
    keeper.stop()
