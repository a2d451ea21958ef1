"""What was tried against packed rows and failed: they hold."""

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY
from packed_attacks import CLIP, OBJECTIVE, Around, off, rows_of
from packed_models import LEAKS, Leaky, earlier, gpt2, llama, mistral
from torch.nn.functional import pad

from fedsim.gradients import clipped_sum
from fedsim.gradients.fast import FastSum
from fedsim.rows import IGNORED_LABEL, TokenRows


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("leak", [name for name in LEAKS if "180" not in name])
def test_what_leaks_is_out_of_every_sum(leak: str) -> None:
    assert off(Leaky(LEAKS[leak]).double(), rows_of([12] * 14 + [9, 11, 7]), (0, 15), max_tokens=200) < 1e-9


@pytest.mark.parametrize("place", ["last", "first"])
def test_a_token_at_the_boundary_that_lets_it_leak_is_seen(place: str) -> None:
    """Rows that end, or begin, with a certain token: the rows that are kept are the caller's own."""
    model, rows = Around(gpt2()), rows_of([12] * 14 + [9, 11, 7])
    rows.tokens[rows.offsets[1:] - 1 if place == "last" else rows.offsets[:-1]] = 1

    def move(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        at = model.ids == 1 if place == "first" else pad(model.ids, (1, 0))[:, :-1] == 1
        return output + at[..., None] * earlier(1)(output)

    model.inner.transformer.h[0].register_forward_hook(move)
    model.register_forward_pre_hook(lambda module, inputs: setattr(model, "ids", inputs[0]))
    assert off(model.double(), rows, (0, 15), max_tokens=200) < 1e-9


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e200])
@pytest.mark.parametrize("make", [llama, mistral])
def test_a_unit_that_is_not_finite_leaves_its_neighbours_as_they_are(make, value, monkeypatch) -> None:
    ran: list[bool] = []
    passed = FastSum.passed
    monkeypatch.setattr(FastSum, "passed", lambda self, units: (ran.append(self.packed), passed(self, units))[1])
    model, bad = make().double(), np.array([2, 9, 20])
    rows = rows_of([12] * 6 + [9, 11, 7, 15, 3, 5, 13, 14, 10, 2] * 2, words=VOCABULARY - 1)
    ids = np.arange(len(rows))
    clipped_sum(model, rows, ids, CLIP, objective=OBJECTIVE, max_tokens=150)
    rows.tokens[rows.offsets[bad] + 1] = VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = value
    found = clipped_sum(model, rows, ids, CLIP, objective=OBJECTIVE, max_tokens=150)
    assert ran[-1]
    assert (~found.finite).nonzero()[:, 0].tolist() == bad.tolist()
    others = np.delete(ids, bad)
    expected = clipped_sum(
        model, rows.take(others), np.arange(len(others)), CLIP, objective=OBJECTIVE, method="reference"
    )
    torch.testing.assert_close(found.total, expected.total, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.norms[others], expected.norms, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_weights_and_labels_give_what_the_reference_gives(seed: int) -> None:
    """Rows of no or one token, labels of others' or ignored at the boundary, units without rows, any budget."""
    rng = np.random.default_rng(seed)
    lengths = np.append(rng.choice([0, 1, 2, 3, 8, 15, 40], rng.integers(2, 30)), 9)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = rng.integers(1, VOCABULARY, offsets[-1])
    labels[rng.random(len(labels)) < rng.choice([0, 0.2, 0.8])] = IGNORED_LABEL
    labels[offsets[:-1][lengths > 0]] = rng.choice([5, IGNORED_LABEL])
    labels[offsets[1:][lengths > 0] - 1] = rng.choice([7, IGNORED_LABEL])
    labels[-2] = 3
    rows = TokenRows(tokens=rng.integers(1, VOCABULARY, offsets[-1]), offsets=offsets, labels=labels)
    ids, weights = rng.integers(0, 9, len(lengths)), rng.choice([0, 1, 2.5, 1e-3], len(lengths))
    weights[-1] = 1
    model = (llama, mistral)[seed % 2]().double()
    arguments = {"objective": OBJECTIVE, "weighting": ("examples", "tokens")[seed // 2 % 2], "weights": weights}
    expected = clipped_sum(model, rows, ids, CLIP, method="reference", **arguments)
    found = clipped_sum(model, rows, ids, CLIP, max_tokens=int(rng.choice([16, 33, 60, 500])), **arguments)
    for name in ("total", "norms", "losses"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
