"""A helper of the tests: the difference of two arrays."""

import numpy as np


def gap(a, b) -> float:
    """The largest difference between a and b, relative to the largest absolute value in b.

    The arrays have one shape, and every value of a is finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
