"""L(G) on public users: the median over users of the norm of their mean gradient, as plain autograd finds it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.public_norms import measure_curves
from fedsim.clip import Clip
from fedsim.data.contribution import draw_rows
from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, clipped_sum
from fedsim.rows import TokenRows

VOCABULARY = 12


class Bigrams(torch.nn.Module):
    """Predicts the next token from the last alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


class Users:
    """Users with rows of five random tokens each."""

    def __init__(self, counts: list[int]) -> None:
        self.user_offsets = np.concatenate([[0], np.cumsum(counts)])
        self.num_users, self.num_rows = len(counts), int(sum(counts))
        self.row_lengths = np.full(self.num_rows, 5, dtype=np.int32)
        self._tokens = np.random.default_rng(0).integers(0, VOCABULARY, (self.num_rows, 5))

    def take(self, rows: np.ndarray) -> TokenRows:
        return TokenRows(tokens=self._tokens[rows].ravel(), offsets=np.arange(len(rows) + 1) * 5)


def test_norms_are_the_medians_of_users_mean_gradients() -> None:
    model, view = Bigrams().eval(), Users([8] * 10 + [1] * 5)
    curve, _ = measure_curves(model, CausalLanguageModel(), view, largest_group=8)
    assert curve.group_sizes == (1, 2, 4, 8)
    assert curve.norms[0] == 1
    assert list(curve.norms) == sorted(curve.norms, reverse=True), "random rows average out"

    medians = []
    for size in (1, 8):
        rows, units = draw_rows(view, np.arange(10), size, 0, 0)
        plain = clipped_sum(
            model, view.take(rows), units, Clip(norm=1e9), objective=CausalLanguageModel(), method="reference"
        )
        medians.append(float(np.median(plain.norms.numpy())))
    assert curve.norms[-1] == pytest.approx(medians[1] / medians[0], rel=1e-4)


def test_the_largest_group_is_one_that_enough_users_own() -> None:
    norms, _ = measure_curves(Bigrams().eval(), CausalLanguageModel(), Users([2] * 9 + [16]))
    assert norms.group_sizes == (1, 2)
    with pytest.raises(InvalidInput, match="public users"):
        measure_curves(Bigrams().eval(), CausalLanguageModel(), Users([1] * 20))


def test_what_users_share_is_the_mean_cosine_between_their_gradients() -> None:
    model, view = Bigrams().eval(), Users([8] * 10)
    signal = measure_curves(model, CausalLanguageModel(), view, largest_group=8)[1]
    assert signal.name == "measured"
    for size in (1, 8):
        directions = []
        for user in range(10):
            rows, units = draw_rows(view, np.array([user]), size, 0, 0)
            one = clipped_sum(model, view.take(rows), units, Clip(norm=1e9), objective=CausalLanguageModel())
            directions.append((one.total / one.total.norm()).double())
        cosines = torch.stack(directions) @ torch.stack(directions).T
        mean = float(cosines.sum() - cosines.trace()) / 90
        assert mean > 1e-3
        assert signal(size) ** 2 == pytest.approx(mean, rel=1e-3)
