"""A trained head of a large vocabulary: its logits' gradient is formed twice, and the sum is what it was when kept."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compiled_models import gpt2 as compilable
from compiled_models import passes_of, summed
from gradient_checks import TOLERANCE, assert_same, check, fast_sum, ragged
from head_models import MET, MODELS, WIDTH, WORDS, Language
from packed_models import gemma3, gpt2
from test_gradient_device import blocks_of
from test_gradient_device import check as check_on_device
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.clip import Clip
from fedsim.errors import Failure
from fedsim.gradients import CLIP_MARGIN, CausalLanguageModel, clipped_sum, head, layer_paths
from fedsim.gradients.compiled import graphs
from fedsim.gradients.fast import FastSum
from fedsim.gradients.per_unit import unit_gradients
from fedsim.gradients.per_unit.formed_again import FormedAgain
from fedsim.gradients.per_unit.logits import HeadInputs, Logits
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments
from fedsim.gradients.units import make_units
from fedsim.rows import TokenRows

CPU, OBJECTIVE = torch.device("cpu"), CausalLanguageModel()
POSITIONS = 16
"""Formed together, where no unit has more."""


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits' gradient is small enough to be kept."""
    for limits in (head.KEPT_ELEMENTS, head.GROUP_ELEMENTS):
        for kind in limits:
            monkeypatch.setitem(limits, kind, 0)
    monkeypatch.setattr(head, "chunk_positions", lambda words, device: POSITIONS)


@pytest.fixture
def terms(nothing_kept: None, monkeypatch: pytest.MonkeyPatch) -> list[FormedAgain]:
    """Those that are formed again instead."""
    made: list[FormedAgain] = []
    start = FormedAgain.__init__
    monkeypatch.setattr(FormedAgain, "__init__", lambda self, *a: (made.append(self), start(self, *a))[1])
    return made


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[FormedAgain]:
    """Those that had to be kept after all."""
    whole: list[FormedAgain] = []
    keep = FormedAgain.kept
    monkeypatch.setattr(FormedAgain, "kept", lambda self: (whole.append(self), keep(self))[1])
    return whole


def several_of_several(terms: list[FormedAgain]) -> bool:
    """Whether units were formed together, beside others that were not, and some had more than fits."""
    together = any(units.stop - units.start > 1 for term in terms for units in term.groups)
    return together and any(len(term.groups) > 1 and term.largest > POSITIONS for term in terms)


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_the_references(name: str, terms: list[FormedAgain], kept: list[FormedAgain]) -> None:
    """Of units of one row and of several, held and not, of like lengths and of unlike ones."""
    model = MODELS[name]()
    check(model, units=9)
    check(model, units=9, most=2, max_tokens=60)
    assert several_of_several(terms)
    assert not kept


@pytest.mark.parametrize("name", MET)
def test_a_weight_with_yet_another_use(name: str, terms: list[FormedAgain], kept: list[FormedAgain]) -> None:
    check(MET[name](), units=9, most=2)
    assert terms == kept


def one_parameter(segments: Segments) -> tuple[UnitGradients, UnitGradients, torch.Tensor, torch.Tensor]:
    """Gradients of a head whose factors are kept and the same formed again; also words, and rows for them."""
    generator = torch.Generator().manual_seed(0)
    hidden, rows = (torch.randn(segments.total, WIDTH, generator=generator).double() for _ in range(2))
    weight = torch.randn(WORDS, WIDTH, generator=generator).double()
    words, labels = (torch.randint(0, WORDS, (segments.total,), generator=generator) for _ in range(2))
    inputs = HeadInputs(hidden, weight, None, labels, POSITIONS)
    left = Logits(inputs).gradient(slice(0, segments.total))
    whole, again = (UnitGradients(weight.shape, len(segments)) for _ in range(2))
    whole.outers.append((segments, (left, hidden)))
    term = FormedAgain(segments, inputs, hidden, words, POSITIONS)
    for units in term.groups:
        term.measure(units, left[term.places(units)])
    again.add_formed_again(term)
    return whole, again, words, rows


