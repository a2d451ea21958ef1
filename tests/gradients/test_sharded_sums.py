"""Sums of a model that no process holds whole: two processes give what one gives, unit by unit."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from fedsim.clip import Clip, ClipBlock
from fedsim.engine.exact import quantise, resolution_for
from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, ClippedSum, ParameterLayout, clipped_sum, clipped_units
from fedsim.gradients.sharded.blocks import blocks_of
from fedsim.gradients.sharded.passes import shared_out
from fedsim.rows import TokenRows, with_prompts
from tests.gradients.gradient_checks import MLP, assert_same, ragged
from tests.gradients.sharded_cases import (
    MODELS,
    amiss,
    broken_off,
    dying,
    formed_again,
    largest_tensor,
    loaded,
    made,
    summed,
)
from tests.gradients.sharded_group import Group

SAME_BITS = [name for name in MODELS if name != "t5"]
"""What several blocks leave of a tensor that all of them are given, as an encoder's output, FSDP adds up block by
block: by rounding that is not what one process does."""


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    two = Group(2)
    yield two
    two.close()


def rows_for(name: str, **shapes: int) -> tuple[TokenRows, np.ndarray]:
    rows, ids = ragged(0, **shapes)
    return (with_prompts(dataclasses.replace(rows, labels=None)), ids) if name == "t5" else (rows, ids)


def whole(answers: list[Any]) -> ClippedSum:
    """What the processes hold, put together; all of them know the same of units."""
    for answer in answers:
        assert not isinstance(answer, Exception), answer
    parts, told = zip(*answers, strict=True)
    places = [set(part.nonzero().flatten().tolist()) for part in parts]
    assert not set.intersection(*places), "a value is held twice"
    for name in ("norms", "losses", "finite"):
        assert torch.allclose(getattr(told[0], name), getattr(told[-1], name), rtol=0, atol=0, equal_nan=True)
    return ClippedSum(total=sum(parts), norms=told[0].norms, losses=told[0].losses, finite=told[0].finite)


def reference(name: str, rows: TokenRows, ids: np.ndarray, clip: Clip, **options: Any) -> ClippedSum:
    model, objective = made(name)
    return clipped_sum(model, rows, ids, clip, objective=objective, method="reference", **options)


def median_clip(name: str, rows: TokenRows, ids: np.ndarray) -> Clip:
    """One that bites for half of the units."""
    norms = reference(name, rows, ids, Clip(norm=1e6)).norms
    return Clip(norm=float(norms[norms > 0].median()))


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_give_the_sum_of_one(group: Group, name: str) -> None:
    rows, ids = rows_for(name)
    clip = median_clip(name, rows, ids)
    found = whole(group.run(summed, name, rows, ids, clip))
    assert_same(found, reference(name, rows, ids, clip), 2e-2 if name == "lora" else 1e-5)  # of a base in bfloat16


@pytest.mark.parametrize("max_tokens", [8, 24, 60])
@pytest.mark.parametrize("units", [1, 2, 7])
def test_any_split_into_micro_batches_gives_the_same(group: Group, max_tokens: int, units: int) -> None:
    """Units larger than a micro-batch, unlike numbers of passes, and a process that has none at all."""
    rows, ids = ragged(3, units=units)
    clip = Clip(norm=0.5)
    found = whole(group.run(partial(summed, max_tokens=max_tokens), "gpt2, tied", rows, ids, clip))
    assert_same(found, reference("gpt2, tied", rows, ids, clip), 1e-5)


def test_each_example_may_be_a_unit_and_some_may_have_no_rows(group: Group) -> None:
    rows, _ = ragged(1)
    ids = 2 * np.arange(len(rows))
    clip = Clip(norm=0.3)
    found = whole(group.run(summed, "llama", rows, ids, clip))
    assert_same(found, reference("llama", rows, ids, clip), 1e-5)
    assert not found.norms[1::2].any()


def test_blocks_and_scales_are_those_of_the_clip(group: Group) -> None:
    rows, ids = ragged(2)
    names = ParameterLayout.of(made("llama")[0]).names
    half = len(names) // 2
    blocks = (ClipBlock(parameters=names[:half], share=0.6), ClipBlock(parameters=names[half:], share=0.8))
    clip = Clip(norm=0.4, blocks=blocks, scales={name: 0.5 + place % 3 for place, name in enumerate(names)})
    assert_same(whole(group.run(summed, "llama", rows, ids, clip)), reference("llama", rows, ids, clip), 1e-5)


@pytest.mark.parametrize("name", ["gpt2, tied", "gpt2, untied"])
def test_a_last_layer_is_there_when_it_is_asked_for_more_after_the_pass(group: Group, name: str) -> None:
    rows, ids = ragged(2, longest=6, most=1)
    clip = Clip(norm=0.4)
    assert_same(whole(group.run(formed_again, name, rows, ids, clip)), reference(name, rows, ids, clip), 1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(9,), (1, 1, 7), (2, 2), (1, 1, 1), (1, 30, 4, 4, 2)])
def test_processes_have_equally_many_micro_batches_where_units_suffice(ranks: int, sizes: tuple[int, ...]) -> None:
    units = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    shared = shared_out(units, ranks)
    assert np.array_equal(np.concatenate(shared), np.arange(sum(sizes)))
    assert len(shared) % ranks == 0 or max(map(len, shared)) == 1
    assert all(len(part) for part in shared)


def test_l1_clips_take_whole_gradients(group: Group) -> None:
    rows, ids = ragged(2)
    clip = Clip(norm=3.0, order=1)
    assert_same(whole(group.run(summed, "llama", rows, ids, clip)), reference("llama", rows, ids, clip), 1e-5)


def test_a_unit_that_is_not_finite_adds_nothing_and_the_shards_hold_what_was_loaded(group: Group) -> None:
    model, objective = made("llama")
    layout = ParameterLayout.of(model)
    before = layout.flatten(model)
    rows, ids = ragged(4)
    rows.tokens[rows.tokens == 60] = 59
    first = int(np.flatnonzero((ids == 2) & (rows.lengths > 2))[0])
    rows.tokens[rows.offsets[first]] = 60
    changed = before + torch.randn(len(before), generator=torch.Generator().manual_seed(1)) / 50
    layout.views(changed)["model.embed_tokens.weight"][60] = torch.inf
    layout.load(model, changed)
    group.run(loaded, "llama", changed)
    try:
        for method in ("fast", "reference"):
            answers = group.run(partial(summed, method=method), "llama", rows, ids, Clip(norm=0.5))
            expected = clipped_sum(
                model, rows, ids, Clip(norm=0.5), objective=objective, method="reference", max_tokens=1024
            )
            assert not expected.finite[2]
            assert_same(whole(answers), expected, 1e-5)
    finally:
        group.run(loaded, "llama", before)


@pytest.mark.parametrize("name", SAME_BITS)
def test_exact_sums_are_the_same_bits(group: Group, name: str) -> None:
    rows, ids = rows_for(name)
    assert_same_bits(group, name, rows, ids)


def test_three_processes_give_the_same_bits_until_one_dies_in_a_pass_which_fails_the_others() -> None:
    three = Group(3)
    try:
        assert_same_bits(three, "llama", *ragged(5))
        first, second, third = three.run(dying, 1, "in a pass", "llama", *ragged(0), Clip(norm=0.5))
    finally:
        three.close()
    assert isinstance(second, EOFError)
    for told in (first, third):
        assert "Failure: a process of the group" in str(told)


def assert_same_bits(group: Group, name: str, rows: TokenRows, ids: np.ndarray) -> None:
    clip = median_clip(name, rows, ids)
    resolution = resolution_for(clip, 1000)
    model, objective = made(name)
    sizes = ParameterLayout.of(model).sizes
    units = list(clipped_units(model, rows, ids, clip, objective=objective, max_tokens=24))
    answers = group.run(partial(summed, max_tokens=24), name, rows, ids, clip, resolution)
    found = whole(answers)
    assert found.total.dtype == torch.int64
    assert torch.equal(found.total, sum(quantise(update, clip, sizes, resolution) for _, update, _, _ in units))
    assert found.norms.tolist() == pytest.approx([norm for _, _, norm, _ in units], rel=1e-6)


def test_no_process_holds_the_sum_nor_a_model(group: Group) -> None:
    """Of all that is made while a sum is formed no tensor is larger than a quarter of the 16 blocks."""
    rows, ids = ragged(6, longest=5, most=1)
    size = ParameterLayout.of(made("deep")[0]).size
    for answer in group.run(largest_tensor, rows, ids, Clip(norm=0.5), 12):
        assert not isinstance(answer, Exception), answer
        largest, part = answer
        assert size / 2 <= part <= size / 2 + 40
        assert largest < size / 4


@pytest.mark.parametrize("how", ["a process left out", "divided by their number"])
def test_a_sum_amiss_is_seen(group: Group, how: str) -> None:
    rows, ids = ragged(0)
    clip = Clip(norm=0.5)
    right = whole(group.run(summed, "llama", rows, ids, clip))
    assert_same(right, reference("llama", rows, ids, clip), 1e-5)
    found = whole(group.run(amiss, how, "llama", rows, ids, clip))
    with pytest.raises(AssertionError):
        assert_same(found, reference("llama", rows, ids, clip), 1e-5)


def test_a_process_that_dies_in_a_reduction_fails_the_others() -> None:
    rows, ids = ragged(0)
    two = Group(2)
    try:
        first, second = two.run(dying, 1, "in a reduction", "llama", rows, ids, Clip(norm=0.5))
    finally:
        two.close()
    assert isinstance(second, EOFError)
    assert "Failure: a process of the group" in str(first)


@pytest.mark.parametrize(
    ("how", "next_one"),
    [
        ("there", "OutOfMemoryError: another"),
        ("absent", "Failure: PyTorch did not put the model back after OutOfMemoryError"),
        ("failing", "Failure: PyTorch did not put the model back after OutOfMemoryError: cannot be put back"),
    ],
)
def test_what_broke_a_pass_off_is_what_is_told(group: Group, how: str, next_one: str) -> None:
    for first, second in group.run(broken_off, "llama", how):
        assert first == "OutOfMemoryError: no memory is left"
        assert second.startswith(next_one)


class Shared(torch.nn.Module):
    """Two blocks, or one that is called twice."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(61, 8)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2 if tied else 1)])
        self.out = torch.nn.Linear(8, 61)
        if tied:
            self.blocks[1].weight = self.blocks[0].weight
        self.times = 1 if tied else 2

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(input_ids)
        for block in list(self.blocks) * self.times:
            hidden = block(hidden)
        return self.out(hidden)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (MLP(), "list of modules"),
        (Shared(tied=True), "share no parameters"),
        (Shared(tied=False), "called 2 times"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused_in_a_sentence(model: torch.nn.Module, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        blocks_of(model, CausalLanguageModel())


def test_quantised_weights_are_refused() -> None:
    model, objective = made("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(InvalidInput, match="quantised"):
        blocks_of(model, objective)


def test_a_pytorch_that_cannot_recover_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "reset_iter_state")
    with pytest.raises(InvalidInput, match=r"torch is .*2\.13 or newer.*--engine\.devices-per-worker at 1"):
        blocks_of(*made("llama"))
