"""Every way in which a norm is formed bounds what is summed: units made to order, clipped, measured in float64."""

import numpy as np
import pytest
import torch
from gradient_checks import MLP, VOCABULARY, Made, Prescribed, Tables, fast_sum
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients import (
    CLIP_MARGIN,
    CausalLanguageModel,
    ParameterLayout,
    SequenceClassification,
    clipped_sum,
)
from fedsim.gradients.per_unit import outer_products
from fedsim.gradients.per_unit.products import batched_inner, squared_row_norms, unsure
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments
from fedsim.rows import TokenRows


def reach(model: Made, max_tokens: int = 10**9) -> float:
    """How far one unit's clipped gradient reaches, over the clip, which is a third of its true norm."""
    rows = TokenRows.from_lists([[1, 1]])
    clip = Clip(norm=float(model.gradient().norm()) / 3)
    found = fast_sum(model, rows, np.array([0]), clip, objective=Prescribed(), max_tokens=max_tokens)
    return float(found.total.double().norm()) / clip.norm


def alike(n: int, width: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """n vectors: at random, all the same, of one value throughout, in one coordinate, or one of three said again."""
    value = 1 + float(torch.rand((), generator=generator))
    if kind == "random":
        return torch.randn(n, width, generator=generator)
    if kind == "same":
        return torch.randn(1, width, generator=generator).expand(n, -1).clone()
    if kind == "constant":
        return torch.full((n, width), value)
    if kind == "one coordinate":
        return value * torch.eye(1, width).expand(n, -1).clone()
    return torch.randn(3, width, generator=generator)[torch.arange(n) % 3]


KINDS = st.sampled_from(["random", "same", "constant", "one coordinate", "repeated"])


@settings(max_examples=150)
@example(
    seed=1, n=1, sizes=(3, 50), kinds=("random", "random"), cancelled=1.5, tied=True, words=1, scale=1e-9
)  # a clip far below SMALLEST_LIMIT
@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([1, 2, 5, 16, 40, 130, 300]),
    sizes=st.tuples(st.sampled_from([3, 60, 300, 3000]), st.sampled_from([4, 50, 640])),
    kinds=st.tuples(KINDS, KINDS),
    cancelled=st.sampled_from([None, 0, 0.3, 0.6, 1, 1.5, 2, 3, 5]),
    tied=st.booleans(),
    words=st.integers(1, 5),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e4, 1e12]),
)
def test_a_clipped_unit_stays_within_the_clip(seed, n, sizes, kinds, cancelled, tied, words, scale) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = sizes
    left, right = alike(n, p, kinds[0], generator) * scale**0.5, alike(n, q, kinds[1], generator) * scale**0.5
    place = rows = None
    if cancelled is not None and not tied:  # the second half undoes the first but for 10^-cancelled of it
        half = n // 2
        left[half : 2 * half] = left[:half]
        right[half : 2 * half] = -right[:half] * (1 - 10.0**-cancelled)
    if tied:
        place = torch.randint(0, min(p, words), (n,), generator=generator)
        if cancelled is None:
            rows = alike(n, q, kinds[1], generator) * scale
        else:
            keep = torch.zeros(p).index_fill_(0, place, 1.0)
            left = left * keep
            outer = (left.double().t() @ right.double())[place] / torch.bincount(place)[place, None]
            rows = (-outer * (1 - 10.0**-cancelled)).float()
    made = Made(left, right, place, rows)
    if float(made.gradient().norm()) > scale * 1e-6:
        assert reach(made) <= 1


@pytest.mark.parametrize(("kind", "words"), [("random", 4), ("constant", 1)])
def test_a_tied_embedding_that_undoes_the_head_is_computed_again(kind: str, words: int) -> None:
    """512 tokens of few words: each word's head gradient is undone by its embedding's but for a few hundredths.

    The head's part alone does not cancel at all.
    """
    generator = torch.Generator().manual_seed(0)
    said = torch.arange(512) % words
    left = torch.zeros(512, 8192)
    left[torch.arange(512), said] = 1.3
    right = alike(words, 640, kind, generator)[said]
    for rest in (0.02, 0.05):
        assert 0.99 < reach(Made(left, right, said, -1.3 * (1 - rest) * right)) <= 1


