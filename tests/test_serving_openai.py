"""The official client of OpenAI, unchanged, against the server."""

import math

import numpy as np
import pytest

from grpocem_jax import adaptation
from grpocem_jax.runs import checkpoints
from tests.runs import random_offsets
from tests.serving import PROMPT, thin_run

openai = pytest.importorskip("openai", reason="openai is not installed")

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was it cold?"}]


@pytest.fixture(scope="module")
def client(served):
    made = openai.OpenAI(
        base_url=f"{served.server.url}/v1", api_key=served.keys["alice"], max_retries=0
    )
    with made as client:
        yield client


@pytest.fixture(scope="module")
def model(served):
    return served.server.catalogue.base


def alone(prompt, offsets=None):
    """What `complete` makes of a prompt, by itself."""
    run = thin_run()
    return adaptation.complete(run, run.offsets if offsets is None else offsets, [prompt])[0]


def test_a_greedy_completion_is_that_of_the_model_alone(client, model):
    found = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=4)
    (choice,) = found.choices
    assert choice.text == alone(PROMPT)
    assert choice.finish_reason == "length"
    assert found.usage.completion_tokens == 4
    assert found.usage.prompt_tokens == len(thin_run().policy.encode(PROMPT))
    assert found.usage.total_tokens == found.usage.prompt_tokens + 4
    assert found.model == model


def test_the_stream_adds_up_to_the_whole_and_ends_with_the_counts(client, model):
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 9, "seed": 3, "temperature": 1}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(x.choices[0].text for x in chunks if x.choices) == whole.choices[0].text
    assert [x.choices[0].finish_reason for x in chunks if x.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_equal_seeds_make_equal_completions_and_n_takes_the_next_seeds(client, model):
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 9, "temperature": 1}
    several = client.completions.create(**asked, seed=5, n=3).choices
    one_by_one = [client.completions.create(**asked, seed=5 + i).choices[0].text for i in range(3)]
    assert [x.text for x in several] == one_by_one
    assert [x.index for x in several] == [0, 1, 2]
    assert len(set(one_by_one)) > 1


def test_several_prompts_as_text_and_as_tokens(client, model):
    other = PROMPT.replace("soup", "tea")
    tokens = thin_run().policy.encode(PROMPT)
    as_text = client.completions.create(
        model=model, prompt=[PROMPT, other], temperature=0, max_tokens=4
    )
    as_tokens = client.completions.create(model=model, prompt=tokens, temperature=0, max_tokens=4)
    assert [x.text for x in as_text.choices] == [alone(PROMPT), alone(other)]
    assert as_tokens.choices[0].text == alone(PROMPT)


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client, model):
    asked = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    text = client.completions.create(**asked).choices[0].text
    stop = text.split()[2]
    (choice,) = client.completions.create(**asked, stop=[stop, "never"]).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_conversation_is_written_by_the_template_of_the_model(client, model):
    asked = {"model": model, "messages": CHAT, "temperature": 0, "max_tokens": 4}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert message.content == alone(adaptation.Text(thin_run().policy.prompt_format.write(CHAT)))
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [x.choices[0].delta for x in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(x.content or "" for x in deltas) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    parts = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "Was it cold?"}]}]
    again = client.chat.completions.create(**{**asked, "messages": parts})
    assert again.choices[0].message.content == message.content


