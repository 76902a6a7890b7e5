"""Held-out comparison: gains and intervals against numbers worked out by hand."""

import math

import numpy as np
import pytest

from grpocem_jax import evaluation


def test_gains_are_paired_and_overall_weighs_tasks_alike():
    tasks = ["qa"] * 4 + ["general"] * 2
    before = np.array([0.0, 0.0, 1.0, 1.0, -1.0, 0.0])
    after = np.array([1.0, 0.0, 1.0, 2.0, 0.0, 1.0])
    gains = evaluation.compare(["qa", "general"], tasks, before, after)
    # qa: differences 1, 0, 0, 1: mean 0.5, sample variance 1/3, standard error sqrt(1/12).
    half = 1.96 * math.sqrt(1 / 12)
    qa = gains["qa"]
    assert (qa.before, qa.after, qa.gain, qa.n) == (0.5, 1.0, 0.5, 4)
    assert qa.gain_ci95 == pytest.approx((0.5 - half, 0.5 + half))
    # general: differences 1 and 1: no variance.
    assert gains["general"].gain_ci95 == pytest.approx((1.0, 1.0))
    # overall: (0.5 + 1) / 2, not the mean over prompts (0.667); standard error sqrt(1/12) / 2.
    overall = gains["overall"]
    assert overall.gain == pytest.approx(0.75)
    assert overall.n == 6
    assert overall.gain_ci95 == pytest.approx((0.75 - half / 2, 0.75 + half / 2))


def test_prompts_that_abstained_are_left_out():
    gains = evaluation.compare(
        ["qa"], ["qa"] * 3, np.array([0.0, np.nan, 0.0]), np.array([1.0, 1.0, 0.0])
    )
    assert (gains["qa"].n, gains["qa"].gain) == (2, 0.5)
    assert evaluation.compare(["qa"], ["qa"], np.array([np.nan]), np.array([0.0])) == {}
