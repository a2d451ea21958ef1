"""Weights of rows, objectives' batches, and micro-batches."""

import numpy as np
import pytest
import torch
from gradient_checks import MLP, Tables, ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, SequenceClassification, clipped_units
from fedsim.gradients.rows.packed import packed_batch
from fedsim.gradients.units import SHORT_ROW, make_units, pack_units, split_rows
from fedsim.rows import IGNORED_LABEL, TokenRows

OBJECTIVE = CausalLanguageModel()


def test_padding_and_ignored_labels_change_no_loss() -> None:
    torch.manual_seed(0)
    model = Tables(6, False, None)
    rows, _ = ragged()
    counts = OBJECTIVE.label_counts(rows)
    indices = np.arange(len(rows))
    together = OBJECTIVE.row_losses(model, OBJECTIVE.collate(rows, indices, "cpu"))
    assert together.label_count.tolist() == counts.tolist()
    for r in indices:
        piece = slice(rows.offsets[r], rows.offsets[r + 1])
        tokens, labels = torch.tensor(rows.tokens[piece]), torch.tensor(rows.labels[piece])
        logs = torch.log_softmax(model(tokens[None])[0], -1)
        scored = [(t, int(label)) for t, label in enumerate(labels[1:]) if label != IGNORED_LABEL]
        expected = -sum(logs[t, label].item() for t, label in scored)
        assert together.loss_sum[r].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert int(together.correct[r]) == sum(int(logs[t].argmax()) == label for t, label in scored)


def test_classes_that_are_ignored_score_nothing() -> None:
    objective = SequenceClassification()
    rows = TokenRows.from_lists([[1, 2], [3], [4, 5, 6]], classes=np.array([2, IGNORED_LABEL, 0]))
    assert objective.label_counts(rows).tolist() == [1, 0, 1]
    losses = objective.row_losses(MLP().eval(), objective.collate(rows, np.arange(3), "cpu"))
    assert losses.label_count.tolist() == [1, 0, 1]
    assert losses.loss_sum[1].item() == 0


@pytest.mark.parametrize("weighting", ["examples", "tokens"])
def test_a_unit_is_the_weighted_mean_over_its_examples_or_tokens(weighting: str) -> None:
    torch.manual_seed(0)
    model = Tables(6, True, None).double()
    rows = TokenRows.from_lists([[1, 2, 3], [4, 5, 6, 7, 8, 9], [1, 1], [5]])
    weights = np.array([1.0, 3.0, 2.0, 9.0])
    losses = OBJECTIVE.row_losses(model, OBJECTIVE.collate(rows, np.arange(4), "cpu"))
    w, counts = torch.tensor(weights[:3]), losses.label_count[:3]
    if weighting == "examples":
        mean = (w * losses.loss_sum[:3] / counts).sum() / w.sum()
    else:
        mean = (w * losses.loss_sum[:3]).sum() / (w * counts).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(model.parameters()))])
    (unit,) = clipped_units(
        model, rows, np.zeros(4, dtype=int), Clip(norm=1e9), objective=OBJECTIVE, weighting=weighting, weights=weights
    )
    torch.testing.assert_close(unit[1], expected)
    assert unit[3] == pytest.approx(float(mean.detach()))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 120), units=st.integers(1, 12))
def test_every_row_is_in_one_micro_batch_that_fits(seed: int, budget: int, units: int) -> None:
    rows, ids = ragged(seed, units=units, most=8)
    made = make_units(rows, ids, OBJECTIVE, "examples", None)
    together, alone = pack_units(made, budget)
    seen = [int(u) for part in together for u in part] + list(alone)
    assert sorted(seen) == np.flatnonzero(made.counts).tolist()

    def tokens(units_) -> int:
        places = np.concatenate([np.arange(made.offsets[u], made.offsets[u + 1]) for u in units_])
        return len(places) * int(made.lengths[places].max())

    assert all(tokens(part) <= budget for part in together)
    for unit in alone:
        parts = split_rows(made, unit, budget)
        assert sorted(np.concatenate(parts)) == list(range(made.offsets[unit], made.offsets[unit + 1]))
        assert all(len(p) == 1 or len(p) * made.lengths[p].max() <= budget for p in parts)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 120), units=st.integers(1, 12))
def test_every_packed_row_is_in_one_micro_batch_that_fits(seed: int, budget: int, units: int) -> None:
    rows, ids = ragged(seed, units=units, most=8)
    made = make_units(rows, ids, OBJECTIVE, "examples", None)
    together, alone = pack_units(made, budget, packed=True)
    assert sorted([int(u) for part in together for u in part] + alone) == np.flatnonzero(made.counts).tolist()
    assert all(made.tokens[part].sum() <= budget for part in together)
    for unit in alone:
        parts = split_rows(made, unit, budget, packed=True)
        assert sorted(np.concatenate(parts)) == list(range(made.offsets[unit], made.offsets[unit + 1]))
        assert all(len(p) == 1 or made.packed_lengths[p].sum() <= budget for p in parts)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), longest=st.sampled_from([8, SHORT_ROW, 4 * SHORT_ROW]), gpu=st.booleans())
def test_packed_rows_hold_what_predicts_and_nothing_else_of_short_ones(seed: int, longest: int, gpu: bool) -> None:
    """Every label that a row has is asked for, behind the tokens of the same row that come before it."""
    rows, ids = ragged(seed, longest=longest)
    made = make_units(rows, ids, OBJECTIVE, "examples", None)
    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    batch, packed = packed_batch(rows, made.rows, device, whole=made.whole)
    lengths = made.packed_lengths
    assert made.whole or rows.lengths[made.rows].mean() < SHORT_ROW
    assert packed.lengths[: len(lengths)].tolist() == lengths.tolist()
    given = batch.input_ids[0].tolist()
    labels = [*batch.labels[0].tolist(), IGNORED_LABEL]
    starts = np.cumsum(lengths) - lengths
    for row, start, length in zip(made.rows, starts, lengths, strict=True):
        alone = rows.take(np.array([row]))
        assert alone.labels is not None
        assert given[start : start + length] == alone.tokens.tolist()[:length]
        assert labels[start : start + length] == [*alone.labels.tolist()[1:], *[IGNORED_LABEL] * made.whole]
    assert all(label == IGNORED_LABEL for label in labels[lengths.sum() :])
