"""Each kernel against float64, on shapes that no tile divides; `test_kernels` runs this in Triton's interpreter."""

import numpy as np
import pytest
import torch

from fedsim.gradients import kernels
from fedsim.gradients.per_unit.outer_products import add_outer
from fedsim.gradients.per_unit.products import gram_inner
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments
from fedsim.rows import IGNORED_LABEL

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

HALF = torch.bfloat16
SHAPES = [(1, 1, 1, 1), (1, 300, 33, 17), (15, 1, 5, 9), (3, 65, 130, 260), (2, 128, 128, 256)]
"""Units, tokens, and the widths of both factors: a single value, more tokens than two tiles hold, more units than
programs, more than one tile of the target each way, and exactly one."""


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that few values make many, and so that a running sum ends within a row."""
    from fedsim.gradients.kernels import gram, loss, weighted

    for module, sizes in (
        (weighted, {"ROWS": 16, "COLUMNS": 16, "TOKENS": 16, "PROGRAMS": 24}),
        (gram, {"TILE": 16, "FEATURES": 16, "PIECE": 32}),
        (loss, {"BLOCK": 16}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def factors(units: int, tokens: int, p: int, q: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right, each unit of another size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, units)[:, None, None]
    left = torch.randn(units, tokens, p, generator=generator) + torch.randn(p, generator=generator)
    return (left * sizes).to(HALF), torch.randn(units, tokens, q, generator=generator).to(HALF)


def laid_out(factor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values at other addresses and distances."""
    units, tokens, width = factor.shape
    if how == "padded":  # as logits of a vocabulary that was filled up
        room = factor.new_full((units, tokens, width + -width % 8 + 64), float("nan"))
        room[..., :width] = factor
        return room[..., :width]
    if how == "odd distances":
        room = factor.new_full((units, tokens, width + 1 + width % 2), float("nan"))
        room[..., :width] = factor
        return room[..., :width]
    if how == "odd address":
        room = factor.new_full((factor.numel() + 1,), float("nan"))
        room[1:] = factor.flatten()
        return room[1:].view(factor.shape)
    if how == "units far apart":
        room = factor.new_full((units, tokens + 3, width), float("nan"))
        room[:, :tokens] = factor
        return room[:, :tokens]
    return factor.contiguous()


LAYOUTS = ("contiguous", "padded", "odd distances", "odd address", "units far apart")


def uniform(factor: torch.Tensor) -> Segments:
    """Of the units of [u, n, d], once it is flat."""
    return Segments(np.full(len(factor), factor.shape[1]), factor.device)


def weighted_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor) -> None:
    kernels.weighted_products([target], [(left, right)], weights)