def test_errors_reach_as_far_as_both_parts_of_a_tied_embedding_are_long() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, nine = UnitGradients(torch.Size((900, 60)), 1), Segments(np.array([9]), torch.device("cpu"))
    left, right = alike(9, 900, "random", generator), alike(9, 60, "random", generator)
    outer = (left.square().sum(1) * right.square().sum(1)).sum()
    for length in (0.1, 10.0, 1e4):
        rows = alike(9, 60, "random", generator) * length
        gradients.outers, gradients.lookups = [(nine, (left, right))], [(nine, (torch.arange(9), rows))]
        _, spread = gradients.squared_norms()
        assert float(spread) >= float((outer.sqrt() + rows.norm()).square()) * (1 - 1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 8, 40])
def test_many_features_that_are_alike_do_not_shorten_a_norm(tokens: int) -> None:
    for value in (1.3, 1.51, 1.93):
        made = Made(torch.full((tokens, 50_257), value), torch.full((tokens, 12), value))
        assert 1 - 2 * CLIP_MARGIN < reach(made) <= 1
        features = torch.full((1, tokens, 50_257), value)
        off = batched_inner(features, features).double() / (50_257 * features[0, 0, 0].double() ** 2) - 1
        assert float(off.abs().max()) < CLIP_MARGIN


@pytest.mark.parametrize("tokens", [700, 5000])
def test_one_word_said_thousands_of_times(tokens: int) -> None:
    for value in (1.1, 1.37, 1.71):
        made = Made(torch.zeros(1, 9000), torch.zeros(1, 3), torch.full((tokens,), 7), torch.full((tokens, 3), value))
        assert 1 - 2 * CLIP_MARGIN < reach(made) <= 1


