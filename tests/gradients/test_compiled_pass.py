"""The compiled pass: the sum of the ordinary one, or none at all."""

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from compiled_models import MODELS, VOCABULARY, Scaled, Small, gpt2, passes_of, ragged, small, summed

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients.compiled import graphs
from fedsim.gradients.fast import FastSum
from fedsim.gradients.model import ParameterLayout
from fedsim.rows import TokenRows


@pytest.fixture(autouse=True)
def _traced_and_not_compiled_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they are traced, run by torch: what a compiler of kernels would add takes a minute."""
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "half"), [("GPT-2", False), ("adapted Llama", True)])
def test_the_sum_is_that_of_the_ordinary_pass(family: str, half: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    autocast = torch.bfloat16 if half else None
    clip = Clip(norm=float(summed(model, *ragged(), Clip(norm=1.0), autocast=autocast).norms.median()))
    for seed in range(2):  # other shapes, too
        rows, ids = ragged(seed)
        expected = summed(model, rows, ids, clip, autocast=autocast, compiled=False)
        found = summed(model, rows, ids, clip, autocast=autocast, compiled=True)
        made = passes_of(model)[-1]
        assert made is not None
        tolerance = 5e-3 if half else 1e-5
        torch.testing.assert_close(found.norms, expected.norms, rtol=tolerance, atol=0)
        torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
        layout, whole = ParameterLayout.of(model), float(expected.total.norm())
        for ours, theirs in zip(
            layout.views(found.total).values(), layout.views(expected.total).values(), strict=True
        ):
            assert float((ours - theirs).norm()) <= tolerance * whole
    assert len(passes_of(model)) == 1


def test_the_callers_model_is_as_it_was_and_the_pass_follows_its_parameters() -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert passes_of(model)[0] is not None
    assert not any(module._forward_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    pickle.dumps(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = summed(copy.deepcopy(model), rows, ids, Clip(norm=1.0), compiled=False)
    found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)


def test_parameters_that_are_frozen_later_need_another_pass() -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    model.middle.requires_grad_(False)  # type: ignore[operator]
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert len(passes_of(model)) == 1  # the other one's parameters are not kept alive
    assert passes_of(model)[0] is not None
    torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-6)


def test_a_pass_whose_gradients_are_off_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    record = graphs.CompiledPass.record

    def off(self: Any, tape: Any, inputs: Any, gradients: Any) -> None:
        record(self, tape, inputs, (gradients[0], 1.2 * gradients[1], *gradients[2:]))

    monkeypatch.setattr(graphs.CompiledPass, "record", off)
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    with caplog.at_level(logging.WARNING):
        found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert passes_of(model) == [None]
    assert "goes without a compiled pass: the gradient of" in caplog.text or "a unit's norm differs" in caplog.text
    assert torch.equal(found.total, expected.total)


def test_a_pass_that_fails_later_is_done_again_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    calls = []
    hidden = graphs.CompiledPass.hidden

    def failing(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > 1:
            raise RuntimeError("no more graphs")
        return hidden(self, batch)

    monkeypatch.setattr(graphs.CompiledPass, "hidden", failing)
    with caplog.at_level(logging.WARNING):
        found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
        again = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert len(calls) == 2
    assert "goes without a compiled pass: RuntimeError: no more graphs" in caplog.text
    assert torch.equal(found.total, expected.total)
    assert torch.equal(again.total, expected.total)


def test_a_model_with_a_layer_that_has_no_rule_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Small(Scaled()).eval()
    rows, ids = ragged()
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    with caplog.at_level(logging.WARNING):
        found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert "middle is generic (Scaled), which a compiled pass does not hold" in caplog.text
    assert torch.equal(found.total, expected.total)


def changed_number(model: Any) -> None:
    model.middle.k = 5.0


def changed_buffer(model: Any) -> None:
    model.middle.s = torch.tensor(5.0)


def hooked(model: Any) -> None:
    model.middle.register_forward_hook(lambda module, args, output: output * torch.linspace(-3, 3, 8))


class WithNumbers(torch.nn.Module):
    """A layer whose input is multiplied by a number and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 1.0
        self.register_buffer("s", torch.tensor(1.0))
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden * self.k * self.s)


