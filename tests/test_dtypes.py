"""`model.dtype=auto`: what it stands for, and that it is said."""

import types

import jax
import pytest

from grpocem_jax.training import loop as training
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError
from tests.runs import training_config


@pytest.mark.parametrize(
    ("platform", "capability", "fastest", "products"),
    [
        ("tpu", None, "bfloat16", "bfloat16"),
        ("gpu", "9.0", "bfloat16", "tf32"),
        ("gpu", "8.0", "bfloat16", "tf32"),
        ("gpu", "7.5", "float16", "float32"),  # a T4
        ("gpu", "6.1", "float32", "float32"),
        ("gpu", "gfx90a", "float32", "float32"),
        ("METAL", None, "float32", "float32"),
    ],
)
def test_the_types_in_which_a_device_multiplies(platform, capability, fastest, products, tmp_path):
    device = types.SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert devices.fast_dtype(device, tmp_path / "cpuinfo") == fastest
    with jax.default_matmul_precision(None):
        assert devices.float32_products(device) == products
    for exact in ("highest", "float32"):
        with jax.default_matmul_precision(exact):
            assert devices.float32_products(device) == "float32"


@pytest.mark.parametrize(
    ("dtype", "said"), [("float32", "float32, products in tf32"), ("bfloat16", "bfloat16")]
)
def test_a_run_says_in_which_type_products_are(dtype, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "float32_products", lambda _: "tf32")
    settings = {"model.dtype": dtype, "train.max_steps": 1}
    summary = training.train(training_config(**settings), tmp_path)
    assert capsys.readouterr().out.splitlines()[0].endswith(f", {said}")
    assert summary["float32_products"] == "tf32"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", "bfloat16"),
        ("flags\t\t: fpu avx512_bf16\n", "float32"),
        (None, "float32"),
    ],
)
def test_the_fastest_type_of_a_processor(listed, expected, tmp_path):
    processor = tmp_path / "cpuinfo"
    if listed is not None:
        processor.write_text(listed)
    assert devices.fast_dtype(types.SimpleNamespace(platform="cpu"), processor) == expected


def test_a_run_says_what_auto_stands_for_and_continues_in_that_type_alone(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(devices, "fast_dtype", lambda *_: "bfloat16")
    settings = {"model.dtype": "auto", "train.max_steps": 1}
    summary = training.train(training_config(**settings), tmp_path / "run")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"device    cpu ({summary['device']}), bfloat16, by model.dtype=auto"
    assert summary["dtype"] == "bfloat16"
    again = {**settings, "train.max_steps": 2}
    monkeypatch.setattr(devices, "fast_dtype", lambda *_: "float32")
    with pytest.raises(InputError, match=r"was started on another model.dtype; give another"):
        training.train(training_config(**again), tmp_path / "run")
    monkeypatch.setattr(devices, "fast_dtype", lambda *_: "bfloat16")
    assert training.train(training_config(**again), tmp_path / "run")["resumed_after_step"] == 1