@pytest.mark.parametrize("kind", ["random", "constant", "one coordinate"])
def test_a_vocabulary_of_gpt2_at_width_32_held(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    made = Made(alike(40, 50_257, "random", generator), alike(40, 32, kind, generator))
    assert 1 - 2 * CLIP_MARGIN < reach(made) <= 1


@settings(max_examples=25)
@given(
    values=st.one_of(st.integers(1, 5000), st.sampled_from([65_536, 1_000_003])),
    units=st.integers(1, 3),
    kind=KINDS,
    scale=st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e15]),
)
def test_norms_of_what_is_held(values: int, units: int, kind: str, scale: float) -> None:
    rows = alike(units, values, kind, torch.Generator().manual_seed(values)) * scale
    exact = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    assert float((squared_row_norms(rows).sqrt() / exact - 1).abs().max()) < CLIP_MARGIN / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cancelling_unit_whose_gradient_is_formed_and_dropped_is_unsure(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, all_tokens = UnitGradients(torch.Size((40, 40)), 1), Segments(np.array([100]), torch.device("cpu"))
    left = torch.randn(100, 40, generator=generator).to(dtype)
    right = torch.randn(50, 40, generator=generator).to(dtype)
    left[50:] = left[:50]
    for opposite, expected in ((False, False), (True, True)):
        second = -right.roll(1, 1) * 0 - right * (1 - 2**-7) if opposite else torch.randn(right.shape).to(dtype)
        gradients.outers = [(all_tokens, (left, torch.cat([right, second.to(dtype)])))]
        squared, spread = gradients.squared_norms()
        assert gradients.paths == {"direct norm"}
        assert bool(unsure(squared, spread, torch.float32)) == expected


def test_gradients_in_half_precision_are_widened_before_they_are_measured() -> None:
    gradients = UnitGradients(torch.Size((300,)), 2)
    held = (1 + torch.rand(2, 300, generator=torch.Generator().manual_seed(0))).bfloat16()
    gradients.add_held(held)
    squared, _ = gradients.squared_norms()
    exact = held.double().square().sum(1)
    assert float((squared / exact - 1).abs().max()) < CLIP_MARGIN


@pytest.mark.parametrize("norm", [1e-12, 1e-20, 1e-30])
def test_a_clip_to_almost_nothing_is_no_shorter_than_what_it_clips(norm: float) -> None:
    """Squares of such values underflow float32."""
    made = Made(torch.full((2, 40), 1e-3), torch.full((2, 40), norm))
    rows = TokenRows.from_lists([[1, 1], [2, 2]])
    layout = ParameterLayout.of(made)
    split = (ClipBlock(parameters=layout.names, share=1.0),)
    for clip in (
        Clip(norm=norm / 1e3),
        Clip(norm=norm / 1e3, blocks=split),
        Clip(norm=1.0, scales={layout.names[0]: norm / 1e3}),
    ):
        found = clipped_sum(made, rows, np.array([0, 1]), clip, objective=Prescribed())
        assert float(found.total.double().norm()) <= 2 * clip.bound
        assert float(found.total.double().norm()) > 1.99 * clip.bound


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    norm=st.sampled_from([1e-4, 0.1, 3.0]),
    tied=st.booleans(),
    kind=st.sampled_from(["embeddings", "classifier", "lora"]),
    words=st.sampled_from([1, 2, VOCABULARY - 1]),
    order=st.sampled_from([1, 2]),
)
def test_whole_models_in_blocks_and_in_one(seed, norm, tied, kind, words, order) -> None:
    """Biases, normalisations, tables and adapters together, of texts that say a few words again and again."""
    torch.manual_seed(seed % 1000)
    rng = np.random.default_rng(seed)
    lists = [rng.integers(1, words + 1, n).tolist() for n in rng.integers(2, 30, 3)]
    rows = TokenRows.from_lists(lists, rng.integers(0, 5, 3))
    objective = SequenceClassification() if kind == "classifier" else CausalLanguageModel()
    model = MLP().eval() if kind == "classifier" else Tables(24, tied, None)
    if kind == "lora":
        model = Adapted(model)
    names = ParameterLayout.of(model).names
    each = tuple(ClipBlock(parameters=(name,), share=len(names) ** (-1 / order)) for name in names)
    for blocks in ((), each):
        clip = Clip(norm=norm, order=order, blocks=blocks)
        alone = np.zeros(3, int)
        total = clipped_sum(model, rows, alone, clip, objective=objective, method="reference").total
        totals = [total] if order == 1 else [total, fast_sum(model, rows, alone, clip, objective=objective).total]
        for total in totals:
            assert float(torch.linalg.vector_norm(total, order, dtype=torch.float64)) <= norm


class Adapted(torch.nn.Module):
    """Two thin matrices in place of one, beside a frozen model, as LoRA has them."""

    def __init__(self, frozen: torch.nn.Module) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = torch.nn.Linear(VOCABULARY, 2, bias=False)
        self.up = torch.nn.Linear(2, VOCABULARY, bias=False)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.frozen(input_ids)
        return logits + self.up(self.down(logits))


def test_no_product_adds_up_more_tokens_than_its_running_sum_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in the shapes: some libraries divide long sums by themselves, and would hide it in the numbers."""
    summed: list[int] = []
    formed: list[int] = []
    product, batched = outer_products.add_product, outer_products.batched_outer
    monkeypatch.setattr(outer_products, "add_product", lambda t, a, b: (summed.append(a.shape[1]), product(t, a, b)))
    monkeypatch.setattr(outer_products, "batched_outer", lambda a, b: (formed.append(a.shape[1]), batched(a, b))[1])
    left, right, two = (
        torch.ones(2000, 90),
        torch.ones(2000, 80),
        Segments(np.array([1000, 1000]), torch.device("cpu")),
    )
    target = torch.zeros(90, 80)
    outer_products.add_outer(target, left, right, torch.ones(2), two)
    assert torch.equal(target, torch.full((90, 80), 2000.0))
    assert sum(summed) == 2000
    assert summed == [256, 256, 256, 232 + 256, 256, 256, 232]  # what is left of one unit, and the next one's first
    gradients = UnitGradients(torch.Size((90, 80)), 2)
    gradients.outers.append((two, (left, right)))
    squared, _ = gradients.squared_norms()
    torch.testing.assert_close(squared, torch.full_like(squared, 1000.0**2 * 90 * 80))
    assert sum(formed) == 1000
    assert max(formed) <= 256
