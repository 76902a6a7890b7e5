"""Means of what there is."""

import numpy as np


def mean_of_present(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean along an axis without what is NaN, such as rewards that abstain; NaN where all is."""
    present = ~np.isnan(values)
    count = present.sum(axis)
    sums = np.where(present, values, 0.0).sum(axis)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)