@pytest.mark.parametrize("change", [changed_number, changed_buffer, hooked])
def test_a_model_that_is_changed_after_its_pass_was_compiled_gets_another(change: Any) -> None:
    torch.manual_seed(0)
    model = Small(WithNumbers()).eval()
    rows, ids = ragged()
    before = summed(model, rows, ids, Clip(norm=1e3), compiled=True)
    change(model)
    expected = summed(model, rows, ids, Clip(norm=1e3), compiled=False)
    found = summed(model, rows, ids, Clip(norm=1e3), compiled=True)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-5)
    assert float((before.total - expected.total).norm()) > 0.1 * float(expected.total.norm())
    assert passes_of(model)[0] is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_stays_within_its_clip_after_the_models_dtype_has_changed(dtype: torch.dtype) -> None:
    """In each parameter, with so many tokens that factors are kept, from which the norm forms the gradient anew."""
    torch.manual_seed(0)
    model = small(64).to(torch.bfloat16)
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    layout = ParameterLayout.of(model)
    share = len(layout.names) ** -0.5
    clip = Clip(norm=1e-3, blocks=tuple(ClipBlock(parameters=(name,), share=share) for name in layout.names))
    for first in range(len(rows) - 3):
        unit = rows.take(np.arange(first, first + 4)), np.zeros(4, np.int64)
        alone = summed(model, *unit, clip, compiled=True, max_tokens=200)  # else it fills a micro-batch, uncompiled
        assert passes_of(model)[0] is not None
        for view in layout.views(alone.total).values():
            assert 0.9 * share * clip.norm < float(view.double().norm()) <= share * clip.norm


def test_calls_in_another_order_for_rows_of_another_length_are_noticed() -> None:
    """Both layers are alike, so that nothing but the order tells them apart, which is of no consequence otherwise."""

    class Turning(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if hidden.shape[1] > 5:
                return self.a(hidden) + 2 * self.b(hidden)
            return 2 * self.b(hidden) + self.a(hidden)

    torch.manual_seed(0)
    model = Small(Turning()).eval()
    rng = np.random.default_rng(0)

    def of_length(length: int) -> tuple[TokenRows, np.ndarray]:
        offsets = np.arange(7, dtype=np.int64) * length
        return TokenRows(tokens=rng.integers(0, VOCABULARY, 6 * length), offsets=offsets), np.arange(6)

    for length, compiled in ((9, True), (4, False)):
        rows, ids = of_length(length)
        expected = summed(model, rows, ids, Clip(norm=1e3), compiled=False)
        found = summed(model, rows, ids, Clip(norm=1e3), compiled=True)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-5)
        assert [made is not None for made in passes_of(model)] == [compiled]


def test_a_unit_that_is_not_finite_does_not_keep_the_others_from_being_compared() -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=False)  # tried by now
    with torch.no_grad():
        model.token.weight[rows.tokens[0]] = float("inf")  # type: ignore[union-attr, index]
    found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert not found.finite.all()
    assert found.finite.any()
    (made,) = passes_of(model)
    assert made is not None
    assert made.trusted


def test_nothing_of_a_pass_is_kept_when_it_is_over() -> None:
    torch.manual_seed(0)
    model = small()
    summed(model, *ragged(), Clip(norm=1.0), compiled=True)
    (made,) = passes_of(model)
    assert made is not None
    assert made._inputs == made._probes == []


def test_a_single_row_is_compared_later() -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    summed(model, rows.take(np.array([0])), np.zeros(1, np.int64), Clip(norm=1.0), compiled=True)
    assert passes_of(model) == []
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert passes_of(model)[0] is not None


def test_without_a_gpu_nothing_is_compiled_unasked() -> None:
    torch.manual_seed(0)
    model = small()
    summed(model, *ragged(), Clip(norm=1.0))
    assert passes_of(model) == []


def test_rows_are_packed_wherever_no_graphs_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for none, asked for some that turn out wrong, and after some that failed; graphs take padded ones."""
    torch.manual_seed(0)
    model = gpt2().eval()
    rows, ids = ragged()
    ran: list[FastSum] = []
    passed = FastSum.passed
    monkeypatch.setattr(FastSum, "passed", lambda self, units: (ran.append(self), passed(self, units))[1])

    def way(**options: Any) -> tuple[bool, bool]:
        """Of the last pass: whether rows were packed, and whether graphs took them."""
        summed(model, rows, ids, Clip(norm=1.0), **options)
        return ran[-1].packed, ran[-1].compiled is not None

    assert way(compiled=True) == (False, True)
    assert way(compiled=False) == (True, False)
    assert way(compiled=True) == (False, True)

    def failing(self: Any, batch: Any) -> Any:
        raise RuntimeError("no more graphs")

    monkeypatch.setattr(graphs.CompiledPass, "hidden", failing)
    assert way(compiled=True) == (True, False)
    assert passes_of(model) == [None]
    assert way(compiled=True) == (True, False)
    model = gpt2().eval()
    assert way(compiled=True) == (True, False)
    assert passes_of(model) == [None]
