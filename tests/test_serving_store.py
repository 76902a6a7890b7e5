"""The store of adapters: what was acknowledged is there, whatever ends a server."""

import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from grpocem_jax.serving.options import Limits
from grpocem_jax.serving.store import FullError, Store
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT

ADD = {"base": "b", "limits": Limits(), "asked": {"method": "cem"}}
RESULT = {"adapted": True}


def save(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"numbers")
    return "a hash"


def no_save(folder):
    raise AssertionError(folder)


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def ready(store, tenant="alice", **fields):
    record = store.add(tenant, **{**ADD, **fields})
    assert store.keep(record, save, RESULT, 7)
    return store.find(record.id)


def names(records):
    return [record.name for record in records]


def test_an_adapter_goes_from_queued_to_ready(store):
    record = store.add("alice", **ADD, name="mine", generations=9)
    assert (record.status, record.generation, record.ended) == ("queued", 0, None)
    assert store.curve(record.id) == []
    curve = [{"generation": 4, "best": -1.5, "mean": None}]
    assert store.update({record.id: ("running", 4)}, {record.id: curve}) == set()
    assert store.update({record.id: ("running", 4)}) == set()
    assert store.curve(record.id) == curve
    assert store.find(record.id).generation == 4
    assert store.keep(record, save, RESULT, 7)
    found = store.find(record.id)
    assert (found.status, found.generation, found.sha256) == ("ready", 7, "a hash")
    assert found.result == RESULT
    assert found.asked == {"method": "cem"}
    assert found.ended >= found.created
    assert (store.path(found) / "adapter_model.safetensors").read_bytes() == b"numbers"


def test_a_tenant_sees_its_own_and_public_adapters_the_newest_first(store):
    for tenant in ("alice", "bob", "public", "alice"):
        ready(store, tenant, name=tenant)
    own = store.list("alice")
    assert names(own) == ["alice", "public", "alice"]
    assert own[0].created > own[2].created
    assert names(store.list("bob")) == ["public", "bob"]
    assert names(store.list("alice", limit=1)) == ["alice"]
    assert names(store.list("alice", after=own[0].id)) == ["public", "alice"]
    (of_bob,) = [x for x in store.list("bob") if x.tenant == "bob"]
    assert store.get("alice", of_bob.id) is None
    assert store.get("bob", of_bob.id) == of_bob
    assert not store.delete("alice", of_bob.id)
    assert store.get("bob", of_bob.id) == of_bob


@pytest.mark.parametrize("id", ["", "..", "adapter-", "adapter-" + "0" * 24, "%", "a' OR '1'='1"])
def test_what_is_no_id_is_found_nowhere(store, id):
    ready(store)
    assert store.get("alice", id) is None
    assert not store.delete("alice", id)


def test_ready_adapters_of_one_base_are_listed_for_it(store):
    ready(store, name="of b")
    ready(store, name="of c", base="c")
    store.add("alice", **ADD, name="unfinished")
    assert names(store.list("alice", base="b")) == ["of b"]


def test_the_limits_count_what_a_tenant_has(store):
    limits = Limits(max_adapters=3, max_jobs=1)
    first = store.add("alice", **{**ADD, "limits": limits})
    with pytest.raises(FullError) as full:
        store.add("alice", **{**ADD, "limits": limits})
    assert (full.value.limit, full.value.most) == ("max_jobs", 1)
    store.add("bob", **{**ADD, "limits": limits})
    store.end(first.id, "failed", "why")
    ready(store, limits=limits)
    ready(store, limits=limits)
    with pytest.raises(FullError) as full:
        store.add("alice", **{**ADD, "limits": limits})
    assert full.value.limit == "max_adapters"
    store.delete("alice", first.id)
    store.add("alice", **{**ADD, "limits": limits})


def test_what_is_deleted_while_it_is_searched_for_is_not_kept(store):
    record = store.add("alice", **ADD)
    other = store.add("alice", **ADD)
    assert store.delete("alice", record.id)
    assert store.update({record.id: ("running", 1), other.id: ("running", 1)}) == {record.id}
    assert not store.keep(record, save, RESULT, 7)
    assert store.find(record.id) is None
    assert not store.path(record).exists()


def test_what_has_ended_does_not_end_again(store):
    record = ready(store)
    store.end(record.id, "failed", "late")
    assert store.find(record.id) == record
    assert store.update({record.id: ("running", 1)}) == {record.id}


