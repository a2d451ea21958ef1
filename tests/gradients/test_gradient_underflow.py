"""Norms of which float32 does not keep enough are done again: products that underflow, and those of half precision."""

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, Made, Prescribed, fast_sum

from fedsim.clip import Clip
from fedsim.gradients import CLIP_MARGIN, CausalLanguageModel, ParameterLayout, clipped_sum
from fedsim.gradients.clipping import SMALLEST_LIMIT
from fedsim.gradients.fast import FastSum
from fedsim.gradients.per_unit.outer_products import bucket_norms
from fedsim.gradients.per_unit.products import unsure
from fedsim.gradients.units import make_units
from fedsim.rows import TokenRows


@pytest.mark.parametrize("norm", [1e-5, 1e-7, 1e-8])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(1e-25, 1e16), (1e16, 1e-25), (1e-22, 1e15), (1e-14, 1e8)])
def test_units_whose_products_underflow_are_clipped(
    sizes: tuple[float, float], tied: bool, scale: float, norm: float
) -> None:
    """Gradients of some 10⁻⁷ of factors so unlike that the inner products of one are smaller than any float32."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 40, generator=generator), torch.randn(5, 30, generator=generator)
    # Where the matrix is tied, what is looked up takes half of it back, or is as small as one factor alone.
    left, right = left * sizes[0], right * sizes[1]
    place = torch.zeros(5, dtype=torch.long) if tied else None
    made = Made(left, right, place, torch.randn(5, 30, generator=generator) * sizes[0] if tied else None)
    clip = Clip(norm=norm / scale, scales=dict.fromkeys(ParameterLayout.of(made).names, scale))
    rows = TokenRows.from_lists([[1, 2]] * 2)
    found = fast_sum(made, rows, np.array([0, 1]), clip, objective=Prescribed())
    true = clipped_sum(made, rows, np.array([0, 1]), clip, objective=Prescribed(), method="reference")
    assert float(found.total.double().norm()) <= 2 * clip.bound
    torch.testing.assert_close(found.total, true.total, rtol=2**-14, atol=2**-14 * clip.bound)


class Shifted(torch.nn.Module):
    """Gradients of 10⁻⁴ of a matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 1e-4 * self.layer(torch.ones(*input_ids.shape, 4)).sum((1, 2))


@pytest.mark.parametrize("scale", [1e12, 1e20, 1e30])
def test_a_clip_that_is_small_because_scales_are_large_clips(scale: float) -> None:
    """Squares of what is divided by them would underflow, those of the gradients themselves would not."""
    torch.manual_seed(0)
    model = Shifted()
    clip = Clip(norm=1e-6 / scale, scales=dict.fromkeys(ParameterLayout.of(model).names, scale))
    rows = TokenRows.from_lists([[1, 2]] * 2)
    found = clipped_sum(model, rows, np.array([0, 1]), clip, objective=Prescribed())
    assert 1.99 * clip.bound < float(found.total.double().norm()) <= 2 * clip.bound


def test_factors_that_are_zero_leave_a_norm_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an adapter's first matrix has them while its second is zero, be it in a block of its own."""
    alone: list[int] = []
    monkeypatch.setattr(FastSum, "add_alone", lambda self, unit: alone.append(unit))
    made = Made(torch.zeros(100, 400), 10 * torch.randn(100, 512, generator=torch.Generator().manual_seed(0)))
    rows = TokenRows.from_lists([[1, 2]] * 2)
    found = fast_sum(made, rows, np.array([0, 1]), Clip(norm=1e-8), objective=Prescribed())
    assert not alone
    assert not found.norms.any()
    assert not found.total.any()


@pytest.mark.parametrize("size", [1e-24, 3e-24])
def test_a_gradient_whose_one_factor_is_too_small_to_have_a_length_is_unsure_where_tokens_cancel(size: float) -> None:
    """As where a gradient is formed for its norm and dropped, of bfloat16 factors."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(1, 256, 8, generator=generator) * scale for scale in (size, 1e18))
        left[:, 128:], right[:, 128:] = -left[:, :128], right[:, :128]
        left, right = left.bfloat16(), right.bfloat16()
        left[:, -1] *= 1 - 2**-6
        squared, spread, path = bucket_norms(left, right)
        assert path == "direct norm"
        exact = float((left[0].double().t() @ right[0].double()).norm())
        assert exact > 2 * SMALLEST_LIMIT
        off = abs(float(squared.double().sqrt()) / exact - 1)
        assert off < CLIP_MARGIN / 2 or bool(unsure(squared.double(), spread.double(), torch.float32))


class Opposite(torch.nn.Module):
    """Hidden states of word 2 are almost those of word 1, but negative, and nothing is known of any word yet."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 64)
        self.table.weight.data[2] = -self.table.weight.data[1].bfloat16() * (1 - 2**-7)
        self.head = torch.nn.Linear(64, VOCABULARY, bias=False)
        torch.nn.init.zeros_(self.head.weight)
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(input_ids))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_how_sure_a_norm_is_depends_on_what_its_products_were_added_up_in(autocast: torch.dtype | None) -> None:
    """Of float64 parameters, too, the head's products under autocast are float32."""
    objective = CausalLanguageModel()
    rows = TokenRows.from_lists([[1, 2, 3]])
    rows = TokenRows(tokens=rows.tokens, offsets=rows.offsets, labels=np.array([3, 3, 3]))
    units = make_units(rows, np.zeros(1, int), objective, "examples", None)
    sum_ = FastSum(Opposite().double(), rows, units, objective, Clip(norm=1.0), 10**6, autocast)
    pass_ = sum_.passed(np.array([0]))
    assert sum_.paths["head.weight"] == {"Gram norm"}
    assert bool(pass_.unsure.all()) == (autocast is not None)
