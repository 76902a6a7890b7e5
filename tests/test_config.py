"""Configs: the files parse, and every kind of mistake is named in one sentence."""

import collections.abc
import dataclasses
import importlib.util
import math
import sys
import types
import typing
from pathlib import Path

import absl.flags
import ml_collections
import pytest

from grpocem_jax.config import Config, commands, lay_defaults, parse_config, with_defaults
from grpocem_jax.config.files import load_config
from grpocem_jax.tasks import rows
from grpocem_jax.utils.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(name, **changes):
    config = load_config(name)
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = config
        for part in sections:
            section = section[part]
        with config.unlocked(), section.ignore_type():
            section[field] = value
    return config


def test_the_reports_config_carries_the_reports_numbers():
    config = parse_config(load_config("gpt2"))
    assert config.prompts_per_step == 8
    assert config.grpo.group_size == 8
    assert config.train.batch_size * config.train.accumulation_steps == 64
    train = config.train
    assert (train.learning_rate, train.warmup_steps, train.weight_decay) == (5e-5, 100, 0.01)
    assert (config.grpo.clip, config.grpo.beta, config.grpo.entropy) == (0.2, 0.01, 0.08)
    assert train.max_grad_norm == 0.5
    assert (config.adapter.rank_ratio, config.adapter.min_singular_value) == (0.8, 1e-5)
    generation = config.generation
    assert (generation.temperature, generation.top_p) == (0.6, 0.85)
    assert generation.repetition_penalty == 1.3
    assert config.data.max_prompt_tokens + generation.max_new_tokens == 256
    assert config.data.sources["qa"].columns["answers"] == "answers.text"


def test_the_recipes_differ_and_others_are_refused():
    report, tuned = (parse_config(load_config(f"gpt2:{r}")) for r in ("report", "tuned"))
    assert tuned.train.learning_rate > 10 * report.train.learning_rate
    assert tuned.data == report.data
    with pytest.raises(ValueError, match="recipes are report and tuned"):
        load_config("gpt2:fast")