def test_a_save_that_fails_leaves_nothing_and_may_be_tried_again(store):
    record = store.add("alice", **ADD)

    def full_disk(folder):
        save(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.keep(record, full_disk, RESULT, 7)
    assert not list(store.path(record).parent.iterdir())
    assert store.find(record.id).status == "queued"
    assert store.keep(record, save, RESULT, 7)


def test_an_index_that_fails_after_the_folder_is_there_may_be_tried_again(store, monkeypatch):
    record = store.add("alice", **ADD)

    def save_first(folder):
        (folder / "left over").touch()
        return save(folder)

    def locked():
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(store._writing, "transaction", locked)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            store.keep(record, save_first, RESULT, 7)
    assert store.find(record.id).status == "queued"
    assert store.keep(record, save, RESULT, 7)
    assert store.find(record.id).status == "ready"
    (folder,) = store.path(record).parent.iterdir()
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors"}


def test_what_has_been_kept_is_not_replaced(store):
    record = ready(store)
    assert store.keep(record, no_save, RESULT, 8)
    assert store.find(record.id) == record
    assert (store.path(record) / "adapter_model.safetensors").read_bytes() == b"numbers"


def test_two_servers_see_each_others_adapters_and_leave_their_searches_alone(tmp_path, store):
    running = store.add("alice", **ADD)
    other = Store(tmp_path)
    try:
        assert other.find(running.id).status == "queued"
        made = ready(other)
        assert store.get("alice", made.id) == made
        other.mark_interrupted()
        assert store.find(running.id).status == "queued"
        unfinished = other.add("alice", **ADD)
    finally:
        other.close()
    assert store.find(unfinished.id).status == "interrupted"
    assert "ask for it again" in store.find(unfinished.id).error


CHILD = """
import sys
from grpocem_jax.serving.options import Limits
from grpocem_jax.serving.store import Store
store, limits = Store(sys.argv[1]), Limits(max_adapters=10**6)
def save(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"numbers")
    return "a hash"
while True:
    record = store.add("alice", base="b", limits=limits, asked={})
    print("added", record.id, flush=True)
    store.update({record.id: ("running", 1)})
    assert store.keep(record, save, {}, 7)
    print("ready", record.id, flush=True)
    if record.id[-1] in "02468ace":
        store.delete("alice", record.id)
        print("deleted", record.id, flush=True)
"""


@pytest.fixture
def killed(tmp_path):
    """Kills a process that works on a store, and gives what it said that it had done."""

    def killed(seconds):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            first = child.stdout.readline()
            time.sleep(seconds)
            child.send_signal(signal.SIGKILL)
            said = [line.split() for line in (first + child.stdout.read()).splitlines(True)]
            return {line[1]: line[0] for line in said if len(line) == 2 and len(line[1]) == 32}

    return killed


def test_a_server_that_is_killed_leaves_what_it_acknowledged(tmp_path, killed, store):
    rng = random.Random(0)
    said = {}
    for _ in range(3):
        said |= killed(rng.uniform(0.2, 0.6))
    store.mark_interrupted()
    again = Store(tmp_path)
    again.close()
    assert sum(state == "ready" for state in said.values()) > 2
    for id, state in said.items():
        record = store.find(id)
        if state == "ready" and id[-1] in "13579bdf":
            assert record.status == "ready"
        elif state == "ready":  # the deletion that follows may have been done, and not been said
            assert record is None or record.status == "ready"
        elif state == "deleted":
            assert record is None
        else:
            assert record is None or record.status in ("ready", "interrupted")
        whole = record is not None and record.status == "ready"
        assert (store.folder / "adapters" / "alice" / id).exists() == whole
        if whole:
            assert (store.path(record) / "adapter_model.safetensors").read_bytes() == b"numbers"
    left = {path.name for path in (store.folder / "adapters" / "alice").iterdir()}
    assert left == {record.id for record in store.list("alice", base="b", limit=10**6)}
    assert not store._read("ended IS NULL", ())


def test_what_a_killed_server_left_over_is_swept(tmp_path, store):
    kept, running = ready(store), store.add("alice", **ADD)
    folder = store.path(kept).parent
    for name in (f"adapter-{'1' * 24}", f"{kept.id}.123.partial", f"{running.id}.123.partial"):
        (folder / name).mkdir()
        save(folder / name)
    Store(tmp_path).close()
    assert {path.name for path in folder.iterdir()} == {kept.id, f"{running.id}.123.partial"}


def write_garbage(folder):
    (folder / "index.sqlite").write_bytes(b"no database, but long enough to be looked at " * 99)


def remove_index(folder):
    (folder / "index.sqlite").unlink()


def write_version(folder):
    with sqlite3.connect(folder / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 99")
    index.close()


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (write_garbage, "index.sqlite cannot be used"),
        (remove_index, "no index.sqlite that knows them"),
        (write_version, "another version"),
    ],
)
def test_a_damaged_folder_is_refused_and_left_as_it_is(tmp_path, damage, fragment):
    opened = Store(tmp_path)
    kept = ready(opened)
    opened.close()
    damage(tmp_path)
    with pytest.raises(InputError, match=fragment):
        Store(tmp_path)
    assert opened.path(kept).is_dir()
    assert not list((tmp_path / "servers").iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        Store(tmp_path / "file" / "store")
