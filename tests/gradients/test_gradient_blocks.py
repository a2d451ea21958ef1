"""Clips of blocks of parameters, each by itself: within its limit, and the same on both paths."""

import math

import numpy as np
import pytest
import torch
from gradient_checks import TOLERANCE, VOCABULARY, Around, Tables, architectures, assert_same, fast_sum, ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip, ClipBlock
from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, ParameterLayout, clipped_sum, clipped_units
from fedsim.gradients.clipping import ModelClip
from fedsim.rows import TokenRows

OBJECTIVE = CausalLanguageModel()
MODELS = {name: (model.eval(), objective) for name, model, objective in architectures()}


def drawn_clip(model: torch.nn.Module, seed: int, norm: float, order: int = 2, most: int = 6) -> Clip:
    """Blocks, shares and scales at random, of every parameter of the model."""
    names = ParameterLayout.of(model).names
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, most, len(names))
    parts = [tuple(name for name, mine in zip(names, owner, strict=True) if mine == b) for b in np.unique(owner)]
    shares = rng.uniform(0.1, 1, len(parts))
    shares /= np.linalg.norm(shares, order)
    return Clip(
        norm=norm,
        order=order,
        scales={name: float(10 ** rng.uniform(-2, 2)) for name in names},
        blocks=tuple(ClipBlock(parameters=part, share=float(s)) for part, s in zip(parts, shares, strict=True)),
    )


def reaches(clip: Clip, layout: ParameterLayout, update: torch.Tensor) -> list[float]:
    """Each block's whitened norm over its limit, by the definition."""
    views = layout.views(update.double())
    whitened = {name: view.flatten() / clip.scales.get(name, 1.0) for name, view in views.items()}
    return [
        float(torch.cat([whitened[name] for name in block.parameters]).norm(clip.order)) / limit
        for block, limit in zip(clip.blocks, clip.limits, strict=True)
    ]