def test_the_tiny_config_needs_nothing_but_the_package():
    config = parse_config(load_config("tiny"))
    assert config.model.source == "builtin"
    assert {s.source for s in config.data.sources.values()} == {"builtin"}


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"train__learning_rat": 1.0}, ["config.train.learning_rat", "'learning_rate'"]),
        ({"optimizer": 1}, ["config.optimizer", "no such field"]),
        ({"data__qa__sourc": "x"}, ["config.data.qa.sourc", "'source'"]),
        ({"data__tasks": ("qa", "sentimnt")}, ["config.data.tasks", "'sentimnt'", "'sentiment'"]),
        ({"data__tasks": ()}, ["config.data.tasks", "not empty"]),
        ({"data__translation": {"source": "x"}}, ["config.data.translation", "no such field"]),
        ({"grpo__group_size": 5}, ["grpo.group_size=5", "train.batch_size=64", "multiple"]),
        ({"grpo__group_size": 1}, ["config.grpo.group_size=1", "at least 2"]),
        ({"grpo__supervision": "both"}, ["config.grpo.supervision='both'", "'process'"]),
        ({"grpo__weights": "mean"}, ["config.grpo.weights='mean'", "'sequence'"]),
        ({"grpo__aggregation": "token"}, ["config.grpo.aggregation: is called grpo.weights now"]),
        ({"grpo__advantage": "scaled"}, ["config.grpo.advantage: is called grpo.advantages now"]),
        ({"adapter__rank_ratio": 0.0}, ["config.adapter.rank_ratio=0.0", "above 0"]),
        ({"adapter__rank_ratio": 1.5}, ["config.adapter.rank_ratio=1.5", "at most 1"]),
        ({"adapter__tail": "cut"}, ["config.adapter.tail='cut'", "'keep'"]),
        ({"adapter__sites": "attn.c_proj"}, ["config.adapter.sites", "tuple"]),
        ({"generation__temperature": 0.0}, ["config.generation.temperature=0.0", "above 0"]),
        ({"generation__top_p": 1.1}, ["config.generation.top_p=1.1", "at most 1"]),
        ({"generation__top_k": -1}, ["config.generation.top_k=-1", "at least 0"]),
        ({"generation__min_p": 1.5}, ["config.generation.min_p=1.5", "from 0 to 1"]),
        ({"generation__max_new_tokens": 0}, ["max_new_tokens=0", "at least 1"]),
        ({"generation__repetition_penalty": 0.5}, ["repetition_penalty=0.5", "at least 1"]),
        ({"generation__prompt_buckets": (64, 32)}, ["prompt_buckets", "ascending"]),
        ({"model__dtype": "int8"}, ["config.model.dtype='int8'", "'float32'"]),
        ({"model__source": ""}, ["config.model.source=''", "not empty"]),
        ({"train__epochs": 0}, ["config.train.epochs=0", "at least 1"]),
        ({"train__epochs": "3"}, ["config.train.epochs='3'", "type int"]),
        ({"train__learning_rate": float("nan")}, ["config.train.learning_rate=nan", "finite"]),
        ({"train__lr_scale_range": (2.0, 1.0)}, ["lr_scale_range", "ascending"]),
        ({"train": 3}, ["config.train=3", "section"]),
        ({"data__tasks": ("a\nb",)}, ["config.data.tasks names 'a\\nb'", "config.data.a\\nb"]),
        ({"seed": -1}, ["config.seed=-1", "from 0"]),
    ],
)
def test_a_mistake_is_named_with_field_value_and_fix(changes, fragments):
    with pytest.raises(InputError) as error:
        parse_config(changed("tiny", **changes))
    message = str(error.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message


def test_what_a_config_leaves_out_has_its_default():
    config = load_config("tiny")
    with config.unlocked():
        del config.train["epochs"], config["grpo"]
    assert parse_config(config) == parse_config(load_config("tiny"))


def test_a_task_without_a_source_is_named():
    config = load_config("tiny")
    with config.unlocked():
        del config.data["qa"]
    with pytest.raises(InputError, match=r"config\.data\.qa is missing"):
        parse_config(config)


# Every field, by its type

WRONG = {
    int: (None, True, 1.0, "3", b"3", (), {}, 2**31, -(2**31), 10**400, 10**5000, math.nan),
    float: (None, True, "0.5", (), {}, math.nan, math.inf, -math.inf, 1e39, 1e-39, 10**400),
    str: (None, True, 3, 0.5, b"builtin", (), {}, "a\0b", "\ud800"),
    bool: (None, 1, 0.0, "True", (), {}),
    tuple: (None, True, 3, "abc", {}, (None,), ((),), ({},), {"a"}, (b"a",), ("\udcff",)),
    dict: (None, True, 3, "abc", (), [{}]),
}
OUT_OF_RANGE = {
    int: (-1, -(2**31 - 1)),
    float: (-0.5, -3e38),
    str: ("", "nonsense", "Builtin"),
    tuple: ((-1,), ("qa", "qa"), ("nonsense",), (0.5, 0.25), (1, 2, -3)),
}
"""Of these each field must refuse some, unless its range allows all."""


def fields(kind=Config, path=""):
    """Paths of all fields with their types and ranges, those of a task's source included."""
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield name, dict, None
            yield from fields(hint, f"{name}.")
        elif name == "data.sources":
            yield "data.qa", dict, None
            yield from fields(typing.get_args(hint)[1], "data.qa.")
        else:
            origin = typing.get_origin(hint)
            plain = {tuple: tuple, types.UnionType: typing.get_args(hint)[:1]}.get(origin, hint)
            plain = plain[0] if isinstance(plain, tuple) else plain
            plain = dict if origin not in (None, tuple, types.UnionType) else plain
            yield name, plain, field.metadata.get("range")


FIELDS = list(fields())


def with_value(name, value):
    settings = load_config("tiny").to_dict()
    *sections, last = name.split(".")
    place = settings
    for section in sections:
        place = place[section]
    place[last] = value
    return ml_collections.ConfigDict(settings)


def refusal(name, value):
    """The sentence, or None where the value is taken."""
    try:
        parse_config(with_value(name, value))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", WRONG)
def test_every_field_of_a_type_refuses_other_types_and_what_is_out_of_its_range(kind):
    own = [(name, allowed) for name, of, allowed in FIELDS if of is kind]
    assert own
    for name, allowed in own:
        for value in WRONG[kind]:
            if name in ("search.budget_s", "cem.std_momentum") and value is None:
                continue
            if name.endswith("options") and value == {}:
                continue
            message = refusal(name, value)
            assert message is not None, (name, value)
            assert f"config.{name}" in message
            assert message.endswith((".", "?"))
            assert "\n" not in message
        refused = [refusal(name, value) for value in OUT_OF_RANGE.get(kind, ())]
        if allowed is not None:
            assert any(refused), name
            assert any(allowed.text in message for message in refused if message), refused


def test_every_misspelt_field_gets_the_right_one_suggested():
    for name in (name for name, kind, _ in FIELDS if kind is not dict):
        *sections, last = name.split(".")
        misspelt = last[:-1] + last[-2:][::-1] if len(last) < 5 else last[:2] + last[3:]
        message = refusal(".".join((*sections, misspelt)), 3)
        assert f"there is no such field; did you mean {last!r}?" in message, name


@pytest.mark.parametrize("settings", [None, {}, {"seed": 0}, "tiny", 3])
def test_what_is_no_config_is_named(settings):
    with pytest.raises(InputError, match="must be a ConfigDict of ml_collections"):
        parse_config(settings)


@pytest.mark.parametrize("value", [math.nan, {1, 2}, b"x", object(), {"a": {"b": math.inf}}])
def test_options_that_json_cannot_hold_are_refused(value):
    for name in (name for name, _, _ in FIELDS if name.endswith("options")):
        with pytest.raises(InputError, match=rf"config\.{name}: must be what JSON can hold"):
            parse_config(with_value(name, {"x": value}))


# Flags


OWN_TASK = """
import grpocem_jax as gj

def get_config():
    config = gj.load_config("tiny")
    config.data.tasks = ("mine", "qa")
    config.data.mine = {"source": "somewhere", "rewards": ["rewards_of_mine:good"]}
    config.train.learning_rate = 1
    config.search.budget_s = None
    return config.lock()
"""
MINIMAL = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"data": {"tasks": ("qa",), "mine": {"rewards": ("m:f",)}}})
"""
EMPTY = """
import ml_collections

