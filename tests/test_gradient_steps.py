"""The steps that both gradient benchmarks measure: micro-batches hold every row, and all ways compute one gradient."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import gradient_steps
from benchmarks.gradient_models import SIZES, build
from benchmarks.gradient_rivals import OpacusStep
from benchmarks.gradient_steps import (
    Case,
    alike_batches,
    clipped_step,
    fused_step,
    median_clip,
    padded_batches,
    plain_step,
    ragged_case,
    uniform_case,
    unit_batches,
)
from fedsim.clip import Clip
from fedsim.gradients.objective import Batch
from fedsim.rows import IGNORED_LABEL

CPU = torch.device("cpu")
SIZE = replace(SIZES["tiny-lora"], layers=1, vocabulary=64, length=16, base=torch.float32)


def rows_in(batch: Batch) -> list[tuple[int, ...]]:
    """The scored tokens of each row that has any."""
    kept = [row[row != IGNORED_LABEL] for row in batch.labels]
    return [tuple(row.tolist()) for row in kept if len(row)]


@pytest.mark.parametrize("case", [ragged_case(SIZE, 9, 5), uniform_case(SIZE, 5, 2), ragged_case(SIZE, 7, 1)])
def test_micro_batches_hold_every_row_once(case: Case) -> None:
    """Padded to one another, padded to one shape, and with whole units."""
    rows = sorted(tuple(case.rows.tokens[a + 1 : b].tolist()) for a, b in zip(*offsets(case), strict=True))
    padded = padded_batches(case, 70, CPU)
    alike = alike_batches(case, 70, CPU)
    for batches in (padded, alike):
        assert sorted(row for batch in batches for row in rows_in(batch)) == rows
        assert all(batch.input_ids.numel() <= 70 for batch in batches)
    assert len({batch.input_ids.shape for batch in alike}) == 1
    units = unit_batches(case, 70, CPU)
    assert sorted(row for part in units for row in rows_in(part.batch)) == rows
    assert sum(int(part.units[-1]) + 1 for part in units) == case.units
    assert all(part.batch.input_ids.numel() <= 70 or int(part.units[-1]) == 0 for part in units)
    counts = sorted(int(count) for part in units for count in torch.bincount(part.units))
    assert counts == sorted(np.bincount(case.unit_ids).tolist())


def offsets(case: Case) -> tuple[np.ndarray, np.ndarray]:
    return case.rows.offsets[:-1], case.rows.offsets[1:]


def test_ragged_users_are_as_uneven_as_people() -> None:
    """Half of all rows belong to few users, and rows are of all lengths."""
    case = ragged_case(SIZES["124m"], 64, 200)
    counts, lengths = np.sort(np.bincount(case.unit_ids))[::-1], case.rows.lengths
    assert counts[:13].sum() > counts.sum() / 2
    assert counts.max() > 5 * np.median(counts)
    assert lengths.max() == 128 > 2 * np.median(lengths) > 4 * lengths.min()
    assert ragged_case(SIZES["124m"], 64, 16).most_rows == 16


def test_all_steps_without_privacy_compute_the_mean_of_the_rows_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the clipped sum is of units of one row that no clip touches, divided by them."""
    model, case = build(SIZE, CPU, False), ragged_case(SIZE, 7, 1)
    found: list[torch.Tensor] = []

    def keep(of: torch.nn.Module) -> None:
        found.append(torch.cat([p.grad.flatten() for p in of.parameters() if p.grad is not None]))
        for parameter in of.parameters():
            parameter.grad = None

    monkeypatch.setattr(gradient_steps, "_forget_gradients", keep)
    for step in (plain_step, fused_step):
        for make in (padded_batches, alike_batches):
            step(model, make(case, 40, CPU), len(case.rows), None)
    wanted = clipped_step(model, case, Clip(norm=1e6), None, "reference", None) / len(case.rows)
    for gradient in found:
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_a_step_that_fails_leaves_no_gradients() -> None:
    model, case = build(SIZE, CPU, False), uniform_case(SIZE, 2, 1)
    batches: list[Batch] = [*padded_batches(case, 40, CPU), None]  # type: ignore[list-item]
    steps: tuple[Callable[..., None], ...] = (plain_step, fused_step)
    for step in steps:
        with pytest.raises(AttributeError):
            step(model, batches, 2, None)
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("name", "most"), [("tiny", 4), ("tiny-lora", 4)])
def test_opacus_is_measured_on_the_same_problem(name: str, most: int) -> None:
    """Its gradients of rows, added up and clipped by user, give our clipped sum; so does ghost with a row each."""
    pytest.importorskip("opacus", reason="Opacus is no dependency; the benchmarks take it from a folder of its own")
    size = replace(SIZES[name], layers=1, vocabulary=64, length=16, base=torch.float32)
    for mode, case in (("per-sample", ragged_case(size, 5, most)), ("ghost", ragged_case(size, 5, 1))):
        model = build(size, CPU, False)
        clip = median_clip(model, case, None, None)
        ours = clipped_step(model, case, clip, None, "fast", None)
        step = OpacusStep(build(size, CPU, False, linear_layers=True), mode)
        theirs = step(unit_batches(case, 60, CPU), clip.norm, None)
        tied = mode == "ghost" and name == "tiny"  # ghost cuts the tie, and clips another model
        total = torch.stack([part.norm() for part in theirs]).norm()
        torch.testing.assert_close(total, ours.norm(), rtol=0.05 if tied else 1e-3, atol=0)
