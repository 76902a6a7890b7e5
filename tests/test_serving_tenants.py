"""Keys in a file, and the limits of tenants."""

import json
import os
import stat
import time

import pytest

from grpocem_jax.serving.options import Limits
from grpocem_jax.serving.tenants import PREFIX, PUBLIC, Bucket, Keys, add_key
from grpocem_jax.utils.errors import InputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_a_key_is_known_by_its_hash_alone(path):
    key = add_key(path, "alice")
    assert key.startswith(PREFIX)
    assert len(key) > 40
    assert key[len(PREFIX) :] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = Keys(path)
    assert keys.find(key).name == "alice"
    for other in (None, "", "x", key[:-1], key + "x", key.upper(), f" {key}", "\ud800"):
        assert keys.find(other) is None


def test_every_key_is_another_and_a_tenant_may_have_several(path):
    made = [add_key(path, x) for x in ("alice", "alice", "bob")]
    assert len(set(made)) == 3
    keys = Keys(path)
    assert [keys.find(key).name for key in made] == ["alice", "alice", "bob"]


def test_without_a_file_everyone_is_the_operator():
    assert Keys(None).find(None).is_operator
    assert Keys(None).find("anything").name == PUBLIC


def test_keys_are_added_and_taken_away_while_the_server_runs(path):
    first = add_key(path, "alice")
    keys = Keys(path)
    second = add_key(path, "bob")
    assert keys.find(second).name == "bob"
    entries = json.loads(path.read_text())["keys"]
    path.write_text(json.dumps({"keys": entries[1:]}))
    assert keys.find(first) is None
    assert keys.find(second).name == "bob"
    path.write_text("{half a fi")
    assert keys.find(second).name == "bob"


def test_a_tenants_own_limits_go_before_the_servers(path):
    key = add_key(path, "alice")
    entries = json.loads(path.read_text())["keys"]
    path.write_text(json.dumps({"keys": [{**entries[0], "limits": {"max_jobs": 1}}]}))
    found = Keys(path, Limits(max_jobs=9, max_adapters=7)).find(key)
    assert (found.limits.max_jobs, found.limits.max_adapters) == (1, 7)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "is no JSON object"),
        ("{}", "has no list 'keys'"),
        ({"keys": [1]}, "keys[0] is no object"),
        ({"keys": [{"tenant": "a", "sha256": "0" * 64, "key": "x"}]}, "keys[0] is no object"),
        ({"keys": [{"tenant": "A b", "sha256": "0" * 64}]}, "tenant='A b'"),
        ({"keys": [{"tenant": "../x", "sha256": "0" * 64}]}, "tenant='../x'"),
        ({"keys": [{"tenant": "a", "sha256": "0"}]}, "sha256 is no hash"),
        ({"keys": [{"tenant": "a", "sha256": "0" * 64, "limits": {"most": 1}}]}, "the limits are"),
        (
            {"keys": [{"tenant": "a", "sha256": "0" * 64, "limits": {"max_jobs": "1"}}]},
            "max_jobs='1' is no integer",
        ),
        (
            {"keys": [{"tenant": "a", "sha256": "0" * 64, "limits": {"max_open": 0}}]},
            "max_open=0: must be at least 1",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(path, content, fragment):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    for read in (Keys, lambda path: add_key(path, "bob")):
        with pytest.raises(InputError) as error:
            read(path)
        assert fragment in str(error.value)


def test_a_file_that_is_not_there_is_refused(path):
    with pytest.raises(InputError, match="--add_key"):
        Keys(path)


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a/b", "-a", "a" * 65, "ä", "a\n"])
def test_a_name_that_is_no_folders_is_refused(path, name):
    with pytest.raises(InputError, match="--add_key"):
        add_key(path, name)
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        add_key(tmp_path / "file" / "keys.json", "alice")


@pytest.mark.parametrize("field", ["requests_per_minute", "max_open", "max_body_bytes"])
def test_a_limit_of_nothing_is_refused(field):
    with pytest.raises(InputError, match=f"{field}=0"):
        Limits(**{field: 0})


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_its_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bucket = Bucket(60)
    assert bucket.take(60) == 0
    assert bucket.take(2) == pytest.approx(2.0)
    now[0] += 1.5
    assert bucket.take(1) == 0
    assert bucket.take(1) == pytest.approx(0.5)
    bucket.give_back(0.5)
    assert bucket.take(1) == 0
    now[0] += 1000
    assert bucket.take(61) == pytest.approx(1.0)
    assert bucket.take(60) == 0


def test_the_file_is_read_once_while_it_does_not_change(path, monkeypatch):
    key = add_key(path, "alice")
    keys = Keys(path)
    from grpocem_jax.serving import tenants

    monkeypatch.setattr(tenants, "_entries", lambda path: pytest.fail("read again"))
    assert keys.find(key).name == "alice"
    os.utime(path, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        keys.find(key)