def get_config():
    return ml_collections.FrozenConfigDict()
"""
FLAGS = {int: ("7", 7), float: ("0.375", 0.375), str: ("other", "other"), bool: ("True", True)}
TUPLES = {
    "int": ("(3,9)", (3, 9)),
    "float": ("(0.5,2.0)", (0.5, 2.0)),
    "str": ("('a','b')", ("a", "b")),
}


def flag_values(task):
    """For each field of the schema its name as a flag, a text for it and the value meant."""

    def of(kind, path):
        for field in dataclasses.fields(kind):
            hint = typing.get_type_hints(kind)[field.name]
            name, args = f"{path}{field.name}", typing.get_args(hint)
            if dataclasses.is_dataclass(hint):
                yield from of(hint, f"{name}.")
            elif name == "data.sources":
                yield from of(args[1], f"data.{task}.")
            elif name == "adapter.options":
                yield f"{name}.depth", "[1, 'two']", [1, "two"]
            elif typing.get_origin(hint) is collections.abc.Mapping:
                yield f"{name}.prompt", "question", "question"
            elif typing.get_origin(hint) is tuple:
                yield name, *TUPLES[args[0].__name__]
            else:
                yield name, *FLAGS[args[0] if args else hint]

    return list(of(Config, ""))


@pytest.fixture
def by_flags(monkeypatch):
    """The config that a command gets from its command line."""

    def parse(config, *arguments):
        before = set(absl.flags.FLAGS)
        monkeypatch.setattr(sys, "argv", ["command", f"--config={config}", *arguments])
        holder = commands.define_config()
        try:
            assert commands.parse_flags(sys.argv) == ["command"]
            return holder.value
        finally:
            for flag in set(absl.flags.FLAGS) - before:
                delattr(absl.flags.FLAGS, flag)

    return parse


def user_config(folder, text):
    (folder / "user.py").write_text(text, encoding="utf-8")
    return str(folder / "user.py")


@pytest.mark.parametrize("name", ["tiny", "gpt2", "gpt2:tuned", "llama", OWN_TASK, MINIMAL, EMPTY])
@pytest.mark.parametrize("task", ["qa", "mine"])
def test_every_field_is_a_flag_whatever_the_config_file_leaves_out(name, task, tmp_path, by_flags):
    name = user_config(tmp_path, name) if "\n" in name else name
    every = [(field, *pair) for field, *pair in flag_values(task) if field != "data.tasks"]
    arguments = [f"--config.{field}={text}" for field, text, _ in every]
    tasks = "('qa','mine')"
    config = by_flags(name, *arguments, f"--config.data.tasks={tasks}")
    assert config.data.tasks == ("qa", "mine")
    assert len(every) > 90
    for field, _, value in every:
        found = config
        for part in field.split("."):
            found = found[part]
        assert (field, found, type(found)) == (field, value, type(value))


def test_flags_of_one_field_each_give_a_config_that_parses(by_flags):
    config = by_flags(
        "tiny",
        "--config.data.tasks", "('qa','mine')",
        "--config.data.mine.source=/some/where",
        "--config.data.mine.rewards=rewards_of_mine:good",
        "--config.data.mine.columns.prompt=question",
        "--config.data.qa.label_names=('x','y')",
        "--config.data.qa.columns={'context': 'passage'}",
        "--noconfig.search.gate",
    )  # fmt: skip
    parsed = parse_config(config)
    mine, qa = parsed.data.sources["mine"], parsed.data.sources["qa"]
    assert (mine.source, mine.rewards) == ("/some/where", ("rewards_of_mine:good",))
    assert dict(mine.columns) == {"prompt": "question"}
    assert qa.label_names == ("x", "y")
    assert dict(qa.columns) == {"context": "passage"}
    assert not parsed.search.gate


@pytest.mark.parametrize(
    "flag", ["data.sentimnt.source", "data.sentimnt.rewards", "data.qa.lable_names", "trainer.x"]
)
def test_a_flag_of_no_field_is_refused(flag, by_flags):
    with pytest.raises(InputError, match="the config has no such field"):
        by_flags("tiny", f"--config.{flag}=x")


def test_a_config_file_left_alone_means_what_it_says():
    for name in ("tiny", "gpt2", "gpt2:tuned"):
        module, *argument = name.split(":")
        assert parse_config(load_config(name)) == parse_config(load(module).get_config(*argument))


def test_laying_defaults_keeps_references_between_fields():
    config = load_config("tiny")
    config.train.warmup_steps = config.get_ref("seed") + 5
    lay_defaults(config)
    config.seed = 4
    assert config.train.warmup_steps == 9


def test_a_copy_with_defaults_leaves_the_original_alone():
    config = load_config("tiny").lock()
    before = config.to_dict()
    assert with_defaults(config).data.qa.label_names == ()
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "answers", "sources"),
    [
        ("smollm2:any", True, ["stanfordnlp/sst2", "fancyzhx/ag_news"]),
        ("smollm2", False, ["stanfordnlp/sst2", "fancyzhx/ag_news"]),
        ("smollm2:some/where/", True, ["some/where/sst2_sentences", "some/where/ag_news"]),
        ("smollm2:any", False, ["builtin", "builtin"]),
        ("smollm2:builtin", True, ["builtin", "builtin"]),
    ],
)
def test_the_data_of_a_packaged_model_are_named_or_replaced_with_a_line(
    name, answers, sources, monkeypatch, capsys
):
    monkeypatch.setattr(rows, "hub_answers", lambda: answers)
    config = parse_config(load_config(name))
    assert [config.data.sources[task].source for task in config.data.tasks] == sources
    replaced = name == "smollm2:any" and not answers
    assert ("take the place of SST-2 and AG News" in capsys.readouterr().err) == replaced
    for task in config.data.tasks:
        assert "{labels}" in config.task(task).template
    assert config.data.sources["sentiment"].label_names == ("negative", "positive")