def gram_norms(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squared, spread = kernels.gram_norms_of([(left, right)])
    return squared[0], spread[0]


def exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Each unit's gradient, float64."""
    return left.double().transpose(1, 2) @ right.double()


def assert_weighted(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.manual_seed(1)
    weights = torch.rand(len(left)) / left.double().norm(dim=(1, 2)).float()
    weights = torch.cat([weights, torch.full((8,), float("nan"))])[: len(left)]  # of no unit
    added = (weights.double()[:, None, None] * exact(left, right)).sum(0)
    # Of the sum's own size: its rounding counts too, and hides nothing.
    target = torch.randn(added.shape) * float(added.square().mean().sqrt())
    expected = target.double() + added
    weighted_product(target, left, right, weights)
    assert float((target - expected).norm()) < 1e-6 * min(float(added.norm()), float(expected.norm()))


def assert_norms(left: torch.Tensor, right: torch.Tensor) -> None:
    squared, spread = gram_norms(left, right)
    assert squared.dtype == spread.dtype == torch.float64
    expected = exact(left, right).flatten(1).square().sum(1)
    assert float((squared / expected - 1).abs().max()) < 1e-5
    _, known = gram_inner(left, right)
    assert float((spread / known - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_norms_are_those_of_float64(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.gradients.kernels import weighted

    monkeypatch.setattr(weighted, "PROGRAMS", 12)
    left, right = factors(*shape)
    assert kernels.usable(left, right)
    assert_weighted(left, right)
    assert_norms(left, right)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(6))
def test_sums_and_norms_are_those_of_float64_over_many_tiles(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 8 tiles of the target's rows, sums longer than a piece, and 1, some or many parts of the units."""
    from fedsim.gradients.kernels import weighted

    rng = np.random.default_rng(seed)
    monkeypatch.setattr(weighted, "PROGRAMS", (1, 24, 400)[seed % 3])
    shape = (rng.integers(2, 7), rng.integers(1, 50), (30, 150)[seed % 2] + rng.integers(1, 30), rng.integers(1, 40))
    left, right = factors(*map(int, shape), seed=seed)
    left, right = laid_out(left, LAYOUTS[seed % 5]), laid_out(right, LAYOUTS[(seed + seed // 5) % 5])
    assert_weighted(left, right)
    assert_norms(left, right)


def test_many_products_at_once_are_each_of_its_own_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shape and of several, some of them at other distances, into views of one vector."""
    from fedsim.gradients.kernels import weighted

    monkeypatch.setattr(weighted, "PROGRAMS", 4)  # those of one shape in one part, others in several
    shapes = [(3, 70, 30, 20), (3, 70, 30, 20), (3, 20, 9, 8), (3, 70, 30, 20), (3, 70, 20, 30), (3, 300, 5, 7)]
    pairs = [factors(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    pairs[1] = laid_out(pairs[1][0], "padded"), laid_out(pairs[1][1], "units far apart")
    weights = torch.tensor([0.5, 0.0, 0.25])
    flat = torch.zeros(sum(p * q for *_, p, q in shapes))
    views = torch.split(flat, [p * q for *_, p, q in shapes])
    targets = [view.view(p, q) for view, (*_, p, q) in zip(views, shapes, strict=True)]
    kernels.weighted_products(targets, pairs, weights)
    squared, spread = kernels.gram_norms_of(pairs)
    assert squared.shape == spread.shape == (len(shapes), 3)
    for number, (left, right) in enumerate(pairs):
        each = exact(left, right)
        expected = (weights.double()[:, None, None] * each).sum(0)
        assert float((targets[number] - expected).norm()) < 1e-6 * float(expected.norm())
        assert float((squared[number] / each.flatten(1).square().sum(1) - 1).abs().max()) < 1e-5
        assert float((spread[number] / gram_inner(left, right)[1] - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("how", LAYOUTS)
def test_factors_may_lie_anywhere(how: str) -> None:
    """What lies between them is not a number, and would show."""
    left, right = factors(2, 130, 21, 13)
    left, right = laid_out(left, how), laid_out(right, how)
    assert kernels.usable(left, right)
    assert_weighted(left, right)
    assert_norms(left, right)


def test_tokens_that_cancel_or_repeat_are_seen_in_the_spread() -> None:
    left, right = factors(3, 200, 40, 40)
    left[1] = left[1, :1]  # one token, 200 times
    right[1] = right[1, :1]
    left[2, 100:], right[2, 100:] = left[2, :100], -right[2, :100]  # nothing is left of them
    squared, spread = gram_norms(left, right)
    known, known_spread = gram_inner(left, right)
    assert float((spread / known_spread - 1).abs().max()) < 1e-3
    assert float(spread[1]) == pytest.approx(float(squared[1]), rel=1e-3)
    assert abs(float(squared[2])) < 1e-6 * float(spread[2])
    torch.testing.assert_close(squared[:2], known[:2].double(), rtol=1e-5, atol=0)


def test_what_vanishes_in_one_factor_and_not_in_the_other_is_seen_in_the_spread() -> None:
    """Squares of 10⁻²⁵ are 0 in float32, and what is left would be a norm of 0, of which nothing is unsure."""
    left, right = (torch.randn(2, 200, d, generator=torch.Generator().manual_seed(d)).bfloat16() for d in (40, 24))
    for one, other in ((left, right), (right, left)):
        _, spread = gram_norms(one * 1e-25, other * 1e16)
        _, known_spread = gram_inner(one * 1e-25, other * 1e16)
        assert float((spread / known_spread - 1).abs().max()) < 1e-3
        norms = exact(one, other).flatten(1).norm(dim=1) * 1e-9
        assert bool((8 * 2**-23 * spread > norms.square()).all())


@pytest.mark.parametrize("programs", [1, 2, 132])
def test_a_factor_of_zero_adds_exactly_zero_and_the_others_as_without_the_unit(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.gradients.kernels import weighted

    monkeypatch.setattr(weighted, "PROGRAMS", programs)
    left, right = factors(4, 20, 30, 40)
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0])
    start = torch.randn(30, 40)
    found, expected = start.clone(), start.clone()
    weighted_product(found, left, right, weights)
    weighted_product(expected, *(factor * (weights > 0).view(-1, 1, 1) for factor in (left, right)), weights)
    assert torch.equal(found, expected)
    before = found.clone()
    weighted_product(found, left, right, torch.zeros(4))
    assert torch.equal(found, before)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_unit(value: float) -> None:
    left, right = factors(3, 140, 20, 30)
    clean, spreads = gram_norms(left, right)
    left[1, 137, 4] = value
    squared, spread = gram_norms(left, right)
    assert not torch.isfinite(squared[1])
    assert torch.equal(squared[::2], clean[::2])
    assert torch.equal(spread[::2], spreads[::2])

    gradients = UnitGradients(torch.Size((20, 30)), 3)
    gradients.outers.append((uniform(left), (left.flatten(0, 1), right.flatten(0, 1))))
    gradients.zero(torch.tensor([False, True, False]))
    found = torch.zeros(20, 30)
    gradients.add_weighted(found, torch.tensor([1.0, 0.0, 1.0]))
    assert torch.isfinite(found).all()
    only = exact(left[::2], right[::2]).sum(0)
    assert float((found - only).norm()) < 1e-6 * float(only.norm())


def test_the_callers_take_the_kernels_where_they_may_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = factors(2, 6, 40, 50)
    taken: list[str] = []
    names = ("weighted_products", "gram_norms_of")
    for name in names:
        place = f"fedsim.gradients.per_unit.outer_products.{name}"
        monkeypatch.setattr(place, lambda *a, name=name: taken.append(name) or torch.zeros(2, 1, 2))

    def calls(one: torch.Tensor, other: torch.Tensor) -> list[str]:
        taken.clear()
        add_outer(torch.zeros(40, 50), one, other, torch.ones(2), segments)
        gradients = UnitGradients(torch.Size((40, 50)), 2)
        gradients._outer_norms(segments, (one, other))
        return list(taken)

    segments, left, right = uniform(left), left.flatten(0, 1), right.flatten(0, 1)
    assert calls(left, right) == list(names)
    assert calls(left.float(), right.float()) == []
    assert calls(left.t().contiguous().t(), right) == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert calls(left, right) == []


def expected_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, gradients and hits in float64."""
    exact, place, scored = logits.double(), labels.clamp(min=0)[:, None], labels >= 0
    logs = torch.log_softmax(exact, -1)
    gradient = logs.exp().scatter_add(-1, place, -torch.ones_like(place, dtype=torch.float64))
    right = (exact.gather(-1, place) >= exact.amax(-1, keepdim=True))[:, 0]
    losses = -logs.gather(-1, place)[:, 0]
    return losses.where(scored, 0), gradient.where(scored[:, None], 0), right & scored


def assert_loss(logits: torch.Tensor, labels: torch.Tensor) -> None:
    losses, gradient, right = expected_loss(logits, labels)
    found, hits = kernels.loss_gradient_(logits, labels)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
    assert torch.equal(hits, right)
    # The interpreter cuts a float32 short where a GPU rounds it to bfloat16.
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-7, atol=1e-7)
    assert torch.equal(logits[labels < 0], torch.zeros_like(logits[labels < 0]))
    assert not found[labels < 0].any()


def some_logits(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, width, (rows,), generator=generator)
    return (torch.randn(rows, width, generator=generator) * 4).to(HALF), labels


@pytest.mark.parametrize("width", [1, 7, 4096, 4097, 9000])
def test_losses_and_their_gradients_are_those_of_float64(width: int) -> None:
    logits, labels = some_logits(5, width, width)
    labels[2] = IGNORED_LABEL
    labels[3] = width - 1
    logits[4, labels[4]] = 50.0  # sure, and right
    assert_loss(logits, labels)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("width", [15, 16, 17, 50])
def test_logits_of_minus_infinity_and_ties(width: int) -> None:
    logits, labels = some_logits(6, width, width)
    logits[0, : min(width - 1, 20)] = -float("inf")  # the first block and more, whole
    labels[0] = width - 1
    logits[1, ::3] = -float("inf")
    labels[1] = 1
    logits[2] = -float("inf")
    logits[2, width // 2], labels[2] = 3.0, width // 2  # all the mass in one place
    logits[3, [0, width - 1]] = 30.0  # the label is one of two that are the highest
    labels[3] = width - 1
    logits[4] = 0.5  # all alike
    labels[5], logits[5, 0] = 1, 40.0  # wrong
    assert_loss(logits, labels)


def test_a_label_that_cannot_be_has_an_infinite_loss_and_a_finite_gradient() -> None:
    logits, labels = some_logits(2, 9, 0)
    logits[0, labels[0]] = -float("inf")
    losses, _ = kernels.loss_gradient_(logits, labels)
    assert losses[0] == float("inf")
    assert torch.isfinite(losses[1])
    assert torch.isfinite(logits).all()
    assert float(logits[0, labels[0]]) == -1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_logits_that_are_not_finite_spoil_their_row_if_it_is_scored(value: float) -> None:
    logits, labels = some_logits(4, 40, 1)
    logits[1, 3] = logits[2, 3] = value
    labels[2] = IGNORED_LABEL
    clean, known = logits.clone(), labels.clone()
    losses, _ = kernels.loss_gradient_(logits, labels)
    assert not torch.isfinite(logits[1]).all()
    assert not torch.isfinite(losses[1])
    assert not logits[2].any()
    assert losses[2] == 0
    torch.testing.assert_close(losses[::3].double(), expected_loss(clean[::3], known[::3])[0], rtol=2e-6, atol=2e-6)
    assert torch.isfinite(logits[::3]).all()


def test_what_lies_between_rows_is_left_as_it_is() -> None:
    logits, labels = some_logits(6, 50, 3)
    room = torch.full((6, 64), 7.0, dtype=HALF)
    room[:, :50] = logits
    labels[4] = IGNORED_LABEL
    kernels.loss_gradient_(logits, labels)
    kernels.loss_gradient_(room[:, :50], labels)
    assert torch.equal(room[:, :50], logits)
    assert (room[:, 50:] == 7).all()
