"""A pair drawn by a public coin: its tails, and what it leaves out."""

import numpy as np
import pytest

from fedsim.privacy.dominating_pairs import mixture_pair
from fedsim.privacy.events import Adjacency
from fedsim.privacy.gaussian_pairs import GaussianPair
from fedsim.privacy.mixed_pair import mixed


def joined(norm: float, share: float = 0.1) -> GaussianPair:
    log_weights = np.log([1 - share, share])
    return mixture_pair(np.array([0.0, norm]), log_weights, 1.0, Adjacency.ADD_OR_REMOVE_ONE_USER)


@pytest.mark.parametrize("rare", [0.5, 1e-2, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-12])
def test_no_more_than_the_tail_lies_beyond_either_end(rare: float, tail: float) -> None:
    pair = mixed((1 - rare, joined(1.0)), (rare, joined(8.0, 0.9)))
    low, high = pair.loss_range(tail)
    cells = pair.cells(np.linspace(low, high, 50))
    assert cells.p[-1] <= tail * (1 + 1e-3)
    assert cells.q[0] <= tail * (1 + 1e-3)
    assert cells.p.sum() == pytest.approx(1, abs=1e-12)
    assert cells.q.sum() == pytest.approx(1, abs=1e-12)


def test_what_is_left_out_is_charged_in_every_cell_of_both() -> None:
    one, other = joined(1.0), joined(2.0)
    pair = mixed((1.0, one), (3e-300, other))
    cells = pair.cells(np.linspace(-1e3, 1e3, 50))
    assert cells.p_error.min() >= 3e-300
    assert cells.q_error.min() >= 3e-300
    assert mixed((1.0, one), (0.0, other)) is one