@pytest.mark.parametrize("looked_up", [False, True])
def test_units_of_like_lengths_are_filled_up_without_a_trace(looked_up: bool) -> None:
    """Norms and sums of one parameter, beside those of factors that are kept; a unit's last vector counts once."""
    segments = Segments(np.array([2, 4, 5, 5, 6, 7, 9]), CPU)
    whole, again, words, rows = one_parameter(segments)
    left_out = torch.arange(len(segments)) % 3 == 1
    found = []
    for gradients in (whole, again):
        if looked_up:
            gradients.add_lookup(words, rows, segments)
        squared, spread = gradients.squared_norms()
        gradients.zero(left_out)
        total = torch.zeros(WORDS, WIDTH, dtype=torch.float64)
        gradients.add_weighted(total, torch.linspace(0.1, 1, len(segments), dtype=torch.float64))
        found.append((squared, spread, total))
    assert again.again is not None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_kernel_is_not_asked_for_the_norm_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_gradients, "usable", lambda *tensors: True)
    whole, again, _, _ = one_parameter(Segments(np.array([4, 5]), CPU))
    assert whole.gram_term() is not None
    again.outers += whole.outers
    assert again.gram_term() is None
    assert torch.allclose(again.squared_norms()[0], 4 * whole.squared_norms()[0])