class Warp(torch.nn.Module):
    """A layer that no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * self.scale)


class Mixture(torch.nn.Module):
    """Tables, vectors, a matrix and a layer without a rule: every kind of term that the fast path keeps."""

    def __init__(self, width: int, tied: bool) -> None:
        super().__init__()
        self.tables = Tables(width, tied, None)
        self.norm = torch.nn.LayerNorm(VOCABULARY)
        self.warp = Warp(VOCABULARY)
        self.mix = torch.nn.Linear(VOCABULARY, VOCABULARY)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mix(self.warp(self.norm(self.tables(input_ids))))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 12),
    tied=st.booleans(),
    norm=st.floats(1e-4, 10),
    order=st.sampled_from([1, 2]),
    precision=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_block_of_one_unit_is_within_its_limit(seed, width, tied, norm, order, precision) -> None:
    torch.manual_seed(seed)
    model = Mixture(width, tied).to(precision)
    layout = ParameterLayout.of(model)
    clip = drawn_clip(model, seed, norm, order)
    rows, _ = ragged(seed, units=1)
    alone = np.zeros(len(rows), dtype=int)
    totals = [clipped_sum(model, rows, alone, clip, objective=OBJECTIVE, method="reference")]
    if order == 2:
        totals.append(fast_sum(model, rows, alone, clip, objective=OBJECTIVE))
    for found in totals:
        inside = reaches(clip, layout, found.total)
        assert max(inside) <= 1
        # The norm tells whether a block was clipped, and then that block is at its limit but for the margin.
        if float(found.norms[0]) > clip.norm * (1 + 1e-4):
            assert max(inside) > 1 - 2**-14
        elif float(found.norms[0]) < clip.norm * (1 - 1e-4):
            assert max(inside) == pytest.approx(float(found.norms[0]) / clip.norm, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_fast_equals_reference_in_blocks(name: str) -> None:
    model, objective = MODELS[name]
    rows, ids = ragged()
    for dtype, tolerance in TOLERANCE.items():
        model = model.to(dtype)
        for seed, most in ((0, 3), (1, 1000)):
            clip = drawn_clip(model, seed, 1.0, most=most)
            norms = clipped_sum(model, rows, ids, clip, objective=objective, method="reference").norms
            clip = Clip(norm=float(norms.median()), scales=clip.scales, blocks=clip.blocks)
            expected = clipped_sum(model, rows, ids, clip, objective=objective, method="reference")
            for max_tokens in (10**6, 60):
                found = fast_sum(model, rows, ids, clip, objective=objective, max_tokens=max_tokens)
                assert_same(found, expected, tolerance)


@pytest.mark.parametrize("order", [1, 2])
def test_blocks_are_clipped_by_themselves_and_scaled_each_by_its_own_factor(order: int) -> None:
    model, objective = MODELS["gpt2, tied"]
    model = model.to(torch.float64)
    layout = ParameterLayout.of(model)
    rows, ids = ragged(units=3)
    clip = drawn_clip(model, 3, 0.05, order)
    found = clipped_sum(model, rows, ids, clip, objective=objective)
    expected, norms = torch.zeros(layout.size, dtype=torch.float64), []
    for _, gradient, _, _ in clipped_units(model, rows, ids, Clip(norm=1e9), objective=objective):
        ratios = reaches(clip, layout, gradient)
        norms.append(clip.norm * max(ratios))
        for name, view in layout.views(gradient).items():
            view *= min(1.0, 1 / ratios[clip.block_of((name,))[0]])
        expected += gradient
    torch.testing.assert_close(found.norms, torch.tensor(norms, dtype=torch.float64))
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-9)


def test_one_block_of_everything_is_no_block_bit_by_bit() -> None:
    model, objective = MODELS["llama"]
    model = model.to(torch.float32)
    rows, ids = ragged()
    whole = ClipBlock(parameters=ParameterLayout.of(model).names, share=1.0)
    for method in ("fast", "reference"):
        one, none = (
            clipped_sum(model, rows, ids, Clip(norm=0.5, blocks=blocks), objective=objective, method=method)
            for blocks in ((whole,), ())
        )
        assert torch.equal(one.total, none.total)
        torch.testing.assert_close(one.norms, none.norms)


class BadInOneLayer(torch.nn.Module):
    """The gradient of `bad` alone is nan or infinite in rows that contain the token 7; the loss is finite."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = Tables(12, True, None), value
        self.bad = torch.nn.Linear(VOCABULARY, VOCABULARY)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        seven = (input_ids == 7).any(1)[:, None, None].expand(-1, input_ids.shape[1], VOCABULARY)
        x = self.inner(input_ids)
        side = self.bad(x.detach())
        side.register_hook(lambda gradient: torch.where(seven, self.value, gradient)) if side.requires_grad else None
        return x + side


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["fast", "reference"])
def test_a_unit_that_is_not_finite_in_one_block_adds_exactly_zero_in_all(value: float, method: str) -> None:
    torch.manual_seed(0)
    model = BadInOneLayer(value)
    names = ParameterLayout.of(model).names
    blocks = tuple(ClipBlock(parameters=(name,), share=len(names) ** -0.5) for name in names)
    clip = Clip(norm=0.5, blocks=blocks)

    def total(lists: list[list[int]], ids: list[int]):
        rows = TokenRows.from_lists(lists)
        if method == "fast":
            return fast_sum(model, rows, np.array(ids), clip, objective=OBJECTIVE)
        return clipped_sum(model, rows, np.array(ids), clip, objective=OBJECTIVE, method="reference")

    found = total([[1, 2, 3, 4], [5, 7, 6, 2], [9, 3, 8, 1]], [0, 1, 2])
    clean = total([[1, 2, 3, 4], [9, 3, 8, 1]], [0, 2])
    assert found.finite.tolist() == [True, False, True]
    torch.testing.assert_close(found.total, clean.total, rtol=1e-6, atol=1e-8)
    assert not total([[5, 7, 6, 2]], [0]).total.any()


