"""What privacy rests on: no unit moves the sum by more than the clip, and none can poison the others."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, Around, Tables, architectures, assert_same, fast_sum, ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, ParameterLayout, clipped_sum, clipped_units
from fedsim.gradients.clipping import ModelClip, rounded_down
from fedsim.gradients.fast import FastSum
from fedsim.gradients.per_unit.outer_products import FACTOR_BITS, _scaled
from fedsim.gradients.per_unit.products import gram_inner
from fedsim.rows import IGNORED_LABEL, TokenRows

OBJECTIVE = CausalLanguageModel()
MODELS = {name: (model.eval(), objective) for name, model, objective in architectures()}


class Poisoned(torch.nn.Module):
    """Rows that contain the token 7 have a value (nan, inf or huge) in their activations."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = Tables(12, True, None), value
        self.layer = torch.nn.Linear(VOCABULARY, VOCABULARY)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        bad = (input_ids == 7).any(1)[:, None, None]
        return self.layer(torch.where(bad, self.value, 1.0) * self.inner(input_ids))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("method", ["fast", "reference"])
def test_a_unit_that_is_not_finite_adds_exactly_zero_and_leaves_the_others(value: float, method: str) -> None:
    torch.manual_seed(0)
    model = Poisoned(value)
    rng = np.random.default_rng(1)
    lists = [[t if t != 7 else 8 for t in rng.integers(1, VOCABULARY, 9).tolist()] for _ in range(8)]
    clean_rows, ids = TokenRows.from_lists([lists[i] for i in (0, 1, 4, 5, 6, 7)]), np.array([0, 0, 2, 2, 3, 3])
    lists[3][4] = 7
    rows, poisoned_ids = TokenRows.from_lists(lists), np.array([0, 0, 1, 1, 2, 2, 3, 3])

    def total(rows, ids):
        if method == "fast":
            return fast_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE)
        return clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")

    poisoned, clean = total(rows, poisoned_ids), total(clean_rows, ids)
    assert poisoned.finite.tolist() == [True, False, True, True]
    assert torch.isfinite(poisoned.total).all()
    torch.testing.assert_close(poisoned.total, clean.total, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(poisoned.norms[[0, 2, 3]], clean.norms[[0, 2, 3]])


def test_only_poisoned_units_give_a_sum_of_exactly_zero() -> None:
    rows = TokenRows.from_lists([[7, 1, 2], [3, 7, 4]])
    found = fast_sum(Poisoned(math.nan), rows, np.array([0, 1]), Clip(norm=1.0), objective=OBJECTIVE)
    assert not found.total.any()
    assert not found.finite.any()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2, tied", "llama", "bert classifier"])
def test_one_unit_alone_never_exceeds_the_clip(name: str, autocast: torch.dtype | None) -> None:
    model, objective = MODELS[name]
    model = model.to(torch.float32)
    rows, ids = ragged(units=4)
    for clip_norm in (1e-6, 0.37, 3.0):
        for unit in range(4):
            mine = np.flatnonzero(ids == unit)
            own = TokenRows(
                tokens=np.concatenate([rows.tokens[rows.offsets[r] : rows.offsets[r + 1]] for r in mine]),
                offsets=np.concatenate([[0], np.cumsum(rows.lengths[mine])]),
                classes=rows.classes[mine],
            )
            alone = np.zeros(len(mine), dtype=int)
            found = fast_sum(model, own, alone, Clip(norm=clip_norm), objective=objective, autocast=autocast)
            assert float(found.total.double().norm()) <= clip_norm
    for _, update, _, _ in clipped_units(model, rows, ids, Clip(norm=0.37), objective=objective):
        assert float(update.double().norm()) <= 0.37


@settings(max_examples=200)
@given(norm=st.floats(0, 1e17), clip_norm=st.floats(1e-12, 1e12))
def test_factors_never_scale_above_the_clip(norm: float, clip_norm: float) -> None:
    clip = ModelClip(Clip(norm=clip_norm), ParameterLayout.of(torch.nn.Linear(1, 1)))
    factor, finite = clip.factors(torch.tensor([[norm]], dtype=torch.float64))
    assert finite.all()
    assert float(factor) * norm <= clip_norm
    assert float(factor) == 1 or float(factor) * norm >= clip_norm * (1 - 2**-15)


def test_a_norm_that_cancellation_makes_unsure_is_computed_again() -> None:
    # Two tokens with opposite output gradients: the Gram form subtracts nearly equal numbers.
    class Cancelling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 64, bias=False)
            torch.nn.init.normal_(self.layer.weight, std=1e-3)
            self.eval()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = torch.ones(*input_ids.shape, 64) * 100
            sign = torch.tensor([1.0, -1.0, 0.0])[: input_ids.shape[1]].view(1, -1, 1)
            tilt = 1 + 1e-6 * torch.arange(64)
            y = self.layer(x * torch.where(sign < 0, tilt, torch.ones(64)))
            return (y * sign).cumsum(1)[..., :61] * torch.tensor([0.0, 1.0, 0.0])[: input_ids.shape[1]].view(1, -1, 1)

    model = Cancelling()
    rows = TokenRows.from_lists([[1, 2, 3], [4, 5, 6]])
    expected = clipped_sum(model, rows, np.array([0, 1]), Clip(norm=1e-6), objective=OBJECTIVE, method="reference")
    found = fast_sum(model, rows, np.array([0, 1]), Clip(norm=1e-6), objective=OBJECTIVE)
    assert expected.norms.min() > 0
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("norm_order", [1, 2])
def test_scales_whiten_the_norm_and_leave_the_sum_unscaled(norm_order: int) -> None:
    model, objective = MODELS["gpt2, tied"]
    model = model.to(torch.float64)
    rows, ids = ragged(units=3)
    layout = ParameterLayout.of(model)
    scales = {name: 0.5 + 3 * (i % 4) for i, name in enumerate(layout.names)}
    clip = Clip(norm=0.2, order=norm_order, scales=scales)
    found = (fast_sum if norm_order == 2 else clipped_sum)(model, rows, ids, clip, objective=objective)
    expected, whitened = torch.zeros(layout.size, dtype=torch.float64), []
    for _, gradient, _, _ in clipped_units(model, rows, ids, Clip(norm=1e9), objective=objective):
        scaled = torch.cat([view.flatten() / scales[name] for name, view in layout.views(gradient).items()])
        whitened.append(float(scaled.norm(norm_order)))
        expected += gradient * min(1.0, 0.2 / whitened[-1])
    torch.testing.assert_close(found.norms, torch.tensor(whitened, dtype=torch.float64))
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-7)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), factor=st.floats(1e-6, 1))
def test_scaling_bfloat16_activations_loses_nothing(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(1, 50, 20, generator=generator).bfloat16()
    coarse = rounded_down(torch.tensor([factor], dtype=torch.float64), FACTOR_BITS).float()
    terms = _scaled(tensor, coarse)
    assert all(term.dtype == torch.bfloat16 for term in terms)
    assert torch.equal(sum(term.double() for term in terms), tensor.double() * coarse.double())


@given(factor=st.floats(0, 1, allow_subnormal=False))
def test_coarse_factors_are_never_above_the_fine_ones(factor: float) -> None:
    coarse = float(rounded_down(torch.tensor([factor], dtype=torch.float64), FACTOR_BITS))
    assert coarse <= factor
    assert factor == 0 or coarse > factor * (1 - 2.0 ** (1 - FACTOR_BITS))
    assert coarse == 0 or (math.frexp(coarse)[0] * 2**FACTOR_BITS).is_integer()


@pytest.mark.parametrize("tokens", [1, 127, 128, 300, 1100])
def test_blocks_of_a_gram_matrix_add_up_to_the_whole(tokens: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, tokens, 7, dtype=torch.float64), torch.randn(3, tokens, 5, dtype=torch.float64)
    squared, spread = gram_inner(left, right)
    torch.testing.assert_close(squared, torch.einsum("unp,unq->upq", left, right).square().sum((1, 2)))
    products = (left @ left.mT) * (right @ right.mT)
    own = products.diagonal(dim1=1, dim2=2)
    aligned = products.square() / (own[:, :, None] * own[:, None, :]).sqrt()
    torch.testing.assert_close(spread, aligned.sum((1, 2)))
    assert (spread >= own.sum(1) * (1 - 1e-9)).all()


def test_units_without_labels_or_rows_add_nothing() -> None:
    model, objective = MODELS["llama"]
    model = model.to(torch.float32)
    rows = TokenRows(
        tokens=np.arange(1, 13),
        offsets=np.array([0, 4, 8, 12]),
        labels=np.concatenate([np.arange(1, 5), np.full(4, IGNORED_LABEL), np.arange(9, 13)]),
    )
    found = fast_sum(model, rows, np.array([0, 1, 3]), Clip(norm=1.0), objective=objective)
    assert found.norms[[1, 2]].tolist() == [0, 0]
    assert found.losses[[1, 2]].tolist() == [0, 0]
    assert found.finite.all()
    alone = fast_sum(model, rows, np.array([0, 1, 1]), Clip(norm=1.0), objective=objective)
    torch.testing.assert_close(found.norms[0], alone.norms[0])


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was(end: type[BaseException] | None) -> None:
    """However the sum ends: in the middle of a layer's call of a later pass, for instance."""
    model, objective = copy.deepcopy(MODELS["gpt2, tied"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layer, calls = model.transformer.h[1].mlp.c_fc, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if end is not None and len(calls) == 2:
            raise end
        return type(layer).forward(layer, x)

    rows, ids = ragged(most=2)
    layer.forward = forward
    with contextlib.nullcontext() if end is None else pytest.raises(end):
        fast_sum(model, rows, ids, Clip(norm=1.0), objective=objective, max_tokens=60)
    assert len(calls) >= 2
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p)
        assert p.requires_grad
        assert p.grad is None
        assert not p._backward_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("method", ["fast", "reference"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_caller_who_wants_no_gradients_gets_the_same_sum(without: type, method: str) -> None:
    model, objective = copy.deepcopy(MODELS["gpt2, tied"])
    rows, ids = ragged()
    with without():
        found = clipped_sum(model, rows, ids, Clip(norm=1.0), objective=objective, method=method)
        assert not torch.is_grad_enabled()
    assert_same(found, clipped_sum(model, rows, ids, Clip(norm=1.0), objective=objective, method=method), 1e-6)


def test_layers_get_their_hooks_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And units that take plain autograd beside them are none of their business."""
    placed, passes, alone = [], [], []
    hooks = torch.nn.Module, "register_forward_pre_hook", placed
    noted = hooks, (FastSum, "passed", passes), (FastSum, "add_alone", alone)
    for kind, name, calls in noted:
        own = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, own=own, calls=calls, **k: (calls.append(a[1]), own(*a, **k))[1])
    model, objective = MODELS["gpt2, tied"]
    rows, ids = ragged(most=3)
    whole = fast_sum(model, rows, ids, Clip(norm=1.0), objective=objective)
    once = len(placed)
    parts = fast_sum(model, rows, ids, Clip(norm=1.0), objective=objective, max_tokens=60)
    assert once
    assert len(placed) == 2 * once
    assert len(passes) > 2
    assert alone
    assert_same(parts, whole, 1e-5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("method", "slow"),
        ("weighting", "rows"),
        ("max_tokens", 0),
        ("autocast", torch.float16),
        ("weights", np.array([1.0, -1.0])),
        ("unit_ids", np.array([0, -1])),
        ("unit_ids", np.array([0.0, 1.0])),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: object) -> None:
    rows = TokenRows.from_lists([[1, 2, 3], [4, 5]])
    arguments = {"unit_ids": np.array([0, 1]), "clip": Clip(norm=1.0), "objective": OBJECTIVE} | {argument: value}
    with pytest.raises(InvalidInput, match=argument):
        clipped_sum(Around(torch.nn.Linear(4, 4), 4), rows, **arguments)


def test_dropout_is_refused() -> None:
    model, objective = MODELS["gpt2, tied"]
    rows, ids = ragged()
    try:
        with pytest.raises(InvalidInput, match="dropout"):
            clipped_sum(model.train(), rows, ids, Clip(norm=1.0), objective=objective)
    finally:
        model.eval()
