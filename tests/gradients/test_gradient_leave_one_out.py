"""Whose contribution is whose: without one unit the sum lacks that unit's contribution, and nothing else changes."""

import logging

import numpy as np
import pytest
import torch
from gradient_checks import CLASSES, VOCABULARY, architectures, assert_same, ragged

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, SequenceClassification, clipped_sum, clipped_units
from fedsim.rows import IGNORED_LABEL, TokenRows

MODELS = {name: (model.eval(), objective) for name, model, objective in architectures()}
OBJECTIVE = CausalLanguageModel()


@pytest.mark.parametrize("max_tokens", [17, 60, 10**6])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_unit_the_sum_lacks_what_it_added(name: str, max_tokens: int) -> None:
    model, objective = MODELS[name]
    model = model.double()
    rows, ids = ragged(units=5)
    clip = Clip(norm=0.05)
    each = {
        unit: update for unit, update, _, _ in clipped_units(model, rows, ids, clip, objective=objective)
    }  # each by itself, however long
    arguments = {"objective": objective, "max_tokens": max_tokens}
    whole = clipped_sum(model, rows, ids, clip, **arguments)
    # float64 rounds a sum of five such vectors by about 1e-16 of it, a network's gradients by some hundred times that.
    rounding = 1e-12 * clip.norm
    for unit in range(5):
        others = np.flatnonzero(ids != unit)
        left = clipped_sum(model, rows.take(others), ids[others], clip, **arguments)
        moved = whole.total - left.total
        assert float(moved.norm()) <= clip.norm * (1 + 1e-12)
        assert float((moved - each[unit]).norm()) <= rounding
        kept = [u for u in range(len(left.norms)) if u != unit]
        torch.testing.assert_close(left.norms[kept], whole.norms[kept], rtol=1e-9, atol=0)
        torch.testing.assert_close(left.losses[kept], whole.losses[kept], rtol=1e-9, atol=0)


class Both(torch.nn.Module):
    """Reads in both directions and is told of no padding: an encoder as nobody should hand it over."""

    def __init__(self, shape: tuple[int, ...] = (VOCABULARY,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, 12)
        self.mix = torch.nn.Linear(12, 12)
        self.out = torch.nn.Linear(12, CLASSES if shape == (CLASSES,) else VOCABULARY)
        self.classifies = shape == (CLASSES,)
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(input_ids)
        x = torch.tanh(self.mix(x + x.mean(1, keepdim=True)))
        return self.out(x[:, 0] if self.classifies else x)


def of_lengths(*units: tuple[int, ...], answers_only: bool = False) -> tuple[TokenRows, np.ndarray]:
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, VOCABULARY, n).tolist() for unit in units for n in unit]
    rows = TokenRows.from_lists(lists, rng.integers(0, CLASSES, len(lists)))
    if answers_only:  # the first half of each row is not scored, as in a chat
        labels = rows.tokens.copy()
        for start, stop in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            labels[start : (start + stop + 1) // 2] = IGNORED_LABEL
        rows = TokenRows(tokens=rows.tokens, offsets=rows.offsets, labels=labels, classes=rows.classes)
    return rows, np.repeat(np.arange(len(units)), [len(unit) for unit in units])


@pytest.mark.parametrize("classifies", [False, True], ids=["causal-lm", "classification"])
@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize(
    "first",
    [((8,), (8,)), ((8, 8), (8,), (8,)), ((8,),), ((8, 8),), ((3,), (3,))],
    ids=["alike", "counts", "one row", "one unit", "short"],
)
def test_a_model_that_sees_padding_is_found_out_by_units_of_one_length(
    first: tuple[tuple[int, ...], ...], answers_only: bool, classifies: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What the first call finds holds for later ones, whose units are of many lengths."""
    model = Both((CLASSES,) if classifies else (VOCABULARY,))
    objective = SequenceClassification() if classifies else OBJECTIVE
    clip = Clip(norm=1e-3)
    with caplog.at_level(logging.WARNING):
        clipped_sum(model, *of_lengths(*first, answers_only=answers_only), clip, objective=objective)
        assert "reference path" in caplog.text
        rows, ids = of_lengths((9, 3), (14,), (2, 6))
        whole = clipped_sum(model, rows, ids, clip, objective=objective)
    expected = clipped_sum(model, rows, ids, clip, objective=objective, method="reference")
    assert_same(whole, expected, 1e-6)
    for unit in range(3):
        others = np.flatnonzero(ids != unit)
        left = clipped_sum(model, rows.take(others), ids[others], clip, objective=objective)
        assert float((whole.total - left.total).norm()) <= clip.norm


def test_rows_too_short_to_be_cut_leave_the_question_open() -> None:
    model = Both()
    clipped_sum(model, *of_lengths((2,), (2,)), Clip(norm=1e-3), objective=OBJECTIVE)
    rows, ids = of_lengths((9, 3), (14,), (2, 6))
    found = clipped_sum(model, rows, ids, Clip(norm=1e-3), objective=OBJECTIVE)
    expected = clipped_sum(model, rows, ids, Clip(norm=1e-3), objective=OBJECTIVE, method="reference")
    assert_same(found, expected, 1e-6)


def test_the_question_is_asked_once_for_rows_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.gradients.trial import verdict

    asked: list[object] = []
    difference = verdict._difference
    monkeypatch.setattr(verdict, "_difference", lambda *args: asked.append(args) or difference(*args))
    model, objective = MODELS["gpt2, tied"]
    model = type(model)(model.config).eval()
    for _ in range(3):
        clipped_sum(model, *of_lengths((8,), (8,), (8,)), Clip(norm=1.0), objective=objective)
    assert len(asked) == 1
