"""The public API: every name is there, the parts need no Flax, and README's example runs."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import grpocem_jax

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", grpocem_jax.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(grpocem_jax, name)
    assert value.__doc__ if callable(value) else len(value) > 0


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = grpocem_jax.nonsense


def test_adapters_sampling_and_grpo_import_no_flax_and_no_transformers():
    code = (
        "import sys, grpocem_jax, grpocem_jax.grpo, grpocem_jax.sampling, grpocem_jax.adapters.svf;"
        "print(sorted({'flax', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_example_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    gradient = names["gradient"]
    assert set(gradient) == {f"h.{i}.attn.c_proj" for i in range(4)}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
    value = names["log_likelihood"](names["offsets"])
    assert -5.0 < float(value) < -0.1
