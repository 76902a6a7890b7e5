"""How prompts are written: templates by config, examples before them, chats."""

import dataclasses
import json

import pytest

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Text, TrainedRun
from grpocem_jax.config import parse_config
from grpocem_jax.models.tokenizer import chat_writer
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.tasks import TASKS, PromptFormat, Shot, SourceConfig, make_task
from grpocem_jax.training.data import load_data
from grpocem_jax.utils.errors import InputError
from tests.runs import get_config, one_policy, thin_model

ASK = {"role": "user", "content": "Well?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def render(messages):
    """Roles and contents, as a chat template would write them."""
    return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"


def longest(prompts, completions, **columns):
    """A reward that knows its columns."""
    return [float(len(completion)) for completion in completions]


OWN = ("tests.test_prompts:longest",)


def settings(**changes):
    """The thin built-in model on two tasks."""
    tasks = ("sentiment", "classification")
    few = {"data.tasks": tasks, "data.max_samples": 12, "data.heldout_samples": 4}
    config = get_config(**{"model.source": thin_model(), **few})
    config.data.max_prompt_tokens = 200
    config.update_from_flattened_dict(changes)
    return config


def data_of(**changes):
    config = parse_config(settings(**changes))
    policy = one_policy(config)
    return load_data(config, policy), config, policy


def test_a_template_replaces_the_tasks_and_names_the_labels():
    source = SourceConfig(template="{labels}? {text} =")
    task = make_task("sentiment", source)
    columns = {"text": "Fine {film}.", "label": "good", "labels": ("bad", "good")}
    assert task.prompt(columns) == "bad, good? Fine {film}. ="
    assert task.rewards == TASKS["sentiment"].rewards
    assert make_task("sentiment", SourceConfig()) is TASKS["sentiment"]


def test_what_the_template_leaves_out_is_not_shortened():
    assert make_task("classification", SourceConfig(template="{text}")).shorten == "text"
    assert make_task("qa", SourceConfig(template="{question}")).text_columns == ("question",)


def test_a_template_of_an_own_task_shows_columns_of_the_data_set(tmp_path):
    rows = [{"Body": f"{n} birds.", "Ask": "How many?", "hint": n} for n in range(8)]
    for split in ("train", "test"):
        lines = [json.dumps(row | {"Body": f"{split} {row['Body']}"}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    mine = {"source": str(tmp_path), "template": "{Body} {Ask} =", "rewards": OWN}
    config = settings()
    config.data.tasks = ("sums",)
    with config.unlocked():
        config.data.sums = mine
    parsed = parse_config(config)
    data = load_data(parsed, one_policy(parsed))
    assert sorted(item.example.prompt for item in data.train) == [
        f"train {n} birds. How many? =" for n in range(8)
    ]
    assert {item.example.columns["hint"] for item in data.train} == set(range(8))


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        ("Text:", "names no column"),
        ("{labels}", "names no column"),
        ("{text} {topic}", "names 'topic', which the task does not have; choose from text, labels"),
        ("{text}: {label}", "names 'label', which is the answer"),
        ("{text", "braces do not match"),
        ("{text!r}", "around something else"),
        ("{text:>9}", "around something else"),
        ("{}", "around something else"),
        ("{text.real}", "around something else"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, fragment):
    with pytest.raises(InputError) as caught:
        make_task("sentiment", SourceConfig(template=template))
    message = str(caught.value)
    assert message.startswith("config.data.sentiment.template=")
    assert fragment in message
    assert message.endswith(".")


def test_a_column_that_the_data_set_lacks_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": "b"}')
    (tmp_path / "test.jsonl").write_text('{"a": "c"}')
    config = settings()
    config.data.tasks = ("sums",)
    with config.unlocked():
        config.data.sums = {"source": str(tmp_path), "template": "{b}", "rewards": OWN}
    parsed = parse_config(config)
    with pytest.raises(InputError, match=r"data\.sums\.columns\.b is 'b', a column that .* 'a'"):
        load_data(parsed, one_policy(parsed))


def test_examples_stand_before_every_prompt_and_are_no_prompts_themselves():
    data, config, policy = data_of(**{"data.sentiment.shots": 2, "data.classification.shots": 5})
    plain, *_ = data_of()
    assert any("2 in the other split or shown before the prompts" in x for x in data.lines)
    labels = {"sentiment": 2, "classification": 5}
    for name, count in labels.items():
        form = rollouts.task_format(config, policy, name)
        task = config.task(name)
        shots = form.shots
        # Every label once, as there are as many examples as labels.
        assert len({shot.completion for shot in shots}) == len(shots) == count
        before = "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots)
        own = [item for item in data.train + data.heldout if item.task.name == name]
        assert len(own) == 16
        for item in own:
            assert item.example.prompt == before + task.prompt(item.example.columns)
            assert task.prompt(item.example.columns) not in {shot.prompt for shot in shots}
            assert item.tokens.tolist() == policy.encode(item.example.prompt)
    assert {item.example.prompt for item in plain.train} >= {
        shot.prompt for shot in rollouts.task_format(config, policy, "sentiment").shots
    }


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"data.sentiment.shots": 999}, ["config.data.sentiment.shots=999", "lower it"]),
        ({"data.sentiment.shots": -1}, ["shots=-1", "at least 0"]),
        (
            {"data.tasks": ("general",), "data.general.shots": 1},
            ["config.data.general.shots=1", "no reference completions"],
        ),
        ({"data.system": "Be brief."}, ["config.data.system='Be brief.'", "data.chat=True"]),
        ({"data.chat": True}, ["config.data.chat=True", "no chat template"]),
    ],
)
def test_prompts_that_cannot_be_written_are_refused(changes, fragments):
    with pytest.raises(InputError) as caught:
        data_of(**changes)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_a_chat_has_the_system_the_examples_as_turns_and_the_prompt():
    form = PromptFormat(render, True, "Be brief.", (Shot("1+1?", "2"), Shot("1+2?", "3")))
    assert form.write("2+2?") == "<s>Be brief.<u>1+1?<a>2<u>1+2?<a>3<u>2+2?<a>"
    # What a conversation says itself stays.
    assert form.write([dict(SYSTEM, content="Rhyme."), ASK]) == (
        "<s>Rhyme.<u>1+1?<a>2<u>1+2?<a>3<u>Well?<a>"
    )
    assert PromptFormat(render).write("plain") == "plain"
    assert PromptFormat(render).write([ASK]) == "<u>Well?<a>"


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        ([], "without messages"),
        ([ASK, {"role": "assistant", "content": "So."}], "ends with 'assistant'"),
        ([{"role": "user"}], "'role' and 'content'"),
        (["Well?"], "'role' and 'content'"),
        (7, "'role' and 'content'"),
    ],
)
def test_what_is_no_conversation_is_refused(prompt, fragment):
    with pytest.raises(InputError, match=fragment):
        PromptFormat(render).write(prompt)


