"""Adapters by HTTP: searches of every kind, uploads, and what is refused."""

import io
import json
import zipfile

import pytest
from safetensors import SafetensorError

from grpocem_jax import adaptation
from grpocem_jax.runs import checkpoints
from tests.runs import random_offsets
from tests.serving import PROMPT, holding, serving, thin_run

ROWS = [
    {"text": f"The {x} was {y}.", "label": z}
    for x, y, z in (
        ("soup", "cold", "negative"),
        ("tea", "good", "positive"),
        ("room", "bad", "negative"),
        ("sea", "warm", "positive"),
    )
]
UPLOAD = "/v1/adapters/upload"


@pytest.mark.parametrize("method", ["gradient", "cem", None])
def test_a_search_is_handed_over_as_it_was_asked_for(tmp_path, method):
    given = [{"prompt": PROMPT, "completion": " cold."}, {"text": "a b c"}, "d e f"]
    asked = {"examples": given, "generations": 3, "seed": 7, "method": method}
    with holding(tmp_path) as held:
        shown = held("POST", "/v1/adapters", json=asked).json()
        (job,) = held.server.searches.jobs
    texts = [adaptation.Text(PROMPT, " cold."), adaptation.Text("a b c"), adaptation.Text("d e f")]
    assert job.examples == texts
    assert job.options == {"method": method or "gradient", "seed": 7}
    assert job.generations == shown["generations"] == 3
    assert shown["asked"] == {
        "method": method or "gradient",
        "examples": 3,
        "reward": None,
        "seed": 7,
    }


def test_a_prompt_is_adapted_to_by_itself(served):
    made = served("POST", "/v1/adapters", json={"prompt": PROMPT, "generations": 2})
    found = served.ended(made.json()["id"])
    assert found["asked"]["examples"] == 1
    assert found["result"]["fitness_unit"] == "nats/token"


def test_a_prompt_of_one_token_is_left_alone_and_says_why(served):
    made = served("POST", "/v1/adapters", json={"prompt": "a", "generations": 2})
    found = served.ended(made.json()["id"])
    assert found["status"] == "ready"
    assert not found["result"]["adapted"]
    assert "single token" in found["result"]["note"]
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    base = served.server.catalogue.base
    texts = [
        served("POST", "/v1/completions", json={**asked, "model": x}).json()["choices"]
        for x in (found["id"], base)
    ]
    assert texts[0] == texts[1]


def test_prompts_are_adapted_to_by_their_reward(served):
    asked = {"prompts": ROWS, "reward": "sentiment", "generations": 2, "seed": 3}
    made = served("POST", "/v1/adapters", json=asked).json()
    assert made["asked"] == {"method": "cem", "examples": 4, "reward": "sentiment", "seed": 3}
    found = served.ended(made["id"])
    assert found["status"] == "ready", found
    assert found["result"]["fitness_unit"] == "reward"
    assert found["generation"] == 2
    again = served("POST", "/v1/adapters", json={**asked, "generations": 200}).json()
    assert served("DELETE", f"/v1/adapters/{again['id']}").json()["deleted"]
    # Those that wait go on.
    assert (
        served.ended(served("POST", "/v1/adapters", json=asked).json()["id"])["status"] == "ready"
    )


def test_completions_go_on_while_a_search_by_reward_runs(served):
    asked = {"prompts": ROWS, "reward": "sentiment", "generations": 200}
    id = served("POST", "/v1/adapters", json=asked).json()["id"]
    completion = {"model": served.server.catalogue.base, "prompt": PROMPT, "max_tokens": 2}
    for _ in range(5):
        assert served("POST", "/v1/completions", json=completion).status_code == 200
    assert served("GET", f"/v1/adapters/{id}").json()["status"] in ("queued", "running")
    assert served("DELETE", f"/v1/adapters/{id}").json()["deleted"]


def test_a_page_of_adapters_at_a_time(tmp_path):
    with serving(tmp_path) as served:
        made = [served.adapter(generations=1, name=str(i))["name"] for i in range(3)]
        first = served("GET", "/v1/adapters?limit=2").json()
        assert [x["name"] for x in first["data"]] == made[:0:-1]
        assert first["has_more"]
        after = first["data"][-1]["id"]
        second = served("GET", f"/v1/adapters?limit=2&after={after}").json()
        assert [x["name"] for x in second["data"]] == made[:1]
        assert not second["has_more"]