def test_scales_and_blocks(terms: list[FormedAgain]) -> None:
    model = Language(True, True).double()
    clip, (rows, ids) = blocks_of(model, 0.05), ragged(units=9, most=2)
    expected = clipped_sum(model, rows, ids, clip, objective=OBJECTIVE, method="reference")
    assert (expected.norms > clip.norm).any()
    assert_same(fast_sum(model, rows, ids, clip, objective=OBJECTIVE), expected, TOLERANCE[torch.float64])
    assert terms


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_packed_rows(name: str, terms: list[FormedAgain], monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[bool] = []
    passed = FastSum.passed
    monkeypatch.setattr(FastSum, "passed", lambda self, units: (packed.append(self.packed), passed(self, units))[1])
    torch.manual_seed(0)
    model, (rows, ids) = {"gpt2": gpt2, "gemma3": gemma3}[name](), ragged(units=9, most=2, longest=5)
    expected = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")
    assert_same(clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE), expected, 1e-5)
    assert packed[-1]
    assert terms
    assert any("formed again" in path for path in layer_paths(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(reentrant: bool, terms: list[FormedAgain]) -> None:
    torch.manual_seed(0)
    model, (rows, ids) = gpt2(), ragged(units=9, most=2, longest=5)
    expected = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(fast_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE), expected, 1e-5)
    assert terms


def test_a_compiled_pass(terms: list[FormedAgain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, (rows, ids) = compilable().eval(), ragged(units=9, most=2, longest=5)
    rows.tokens[:] %= 60
    expected = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")
    assert_same(summed(model, rows, ids, Clip(norm=0.5), compiled=True), expected, 1e-5)
    assert passes_of(model)[-1] is not None
    assert terms


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_on_another_device(
    autocast: torch.dtype | None, terms: list[FormedAgain], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    tolerance = 1e-5 if autocast is None else 2e-2
    model = Language(True, True)
    check_on_device(
        model, *ragged(units=9, most=2), blocks_of(model), device, caplog, tolerance=tolerance, autocast=autocast
    )
    assert {term.squares.device.type for term in terms} == {"cpu", device.type}


class Formed:
    """Each logits' gradient that was formed, of V words, and where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[slice, torch.Tensor]] = []
        form = Logits.gradient

        def forming(logits: Logits, places: slice, *rest: Any) -> torch.Tensor:
            gradient = form(logits, places, *rest)
            self.found.append((places, gradient[:, : logits.width].clone()))
            return gradient

        monkeypatch.setattr(Logits, "gradient", forming)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)]
)
def test_it_is_formed_again_bit_by_bit(
    bias: bool, dtype: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed, (rows, ids) = Formed(monkeypatch), ragged(units=30, most=2, longest=12)
    fast_sum(Language(True, bias).to(dtype), rows, ids, Clip(norm=0.1), objective=OBJECTIVE, autocast=autocast)
    half = len(formed.found) // 2
    assert half > 5
    assert len(formed.found) == 2 * half
    for (places, first), (others, second) in zip(formed.found[:half], formed.found[half:], strict=True):
        assert places == others
        assert torch.equal(first, second)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_copies_of_a_unit_reach_no_further_than_so_many_clip_norms(tied: bool, autocast: torch.dtype | None) -> None:
    """The sum's norm taken in float64. Factors are next above a number of few bits, so that rounding hides nothing."""
    copies, tokens, model = 6, np.random.default_rng(0).integers(1, WORDS, 12).tolist(), Language(tied, False)
    rows, ids = TokenRows.from_lists([tokens] * copies), np.arange(copies)
    norm = float(fast_sum(model, rows, ids, Clip(norm=1e9), objective=OBJECTIVE, autocast=autocast).norms.max())
    clip = Clip(norm=0.75 * (1 + 1e-7) * norm * (1 + CLIP_MARGIN))
    found = fast_sum(model, rows, ids, clip, objective=OBJECTIVE, autocast=autocast)
    assert 1 - 2 * CLIP_MARGIN < float(found.total.double().norm()) / (copies * clip.norm) <= 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("bias", [False, True])
def test_a_unit_that_is_not_finite_adds_exactly_zero(value: float, bias: bool, terms: list[FormedAgain]) -> None:
    rows = TokenRows.from_lists([[1, 2, 3], [4, 299, 5], [6, 7, 8, 9], [299, 299, 1]])
    model, clip = Language(False, bias), Clip(norm=1e-2)
    with torch.no_grad():
        model.token.weight[299] = value
    found = fast_sum(model, rows, np.arange(4), clip, objective=OBJECTIVE)
    assert len(terms[0].groups) == 1
    assert found.finite.tolist() == [True, False, True, False]
    others = np.array([0, 2])
    expected = fast_sum(model, rows.take(others), np.arange(2), clip, objective=OBJECTIVE)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        model.head.weight[:] = value
    assert not fast_sum(model, rows, np.arange(4), clip, objective=OBJECTIVE).total.any()


class MostOfVocabulary(TorchDispatchMode):
    """Within it, how many values the largest tensor has whose last axis is the vocabulary."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (WORDS,):
                self.number = max(self.number, made.numel())
        return result


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_exist_for_a_few_units_at_a_time(
    tied: bool, autocast: torch.dtype | None, terms: list[FormedAgain]
) -> None:
    rows, ids = ragged(units=60, most=2, longest=8)
    with MostOfVocabulary() as most:
        fast_sum(Language(tied, False), rows, ids, Clip(norm=0.1), objective=OBJECTIVE, autocast=autocast)
    assert len(terms) == 1
    assert 0 < most.number <= max(WIDTH, POSITIONS, terms[0].largest) * WORDS < terms[0].segments.total * WORDS / 8


def test_a_small_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    formed, (rows, ids) = Formed(monkeypatch), ragged(units=9, most=2, longest=6)
    tokens = int(make_units(rows, ids, OBJECTIVE, "examples", None).counts.sum() * rows.lengths.max())
    for limit, times in ((tokens * WORDS, 1), (tokens * WORDS - 1, 2)):
        formed.found.clear()
        monkeypatch.setitem(head.KEPT_ELEMENTS, "cpu", limit)
        fast_sum(Language(True, False), rows, ids, Clip(norm=0.1), objective=OBJECTIVE)
        assert sum(places.stop - places.start for places, _ in formed.found) == times * tokens


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("what", ["weight", "bias", "hidden"])
def test_what_is_written_to_between_norm_and_sum_ends_the_call(what: str) -> None:
    model, (rows, ids) = Language(True, True), ragged(units=9, most=2, longest=6)
    units = make_units(rows, ids, OBJECTIVE, "examples", None)
    asked = FastSum(model, rows, units, OBJECTIVE, Clip(norm=0.1), 10**6, None)
    pass_ = asked.passed(np.flatnonzero(units.counts))
    with torch.no_grad():
        if what == "hidden":
            pass_.gradients.matrices["token.weight"].again._inputs.hidden.mul_(2)
        else:
            getattr(model.head, what).mul_(2)
    with pytest.raises(Failure, match="written to while"):
        asked._add(pass_)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_kept", "no_collector")
def test_what_it_is_formed_of_is_gone_after_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its last name, not when the collector comes by; the graph that left hidden states is gone before."""
    left: list[weakref.ref[object]] = []
    start = FormedAgain.__init__

    def watching(term: FormedAgain, segments: Any, inputs: Any, right: torch.Tensor, *rest: Any) -> None:
        assert not [ref() for ref in left if ref() is not None]
        assert not inputs.hidden.requires_grad
        start(term, segments, inputs, right, *rest)
        left.extend(map(weakref.ref, (term, inputs, inputs.hidden, right)))

    monkeypatch.setattr(FormedAgain, "__init__", watching)
    rows, ids = ragged(units=12, most=2, longest=6)
    fast_sum(Language(True, False), rows, ids, Clip(norm=0.1), objective=OBJECTIVE, max_tokens=40)
    assert len(left) > 8
    assert not [ref() for ref in left if ref() is not None]
