"""The prompts of a run: held out across tasks, and known again by their values."""

import datetime
import decimal
import json
import subprocess
import sys
import zoneinfo
from typing import Any

import numpy as np
import pytest

from grpocem_jax.config.files import load_config
from grpocem_jax.config import parse_config
from grpocem_jax.rollouts.engine import Item
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.tasks import Example, Task
from grpocem_jax.tasks.identity import identity
from grpocem_jax.training.data import Data, load_data
from grpocem_jax.utils.errors import InputError

# Held out


def reward(prompts, completions, **columns):
    return [0.0 for _ in completions]


def reward_too(prompts, completions, **columns):
    return [0.0 for _ in completions]


@pytest.fixture(scope="module")
def policy():
    config = parse_config(load_config("tiny"))
    return load_policy(config)


def rows(path, prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def overlapping(tmp_path, **changes):
    """Tasks a and b on the same 40 prompts: half of them held out of one and trained by the other.

    ``b`` has 30 prompts of its own to train on.
    """
    first, second = ([f"{word} {i} is" for i in range(20)] for word in ("one", "two"))
    rows(tmp_path / "a" / "train.jsonl", first)
    rows(tmp_path / "a" / "test.jsonl", second)
    rows(tmp_path / "b" / "train.jsonl", [*second, *(f"three {i} is" for i in range(30))])
    rows(tmp_path / "b" / "test.jsonl", [*first[:8], *(f"four {i} is" for i in range(8))])
    config = load_config("tiny")
    config.data.tasks = ("a", "b")
    for name in config.data.tasks:
        config.data[name] = {
            "source": str(tmp_path / name),
            "rewards": (f"{__name__}:{'reward' if name == 'a' else 'reward_too'}",),
        }
    config.data.heldout_samples = 10
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return parse_config(config)


def texts(items, task=None):
    return [item.example.prompt for item in items if task in (None, item.task.name)]


@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_prompt_of_any_task_trains_another(tmp_path, policy, seed):
    data = load_data(overlapping(tmp_path, seed=seed), policy)
    judged = set(texts(data.heldout))
    assert len(texts(data.heldout, "a")) == len(texts(data.heldout, "b")) == 10
    assert not judged & set(texts(data.train))
    # Ten of b's training prompts are held out of a; the other ten, and its own 30, are trained on.
    assert len(texts(data.train, "b")) == 40
    taken = judged & {f"one {i} is" for i in range(20)}
    assert len(texts(data.train, "a")) == 20 - len(taken)
    assert 0 < len(taken) <= 8


def test_validation_prompts_are_held_out_across_tasks_too(tmp_path, policy):
    settings = {"train__evaluate_every_steps": 5, "data__validation_samples": 6}
    data = load_data(overlapping(tmp_path, **settings), policy)
    sets = [set(texts(part)) for part in (data.train, data.heldout, data.validation)]
    assert all(sets)
    assert sum(map(len, sets)) == len(set.union(*sets))


def test_a_run_on_one_task_can_leave_out_what_another_is_judged_by(tmp_path, policy):
    alone = overlapping(tmp_path, data__tasks=("b",))
    both = overlapping(tmp_path)
    judged = set(texts(load_data(both, policy).heldout, "a"))
    assert len(judged & set(texts(load_data(alone, policy).train))) == 10
    assert not judged & set(texts(load_data(alone, policy, held_out=("a", "b")).train))


def test_tasks_that_share_nothing_keep_their_rows_and_order(policy):
    config = load_config("tiny")
    alone = []
    for name in ("qa", "sentiment"):
        config.data.tasks = (name,)
        alone += texts(load_data(parse_config(config), policy).train)
    config.data.tasks = ("qa", "sentiment")
    assert texts(load_data(parse_config(config), policy).train) == alone


# Identity


def sha256(*values):
    task = Task("mine", {"prompt": "the prompt"}, "{prompt}", (), own=True)
    items = [Item(task, Example("a prompt", {"value": value}), (1,)) for value in values]
    return Data(items, [], [], [], {}).sha256


class Thing:
    """Like a decoded image or a sound: its repr shows an address."""

    def __init__(self, *parts: Any):
        self.parts = parts


class Closed(Thing):
    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle it")


UTC = datetime.UTC
PAIRS = [
    (lambda: Thing(1, "a"), lambda: Thing(1, "b")),
    (lambda: [Thing(Thing(2))], lambda: [Thing(Thing(3))]),
    (lambda: {"inner": {"deep": [Thing(1)]}}, lambda: {"inner": {"deep": [Thing(0)]}}),
    (lambda: datetime.datetime(2024, 2, 29, tzinfo=UTC), lambda: datetime.datetime(2024, 2, 29)),
    (lambda: datetime.date(2024, 2, 29), lambda: datetime.date(2024, 2, 28)),
    (
        lambda: datetime.datetime(2024, 2, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Prague")),
        lambda: datetime.datetime(2024, 2, 1, tzinfo=zoneinfo.ZoneInfo("Asia/Tokyo")),
    ),
    (lambda: decimal.Decimal("1.10"), lambda: decimal.Decimal("1.1")),
    (lambda: np.arange(6).reshape(2, 3), lambda: np.arange(6).reshape(3, 2)),
    (lambda: np.zeros(5000, np.int8), lambda: np.eye(1, 5000, 2500, dtype=np.int8)[0]),
    (lambda: np.array(["a", Thing(1)], object), lambda: np.array(["a", Thing(2)], object)),
    (lambda: {"one", "two", "three"}, lambda: {"one", "two"}),
    (lambda: (1,), lambda: [1]),
    (lambda: b"a", lambda: "a"),
    (lambda: {"a": 1, "b": 2}, lambda: {"a": 2, "b": 1}),
    (lambda: 1, lambda: True),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_data_are_known_by_values_not_by_where_they_lie(one, other):
    kept = one(), one()
    assert sha256(kept[0]) == sha256(kept[1])
    assert sha256(one()) != sha256(other())


def test_pictures_of_one_file_are_one_value(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("a", (1, 2, 3)), ("b", (1, 2, 4))):
        image.new("RGB", (5, 4), colour).save(tmp_path / f"{name}.png")
    first, again, other = (image.open(tmp_path / f"{name}.png") for name in "aab")
    assert repr(first) != repr(again)
    assert sha256(first) == sha256(again)
    assert sha256(first) != sha256(other)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        0.1,
        float("inf"),
        "tö\n'\"",
        b"\0",
        [],
        [1, [2]],
        (),
        (1,),
        {"a": {"b": None}},
    ],
)
def test_plain_values_are_what_repr_gives(value):
    assert identity(value) == repr(value)


def test_the_identity_is_the_same_in_another_process():
    made = (
        "import datetime, numpy as np; from fractions import Fraction;"
        "from grpocem_jax.tasks.identity import identity;"
        "print(identity([{'a', 'b', 'c'}, datetime.date(2024, 1, 2), Fraction(1, 3),"
        " np.float32(0.5), datetime.timedelta]))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", made],
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize("value", [Closed(), (x for x in "ab"), [Closed()]])
def test_values_that_cannot_be_read_are_refused(value):
    with pytest.raises(InputError, match=r"^data\.mine: a column holds a .*; leave the column out"):
        sha256(value)


def test_a_value_that_contains_itself_is_refused():
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InputError, match=r"^data\.mine: a column holds a list inside"):
        sha256(value)