@pytest.mark.parametrize("limit", ["", "0", "-1", "2.5", "a", "1001", "0" * 8 + "1999", "1" * 5000])
def test_another_limit_than_1_to_1000_is_refused(served, limit):
    found = served("GET", f"/v1/adapters?limit={limit}")
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == "limit"
    assert "must be an integer from 1 to 1000" in found.json()["error"]["message"]


LONG = "soup " * 3000


@pytest.mark.parametrize(
    ("body", "param", "fragment"),
    [
        ({}, "examples", "give examples"),
        ({"examples": []}, "examples", "1 to 64"),
        ({"examples": ["a b c"] * 65}, "examples", "1 to 64"),
        ({"examples": "a b c"}, "examples", "a list"),
        ({"examples": ["a b c", ""]}, "examples[1]", "a string"),
        ({"examples": [" "]}, "examples[0]", "empty"),
        ({"examples": ["a b c", 7]}, "examples[1]", "a string"),
        ({"examples": ["a b c", LONG]}, "examples[1]", "at most"),
        ({"examples": ["a"]}, "examples[0]", "one token"),
        ({"examples": [{"text": "a b", "completion": "c"}]}, "examples[0]", "prompt and"),
        ({"examples": [{"prompt": "a b", "answer": "c"}]}, "examples[0].answer", "no such field"),
        ({"examples": [[{"role": "king", "content": "a"}]]}, "examples[0][0].role", "one of"),
        ({"examples": ["a b c"], "prompt": "a"}, "examples", "examples and prompt"),
        ({"examples": ["a b c"], "generations": 0}, "generations", "from 1 to 200"),
        ({"examples": ["a b c"], "generations": 201}, "generations", "from 1 to 200"),
        ({"examples": ["a b c"], "generations": 2.0}, "generations", "an integer"),
        ({"examples": ["a b c"], "seed": -1}, "seed", "from 0 to"),
        ({"examples": ["a b c"], "method": "grpo"}, "method", "gradient, cem, experts"),
        ({"examples": ["a b c"], "method": "experts"}, "method", "no library"),
        ({"examples": ["a b c"], "name": "a\nb"}, "name", "printable"),
        ({"examples": ["a b c"], "reward": "qa"}, "reward", "texts have none"),
        ({"prompts": ROWS}, "reward", "prompts have one"),
        ({"prompts": ROWS, "reward": "beauty"}, "reward", "one of"),
        ({"prompts": ROWS[:3], "reward": "sentiment"}, "prompts", "at least 4"),
        ({"prompts": ["a"] * 4, "reward": "sentiment"}, "prompts[0]", "text, label"),
        (
            {"prompts": [{"text": "a", "label": "blue"}] * 4, "reward": "sentiment"},
            "prompts",
            "prompts[0]",
        ),
        (
            {"prompts": [{"text": LONG, "label": "positive"}] * 4, "reward": "sentiment"},
            "prompts[0]",
            "at most",
        ),
        (
            {"prompts": ROWS, "reward": "sentiment", "method": "gradient"},
            "method",
            "no gradient",
        ),
    ],
    ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else None,
)
def test_a_search_that_cannot_be_is_refused_by_the_field(served, body, param, fragment):
    found = served("POST", "/v1/adapters", json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param
    assert param.split("[")[0] in error["message"]
    assert fragment in error["message"]
    assert error["message"].endswith(".")


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of an adapter that fits, by name."""
    run, folder = thin_run(), tmp_path_factory.mktemp("own")
    settings = run.policy.adapter_config(run.config.adapter)
    offsets = random_offsets(run.policy.zero)
    checkpoints.save_adapter(folder, offsets, settings, "A card.")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def send(served, content):
    return served("POST", UPLOAD, content=content, headers={"Content-Type": "application/zip"})


@pytest.mark.parametrize("place", ["", "adapter/", "any/depth/"])
def test_an_adapter_is_uploaded_from_any_folder_of_a_zip(served, files, place):
    found = send(served, zipped({f"{place}{name}": data for name, data in files.items()}))
    assert found.status_code == 201
    assert found.json()["status"] == "ready"
    assert served.server.catalogue.load(found.json()["id"]).keys() == thin_run().policy.zero.keys()


def test_an_upload_to_a_full_disk_leaves_nothing_and_may_be_tried_again(served, files, monkeypatch):
    def full_disk(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before = served("GET", "/v1/adapters").json()
    with monkeypatch.context() as patch:
        patch.setattr("grpocem_jax.utils.files.save_file", full_disk)
        found = send(served, zipped(files))
    assert found.status_code == 503, found.text
    assert "the store fails (SafetensorError); try again later" in found.text
    assert served("GET", "/v1/adapters").json() == before
    assert send(served, zipped(files)).status_code == 201


def changed(**fields):
    def change(files):
        config = json.loads(files["adapter_config.json"]) | fields
        config = {name: value for name, value in config.items() if value is not None}
        return {**files, "adapter_config.json": json.dumps(config).encode()}

    return change


def other_arrays(files):
    data = bytearray(files["adapter_model.safetensors"])
    data[-1] ^= 1
    return {**files, "adapter_model.safetensors": bytes(data)}


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda files: {}, "0 files adapter_model.safetensors"),
        (lambda files: {"README.md": b"a"}, "0 files adapter_model.safetensors"),
        (lambda files: {**files, "b/adapter_config.json": b"{}"}, "2 files adapter_config.json"),
        (lambda files: files | {str(i): b"" for i in range(99)}, "files"),
        (lambda files: {**files, "adapter_config.json": b"{"}, "cannot be read as JSON"),
        (lambda files: {**files, "adapter_model.safetensors": b"a"}, "read as safetensors"),
        (lambda files: {**files, "adapter_model.safetensors": b"a" * 10**7}, "bytes of"),
        (other_arrays, "checksum differs"),
        (changed(adapter_sha256=None), "adapter_sha256"),
        (changed(base_sha256="0" * 64), "not those of this model"),
        (changed(base_sha256=None), "which model"),
        (changed(rank_ratio=0.5), "rank_ratio"),
        (changed(type="lora"), "type"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_an_upload_that_is_no_adapter_of_this_model_is_refused(served, files, change, fragment):
    found = send(served, zipped(change(files)))
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["code"] == "invalid_adapter"
    assert fragment in error["message"]
    assert "/tmp" not in error["message"].replace(str(thin_run().policy.pretrained.source), "")


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_zip_is_refused_however_it_is_compressed(served, files, compression):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    data = bytearray(content.getvalue())
    first = data.index(b"adapter_model.safetensors") + len("adapter_model.safetensors")
    data[first + 9 : first + 49] = b"\xff" * 40  # behind the settings of LZMA
    found = send(served, bytes(data))
    assert found.status_code == 400, found.text
    assert "the body is no zip of an adapter" in found.json()["error"]["message"]


def test_an_upload_that_is_too_large_is_refused(served):
    found = send(served, b"a" * 10**6)
    assert found.status_code == 413


def test_a_damaged_adapter_is_not_used_and_says_so(served, files):
    id = send(served, zipped(files)).json()["id"]
    path = served.server.store.folder / "adapters" / "alice" / id / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    used = served("POST", "/v1/completions", json={"model": id, "prompt": PROMPT})
    assert used.status_code == 400
    assert "checksum differs" in used.json()["error"]["message"]
    assert served("GET", f"/v1/adapters/{id}/download").status_code == 500


def test_an_adapter_of_another_base_is_listed_but_not_used(served):
    from grpocem_jax.serving.options import Limits

    store = served.server.store
    record = store.add("alice", base="another", limits=Limits(), asked={})
    store.keep(record, lambda folder: "a hash", {}, 0)
    assert served("GET", f"/v1/adapters/{record.id}").json()["status"] == "ready"
    assert record.id not in served("GET", "/v1/models").text
    for method, path, options in (
        ("POST", "/v1/completions", {"json": {"model": record.id, "prompt": PROMPT}}),
        ("GET", f"/v1/adapters/{record.id}/download", {}),
    ):
        found = served(method, path, **options)
        assert found.status_code == 400
        assert found.json()["error"]["code"] == "adapter_of_another_base"
