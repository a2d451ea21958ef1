"""Layers called with vectors that have no axis of rows: the fast path takes them only if it knows whose they are."""

import logging

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, Around, assert_same, fast_sum

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum, layer_paths
from fedsim.gradients.rows.order import RowOrder
from fedsim.gradients.tape import RowsMixedError
from fedsim.rows import TokenRows

OBJECTIVE = CausalLanguageModel()
HALF = VOCABULARY // 2
WIDTH = 6


class Experts(torch.nn.Module):
    """A router sends each token to one of two layers, which is called with its tokens alone, if it has any."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        route = (flat[:, 0] > 0).long()
        out = torch.zeros_like(flat)
        for expert in route.unique().tolist():
            chosen = torch.where(route == expert)[0]
            out = out.index_add(0, chosen, self.experts[expert](flat[chosen]))
        return x + out.view_as(x)


class Sorting(torch.nn.Module):
    """Hands a layer all tokens, sorted by a feature: in their own order where they happen to be sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        order = flat[:, 0].argsort(stable=True)
        return self.layer(flat[order])[order.argsort()].view(x.shape)


class Occasional(torch.nn.Module):
    """A layer that only some tokens need, called for all where one does."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.other = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        needed = (x[..., :1] > 0).to(x.dtype)
        return self.usual(x) + (needed * self.other(x) if needed.any() else 0)


class Flat(torch.nn.Module):
    """A block whose layers are called with the tokens of all rows end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        gate, value = self.up(self.norm(flat)).chunk(2, -1)
        return (flat + self.down(torch.nn.functional.silu(gate) * value)).view(x.shape)


def around(layer: torch.nn.Module) -> torch.nn.Module:
    """A language model whose tokens below HALF have a first feature below 0, ever more of it; the others above."""
    model = Around(layer, WIDTH).double()
    model.features[:, 0] = torch.arange(VOCABULARY) - HALF - 0.5
    return model


TRIED = TokenRows.from_lists([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14, 15]])
"""Tokens of one kind, sorted: what the model is tried with."""


@pytest.mark.parametrize("layer", [Experts, Sorting, Occasional])
def test_no_rows_are_mixed_by_a_model_that_was_tried_with_kinder_data(layer: type) -> None:
    torch.manual_seed(0)
    model, clip = around(layer()), Clip(norm=1e-3)
    clipped_sum(model, TRIED, np.arange(3), clip, objective=OBJECTIVE)
    rng = np.random.default_rng(0)
    for _ in range(40):
        rows = TokenRows.from_lists([rng.integers(1, VOCABULARY, 4).tolist() for _ in range(2)])
        found = clipped_sum(model, rows, np.arange(2), clip, objective=OBJECTIVE)
        assert_same(found, clipped_sum(model, rows, np.arange(2), clip, objective=OBJECTIVE, method="reference"), 1e-9)


def test_a_layer_that_the_trial_did_not_reach_takes_the_reference_path_when_it_is(caplog) -> None:
    torch.manual_seed(0)
    model, clip = around(Occasional()), Clip(norm=1e-3)
    clipped_sum(model, TRIED, np.arange(3), clip, objective=OBJECTIVE)
    assert layer_paths(model)
    assert not caplog.records
    rows = TokenRows.from_lists([[VOCABULARY - 1, 2, 3], [2, 3, 4]])
    clipped_sum(model, rows, np.arange(2), clip, objective=OBJECTIVE)
    assert "layer.other is called in a way in which it was not" in caplog.text


def test_tokens_end_to_end_keep_the_fast_path(caplog) -> None:
    torch.manual_seed(0)
    model, clip = around(Flat()), Clip(norm=1e-3)
    rows = TokenRows.from_lists([[1, 2, 3, 4, 5, 6], [40, 8, 9], [11, 50]])
    for _ in range(2):
        found = clipped_sum(model, rows, np.arange(3), clip, objective=OBJECTIVE)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert set(layer_paths(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    expected = clipped_sum(model, rows, np.arange(3), clip, objective=OBJECTIVE, method="reference")
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("layer", [Experts, Sorting])
def test_a_pass_over_unknown_vectors_is_refused_whatever_their_number(layer: type) -> None:
    with pytest.raises(RowsMixedError, match="vectors of unknown rows"):
        fast_sum(around(layer()), TRIED, np.arange(3), Clip(norm=1.0), objective=OBJECTIVE)


def test_order_is_known_where_it_is_kept_and_nowhere_else() -> None:
    x, rows = torch.randn(3, 4, 5), 3
    some = torch.tensor([2, 0, 1])
    with RowOrder(rows) as order:
        flat = x.reshape(-1, 5)
        kept = [
            flat, x.flatten(0, 1), x[:, 0], x.mean(1), x.sum(1), x[:, :1].squeeze(1), x.view(3, -1), flat * 2,
            1 - flat, flat / flat.sum(-1, keepdim=True), torch.relu(flat + torch.ones(5)), flat[:, :2],
            flat.chunk(2, -1)[1], torch.nn.functional.linear(flat, torch.randn(12, 5)), torch.cat([flat, flat], -1),
            flat.clone().mul_(2),
        ]  # fmt: skip
        lost = [
            flat[torch.randperm(12)], flat[:6], flat.flip(0), x[some][:, 0].index_select(0, some), x[some, 0],
            x[some, some], flat * torch.randn(12, 1), torch.cat([flat[:, :2], torch.randn(12, 2)], -1), flat.t(),
            torch.cat([x[:, 0], x[:, 1]]), x.transpose(0, 1).flatten(0, 1), torch.randn(12, 5), flat.sort(0)[0],
            torch.nn.functional.linear(torch.eye(12), flat.t()), torch.eye(12) @ flat,
        ]  # fmt: skip
        assert all(order.known(tensor) for tensor in kept)
        assert not any(order.known(tensor) for tensor in lost)
        x[0] = x[1].clone()  # through another view of the same memory
        assert not order.known(flat)
        written = torch.randn(3, 4, 5).reshape(-1, 5)
        written[torch.tensor([1, 0])] = written[:2].clone()
        assert not order.known(written)
        assert not order.known(written.to(written.dtype))
    with RowOrder(rows) as another:
        assert not another.known(kept[0])
