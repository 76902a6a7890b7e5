"""Exports in transformers 5, in transformers 4.57 and in PEFT; ``make parity`` has all three.

``TRANSFORMERS_4`` names the Python of an environment with torch and transformers 4.57.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grpocem_jax import adaptation
from grpocem_jax.export import model as export
from grpocem_jax.models import base as models
from grpocem_jax.models import hub
from tests.parity import bases

torch = pytest.importorskip("torch", reason="PyTorch is not installed; use make parity")

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402 (after the skip)

from tests.parity.elsewhere import TEXT  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # PEFT uses deprecated parts of transformers.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 2e-4
PYTHONS = {"5": sys.executable, "4": os.environ.get("TRANSFORMERS_4")}


SCRIPT = Path(__file__).with_name("elsewhere.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base models, exports of an adapter of zeros and of another, and the other as LoRAs."""
    top = tmp_path_factory.mktemp("exports")
    for case, base in bases.BASES.items():
        folder = top / case
        bases.write_base(folder / "base", base)
        for name, scale in (("zero", 0.0), ("adapted", 0.3)):
            bases.write_run(folder / f"{name}-run", folder / "base", base.sites, scale=scale)
            found = export.export_model(folder / f"{name}-run", folder / name)
            assert found.transformers_difference - found.rounding < TOLERANCE
        run = folder / "adapted-run"
        export.export_model(run, folder / "exact", dtype="float32")
        export.export_model(run, folder / "lora", format="peft")
        export.export_model(run, folder / "lora4", format="peft", rank=4)
    return top


