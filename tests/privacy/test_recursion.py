"""Linear recursions, against SciPy's filter."""

import numpy as np
import pytest
import scipy

from fedsim.privacy import recursion as module
from fedsim.privacy.recursion import recursion


@pytest.mark.parametrize("most", [module.MOST_VALUES, 0])
@pytest.mark.parametrize(("length", "terms"), [(1, 1), (1, 3), (7, 1), (50, 2), (50, 50), (3, 10), (200, 5)])
def test_it_is_the_filter(length: int, terms: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_VALUES", most)
    draw = np.random.default_rng(length + terms)
    coefficients = np.append(1.7, 0.3 * draw.normal(size=terms - 1))
    values = draw.normal(size=length)
    for given in (values, values[::-1], np.ones(length)):
        np.testing.assert_allclose(
            recursion(coefficients, given), scipy.signal.lfilter([1.0], coefficients, given), atol=1e-9
        )
