"""Linear recursions, without the filters of SciPy, which take half a second to import."""

import numpy as np
import scipy

MOST_VALUES = 1 << 22
"""Of a banded matrix; beyond it the import is the smaller cost."""


def recursion(coefficients: np.ndarray | list[float] | tuple[float, ...], values: np.ndarray) -> np.ndarray:
    """y with Σ_j c_j y_{n−j} = value_n, float64 [n]: what the filter 1/c(z) makes of the values.

    Args:
        coefficients: c_0, c_1, …; c_0 ≠ 0.
        values: float64 [n].
    """
    c = np.asarray(coefficients, dtype=np.float64)[: max(len(values), 1)]
    found: np.ndarray
    if len(c) == 1:
        found = values / c[0]
    elif len(c) * len(values) > MOST_VALUES:
        found = scipy.signal.lfilter([1.0], c, values)
    else:
        band = np.empty((len(c), len(values)), order="F")
        band[:] = (c / c[0])[:, None]
        found = scipy.linalg.blas.dtbsv(len(c) - 1, band, values / c[0], lower=1, diag=1)
    return found