def look(version, folders):
    """What a transformers makes of folders, in their order."""
    command = [PYTHONS[version], str(SCRIPT), *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"\n{version}." in f"\n{result.stderr}"
    return list(json.loads(result.stdout).values())


@pytest.fixture(scope="module")
def looked(folders):
    """By version and case what it makes of the base, as far as it is for it, and of the exports."""
    names = {"5": ("base", "zero", "adapted"), "4": ("zero", "adapted")}
    found = {}
    for version, parts in names.items():
        if PYTHONS[version] is not None:
            results = iter(look(version, [folders / c / n for c in bases.BASES for n in parts]))
            found[version] = {c: {n: next(results) for n in parts} for c in bases.BASES}
    return found


@pytest.fixture(params=bases.BASES)
def case(request):
    return request.param


@pytest.fixture
def folder(folders, case):
    return folders / case


@pytest.fixture
def five(looked, case):
    return looked["5"][case]


@pytest.fixture(params=PYTHONS)
def version(request):
    if PYTHONS[request.param] is None:
        pytest.skip("TRANSFORMERS_4 names no Python with transformers 4; use make parity")
    return request.param


@pytest.fixture
def found(looked, version, case):
    return looked[version][case]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def our_logits(params, offsets, model, tokens):
    def of_row(row):
        hidden = model.forward(params, offsets, row, np.ones(len(row), bool))
        return model.logits(params, hidden)

    return np.asarray(jax.vmap(of_row)(np.array(tokens)))


def test_an_export_of_zeros_computes_and_writes_what_its_base_does(found, five):
    base, zero = five["base"], found["zero"]
    close(zero["logits"], base["logits"])
    assert zero["written"] == base["written"]
    assert len(zero["written"][0]) > 3


def test_an_export_computes_what_we_do(found, five, folder):
    loaded = hub.load_model(str(folder / "adapted"))
    params = models.cast_params(loaded.params, np.float32)
    adapted = found["adapted"]
    close(adapted["logits"], our_logits(params, {}, loaded.build(), adapted["tokens"]))
    assert np.abs(np.subtract(adapted["logits"], five["base"]["logits"])).max() > 0.5
    assert adapted["written"] == five["adapted"]["written"]


def test_an_export_has_its_bases_settings(found, case, five):
    for name in ("zero", "adapted"):
        assert found[name]["dtype"] == f"torch.{bases.BASES[case].dtype}"
        assert found[name]["generation"].items() >= bases.GENERATION.items()
        assert found[name]["ends"] == five["base"]["ends"] == [0, [1, 2], 3]


def test_an_export_reads_and_writes_text_as_its_base_does(found, version, folder):
    """In transformers 4 as in training; Qwen2's class in transformers 5 cuts words its own way."""
    for name in ("zero", "adapted"):
        assert found[name]["chat"] == "<s>w9 w10<turn>"
        if version == "5":
            assert found[name]["ids"] == found["base"]["ids"]
            assert found[name]["text"] == found["base"]["text"]
        else:
            tokenizer = hub.load_model(str(folder / "base")).tokenizer
            assert found[name]["ids"] == tokenizer.encode(TEXT) == [0, 7, 8, 4, 9, 60, 12, 5]
            assert found[name]["text"] == "w7 w8 w9 w60 w12 w5"


def test_transformers_4_reads_what_transformers_5_wrote_once_it_is_exported(tmp_path):
    """transformers 4 has no TokenizersBackend and no list of extra special tokens."""
    if PYTHONS["4"] is None:
        pytest.skip("TRANSFORMERS_4 names no Python with transformers 4; use make parity")
    base = bases.BASES["qwen2-untied"]
    bases.write_base(tmp_path / "plain", base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "TokenizersBackend"
    assert config["extra_special_tokens"] == ["<turn>"]
    bases.write_run(tmp_path / "run", tmp_path / "base", base.sites, scale=0.0)
    export.export_model(tmp_path / "run", tmp_path / "out")
    (five,) = look("5", [tmp_path / "base"])
    (four,) = look("4", [tmp_path / "out"])
    close(four["logits"], five["logits"])
    for name in ("written", "ends", "chat"):
        assert four[name] == five[name]


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT is not installed; use make parity")


def on_base(folder, name, peft):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / name).eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_peft_loads_the_adapter_at_its_sites_and_nowhere_else(folder, case, peft):
    model = on_base(folder, "lora", peft)
    layers = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    run = adaptation.load_run(folder / "adapted-run")
    pretrained = run.policy.pretrained
    prefix = pretrained.architecture.layout(pretrained.config).prefix
    assert layers == {f"{prefix}{site}" for site in run.policy.sites}
    config = peft.PeftConfig.from_pretrained(folder / "lora")
    assert config.fan_in_fan_out == case.startswith("gpt2")
    assert config.base_model_name_or_path == str(folder / "base")


def test_a_lora_of_full_rank_computes_and_writes_what_the_adapted_model_does(folder, five, peft):
    tokens = five["adapted"]["tokens"]
    run = adaptation.load_run(folder / "adapted-run")
    policy = run.policy
    expected = our_logits(
        models.cast_params(policy.params, np.float32), run.offsets, policy.model, tokens
    )
    model = on_base(folder, "lora", peft)
    close(torch_logits(model, tokens), expected)
    merged = AutoModelForCausalLM.from_pretrained(folder / "exact")
    prompt = torch.tensor(tokens)[:, :5]
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 12}
    written = model.generate(input_ids=prompt, **given)
    assert torch.equal(written, merged.generate(input_ids=prompt, **given))
    assert written.shape[1] > 8
    close(torch_logits(model.merge_and_unload(), tokens), expected)


def test_a_lora_of_a_lower_rank_is_as_wrong_in_peft_as_was_said(folder, peft):
    tokens = export._tokens(adaptation.load_run(folder / "adapted-run").policy.model)
    found = torch_logits(on_base(folder, "lora4", peft), tokens)
    exact = torch_logits(on_base(folder, "lora", peft), tokens)
    record = json.loads((folder / "lora4" / "export.json").read_text())
    assert np.abs(found - exact).max() == pytest.approx(record["difference"], abs=TOLERANCE)
    assert record["difference"] > 0.1