def test_a_unit_that_is_unsure_in_one_small_block_is_computed_again() -> None:
    # The last token undoes the first in `cancelling`, up to a tilt; what `plain` gets is far larger, so that the sum
    # of both norms is sure.
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cancelling, self.plain = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
            for layer in (self.cancelling, self.plain):
                torch.nn.init.normal_(layer.weight, std=1e-4)
            self.eval()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            sign = torch.tensor([1.0, -1.0, 0.0])[: input_ids.shape[1]].view(1, -1, 1)
            x = torch.where(sign < 0, 1 + 1e-6 * torch.arange(64), torch.ones(64)).expand(len(input_ids), -1, -1)
            y = (self.cancelling(x) * sign).cumsum(1) + 10 * self.plain(torch.ones_like(x))
            return y[..., :VOCABULARY] * torch.tensor([0.0, 1.0, 0.0])[: input_ids.shape[1]].view(1, -1, 1)

    torch.manual_seed(0)
    model = Both()
    rows = TokenRows.from_lists([[1, 2, 3], [4, 5, 6]])
    blocks = tuple(ClipBlock(parameters=(name,), share=0.5**0.5) for name in ParameterLayout.of(model).names)
    clip = Clip(norm=1e-7, blocks=blocks)
    expected = clipped_sum(model, rows, np.array([0, 1]), clip, objective=OBJECTIVE, method="reference")
    assert_same(fast_sum(model, rows, np.array([0, 1]), clip, objective=OBJECTIVE), expected, 1e-5)


@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize(
    ("argument", "clip"),
    [
        ("scales", Clip(norm=1.0, scales={"layer.weight": 1.0})),
        ("scales", Clip(norm=1.0, scales={"layer.weight": 1.0, "layer.bias": 1.0, "nothing": 1.0})),
        ("blocks", Clip(norm=1.0, blocks=(ClipBlock(parameters=("layer.bias",), share=1.0),))),
        ("blocks", Clip(norm=1.0, blocks=(ClipBlock(parameters=("layer.bias", "layer.wait"), share=1.0),))),
    ],
)
def test_a_clip_of_other_parameters_is_refused(argument: str, clip: Clip, method: str) -> None:
    rows = TokenRows.from_lists([[1, 2, 3]])
    with pytest.raises(InvalidInput, match=f"clip.{argument}"):
        clipped_sum(Around(torch.nn.Linear(4, 4), 4), rows, np.array([0]), clip, objective=OBJECTIVE, method=method)


def test_the_check_on_first_use_does_not_depend_on_the_clip(caplog) -> None:
    """A layer whose gradient is wrong is noticed under a clip that hides it, before one that rests on it."""

    class Turned(torch.nn.Module):
        """`layer` is given the rows in another order."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(x) + self.layer(x.flip(0)).flip(0)

    torch.manual_seed(0)
    model = Around(Turned(), 6)
    rows, ids = ragged()
    layer, other = ParameterLayout.of(model).names
    for norm, shares in ((0.1, (2e-7, 0.9)), (0.1, (0.7, 0.7))):
        blocks = tuple(ClipBlock(parameters=(n,), share=s) for n, s in zip((layer, other), shares, strict=True))
        clip = Clip(norm=norm, scales={layer: 1e3, other: 1.0}, blocks=blocks)
        expected = clipped_sum(model, rows, ids, clip, objective=OBJECTIVE, method="reference")
        assert_same(clipped_sum(model, rows, ids, clip, objective=OBJECTIVE), expected, 1e-5)
        assert "layer.layer.weight" in caplog.text


@pytest.mark.parametrize("value", [0.01, 5.0, math.nan, math.inf])
def test_an_update_on_the_host_is_clipped_as_any_other(value: float) -> None:
    layout = ParameterLayout.of(torch.nn.Linear(3, 2))
    blocks = tuple(ClipBlock(parameters=(name,), share=0.5) for name in layout.names)
    update = torch.linspace(-1, 1, 8)
    update[2] = value
    for clip in (Clip(norm=0.7), Clip(norm=0.7, blocks=blocks)):
        model_clip, expected = ModelClip(clip, layout), update.clone()
        norm = model_clip.clip_(expected)
        views = {name: view.clone() for name, view in layout.views(update).items()}
        assert model_clip.clip_views_(views, torch.device("cpu")) == pytest.approx(float(norm), nan_ok=True)
        assert torch.equal(torch.cat([view.flatten() for view in views.values()]), expected)
        assert torch.isfinite(expected).all()
