"""Norms of parameters of millions of values, of which float32 sums would fall short by more than the margin."""

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, fast_sum

from fedsim.clip import Clip
from fedsim.gradients import CLIP_MARGIN, CausalLanguageModel
from fedsim.gradients.per_unit.products import squared_row_norms
from fedsim.rows import TokenRows


class OneDirection(torch.nn.Module):
    """A large parameter that acts through its product with one direction: its gradient is a multiple of that."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.direction = torch.randn(shape)
        self.weight = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + (self.weight * self.direction).sum())


class Large(torch.nn.Module):
    """A language model that trains one such parameter."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY), requires_grad=False)
        self.layer = OneDirection(shape)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table[input_ids])


@pytest.mark.parametrize("shape", [(8_000_001,), (2_000, 4_001)])
def test_a_unit_with_millions_of_values_stays_within_the_clip(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows = TokenRows.from_lists([[1, 2, 3, 4]])
    found = fast_sum(Large(shape), rows, np.array([0]), Clip(norm=1e-3), objective=CausalLanguageModel())
    norm = float(torch.linalg.vector_norm(found.total, dtype=torch.float64))
    assert norm <= 1e-3
    assert norm >= 1e-3 * (1 - 2 * CLIP_MARGIN)


@pytest.mark.parametrize("values", [1, 1023, 1024, 1025, 70_000, 3_000_000])
def test_norms_hold_for_values_that_a_running_sum_would_lose(values: int) -> None:
    # Each value but the first is far below the rounding of their sum.
    rows = torch.full((2, values), 2.0**-13)
    rows[:, : min(values, 64)] = 1.0
    exact = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    off = (squared_row_norms(rows).double().sqrt() / exact - 1).abs()
    assert float(off.max()) < CLIP_MARGIN / 2