def test_an_adapter_is_a_model(served, client, model, tmp_path):
    """Uploaded, listed, used with its own tokens; the base's are as before."""
    run = thin_run()
    offsets = random_offsets(run.policy.zero, seed=4, scale=3.0)
    assert alone(PROMPT, offsets) != alone(PROMPT)
    settings = run.policy.adapter_config(run.config.adapter)
    checkpoints.save_adapter(tmp_path / "own", offsets, settings, "A card.")
    from grpocem_jax.serving import archive

    uploaded = served(
        "POST",
        "/v1/adapters/upload?name=loud",
        content=archive.pack(tmp_path / "own"),
        headers={"Content-Type": "application/zip"},
    )
    assert uploaded.status_code == 201, uploaded.text
    own = uploaded.json()["id"]
    listed = {x.id: x.owned_by for x in client.models.list()}
    assert listed == {model: "operator", own: "alice"}
    assert client.models.retrieve(own).id == own
    texts = [
        client.completions.create(model=x, prompt=PROMPT, temperature=0, max_tokens=4)
        for x in (own, model)
    ]
    assert [x.choices[0].text for x in texts] == [alone(PROMPT, offsets), alone(PROMPT)]


def test_an_adapter_is_searched_for_watched_and_downloaded(served, client, tmp_path):
    found = served.adapter(method="gradient", generations=3, seed=1, name="mine")
    assert found["status"] == "ready"
    assert found["asked"] == {"method": "gradient", "examples": 4, "reward": None, "seed": 1}
    result = found["result"]
    assert result["adapted"] == (result["returned"] != "start")
    assert math.isfinite(result["held_back_gain"])
    assert result["seconds"] > 0
    curve = found["curve"]
    assert [x["generation"] for x in curve] == [1, 2, 3]
    assert all(math.isfinite(x["best"]) and math.isfinite(x["mean"]) for x in curve)
    assert curve[0]["best"] < curve[2]["best"]
    assert "curve" not in served("GET", "/v1/adapters").json()["data"][0]
    events = served("GET", f"/v1/adapters/{found['id']}/events").text
    assert events.endswith("data: [DONE]\n\n")
    assert '"status": "ready"' in events
    content = served("GET", f"/v1/adapters/{found['id']}/download")
    assert content.headers["content-type"] == "application/zip"
    (tmp_path / "a.zip").write_bytes(content.content)
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path)
    policy = thin_run().policy
    offsets = checkpoints.load_adapter(
        tmp_path / "adapter", policy.zero, base_sha256=policy.pretrained.sha256
    )
    kept = served.server.catalogue.load(found["id"])
    assert all(np.array_equal(offsets[name], kept[name]) for name in kept)
    answer = client.completions.create(
        model=found["id"], prompt=PROMPT, temperature=0, max_tokens=4
    )
    assert answer.choices[0].text == alone(PROMPT, offsets)


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "nobody"}, "NotFoundError", "model"),
        ({"model": "adapter-" + "0" * 24}, "NotFoundError", "model"),
        ({"prompt": ""}, "BadRequestError", "prompt"),
        ({"prompt": "soup " * 40}, "BadRequestError", "prompt"),
        ({"prompt": [3, 10**6]}, "BadRequestError", "prompt"),
        ({"max_tokens": 17}, "BadRequestError", "max_tokens"),
        ({"temperature": -1}, "BadRequestError", "temperature"),
        ({"top_p": 0}, "BadRequestError", "top_p"),
        ({"stop": 7}, "BadRequestError", "stop"),
        ({"stop": ["a", ""]}, "BadRequestError", "stop"),
        ({"stop": list("abcde")}, "BadRequestError", "stop"),
        ({"n": 33}, "BadRequestError", "n"),
        ({"echo": True}, "BadRequestError", "echo"),
        ({"extra_body": {"colour": "red"}}, "BadRequestError", "colour"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_is_an_error_of_the_client_that_names_the_field(
    client, model, changes, error, param
):
    with pytest.raises(getattr(openai, error)) as raised:
        client.completions.create(**{"model": model, "prompt": PROMPT, **changes})
    assert raised.value.param == param
    assert param in raised.value.message


def test_a_wrong_key_is_an_authentication_error(served, model):
    with (
        openai.OpenAI(
            base_url=f"{served.server.url}/v1", api_key="gj-wrong", max_retries=0
        ) as client,
        pytest.raises(openai.AuthenticationError, match="not known"),
    ):
        client.completions.create(model=model, prompt=PROMPT)