def test_messages_need_a_template():
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        PromptFormat().write([ASK])


@pytest.fixture(scope="module")
def chat_run():
    """The thin built-in model with a chat template, which refuses what it does not know."""
    config = settings(**{"data.chat": False})
    parsed = parse_config(config)
    policy = load_policy(parsed)
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools.') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    form = PromptFormat(chat_writer(policy.tokenizer), True)
    parsed = dataclasses.replace(parsed, data=dataclasses.replace(parsed.data, chat=True))
    policy = dataclasses.replace(policy, prompt_format=form)
    return TrainedRun(parsed, policy, policy.zero)


def test_every_way_to_a_prompt_writes_the_same_chat(chat_run):
    config, policy, zero = chat_run
    data = load_data(config, policy)
    item = data.train[0]
    bare = item.task.prompt(item.example.columns)
    written = f"user: {bare}\nassistant:"
    assert item.example.prompt == written
    assert policy.encode(written) == item.tokens.tolist()
    ways = [bare, [{"role": "user", "content": bare}], Text(written)]
    counts = [adaptation.count_tokens(chat_run, way) for way in ways]
    assert counts == [len(item.tokens)] * 3
    assert len(set(adaptation.complete(chat_run, zero, ways))) == 1
    # An answer follows the template at once, without the space between words.
    assert item.task.completion(item.example) == item.example.columns["label"]


def test_a_template_that_refuses_messages_is_named(chat_run):
    with pytest.raises(InputError, match=r"refuses messages of tool, user \(No tools\.\)"):
        chat_run.policy.prompt_format.write([{"role": "tool", "content": "3"}, ASK])


def test_prompts_of_an_own_task_may_be_conversations(chat_run, tmp_path):
    for split in ("train", "test"):
        prompt = [SYSTEM, {"role": "user", "content": f"{split}?"}]
        lines = [json.dumps({"prompt": [*prompt[:1], dict(prompt[1], content=f"{split} {n}?")]})
                 for n in range(3)]  # fmt: skip
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    config = settings()
    config.data.tasks = ("talk",)
    with config.unlocked():
        config.data.talk = {"source": str(tmp_path), "rewards": OWN}
    data = load_data(parse_config(config), chat_run.policy)
    assert sorted(item.example.prompt for item in data.train) == [
        f"system: Be brief.\nuser: train {n}?\nassistant:" for n in range(3)
    ]
    with config.unlocked():
        config.data.talk.shots = 1
    lines = [json.dumps({"prompt": [ASK], "completion": " So."})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"config\.data\.talk\.shots=1: .* lists of messages"):
        load_data(parse_config(config), chat_run.policy)
    config.data.talk.shots = 0
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": 3}))
    with pytest.raises(InputError, match=r"train\.jsonl, line 1 has 3 in column 'prompt', where"):
        load_data(parse_config(config), chat_run.policy)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": [SYSTEM]}))
    with pytest.raises(InputError, match=r"train\.jsonl, line 1, column 'prompt': .*'system'"):
        load_data(parse_config(config), chat_run.policy)
