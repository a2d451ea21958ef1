"""Local steps: θ − θ_K of each unit, clipped."""

import pytest
import torch
from gradient_checks import Tables, ragged

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, LocalSteps, ParameterLayout, clipped_sum

OBJECTIVE = CausalLanguageModel()


def test_one_step_of_size_one_is_the_gradient() -> None:
    torch.manual_seed(0)
    model = Tables(6, True, None).double()
    rows, ids = ragged()
    one = clipped_sum(
        model, rows, ids, Clip(norm=0.3), objective=OBJECTIVE, local_steps=LocalSteps(steps=1, learning_rate=1.0)
    )
    gradient = clipped_sum(model, rows, ids, Clip(norm=0.3), objective=OBJECTIVE, method="reference")
    torch.testing.assert_close(one.total, gradient.total)
    torch.testing.assert_close(one.losses, gradient.losses)


def test_three_steps_are_gradient_descent_from_the_same_start_for_each_unit() -> None:
    torch.manual_seed(0)
    model = Tables(6, False, None).double()
    layout = ParameterLayout.of(model)
    start = [p.detach().clone() for p in model.parameters()]
    rows, ids = ragged(units=3)
    found = clipped_sum(
        model, rows, ids, Clip(norm=1e9), objective=OBJECTIVE, local_steps=LocalSteps(steps=3, learning_rate=0.5)
    )
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    expected = torch.zeros(layout.size, dtype=torch.float64)
    for unit in range(3):
        indices = (ids == unit).nonzero()[0]
        indices = indices[OBJECTIVE.label_counts(rows)[indices] > 0]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            losses = OBJECTIVE.row_losses(model, OBJECTIVE.collate(rows, indices, "cpu"))
            (losses.loss_sum / losses.label_count).mean().backward()
            optimizer.step()
        expected += torch.cat([(s - p.detach()).flatten() for s, p in zip(start, model.parameters(), strict=True)])
        with torch.no_grad():
            for p, s in zip(model.parameters(), start, strict=True):
                p.copy_(s)
    torch.testing.assert_close(found.total, expected)


def test_each_update_is_clipped_and_a_diverging_unit_adds_nothing() -> None:
    torch.manual_seed(0)
    model = Tables(6, True, None)
    before = ParameterLayout.of(model).flatten(model)
    rows, ids = ragged(units=1)
    one = clipped_sum(
        model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE, local_steps=LocalSteps(steps=2, learning_rate=1.0)
    )
    assert one.norms[0] > 0.1
    assert 0.0999 < float(one.total.norm()) <= 0.1
    far = clipped_sum(
        model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE, local_steps=LocalSteps(steps=4, learning_rate=1e38)
    )
    assert not far.finite[0]
    assert not far.total.any()
    assert torch.equal(ParameterLayout.of(model).flatten(model), before)


@pytest.mark.parametrize(("steps", "rate"), [(0, 1.0), (1, 0.0), (1, float("inf"))])
def test_impossible_steps_are_refused(steps: int, rate: float) -> None:
    with pytest.raises(InvalidInput, match="local_steps"):
        LocalSteps(steps=steps, learning_rate=rate)
