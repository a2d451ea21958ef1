"""Rows laid end to end: the same sums as unit after unit, and a model whose rows see each other is refused."""

import itertools
import logging
import warnings
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from gradient_checks import TOLERANCE, VOCABULARY, Tables, assert_same, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import LEAKS, Leaky, adapted, gemma2, gemma3, gpt2, llama, mistral, of_the_block_before

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum, units
from fedsim.gradients.fast import FastSum
from fedsim.gradients.rows import attention
from fedsim.gradients.rows import segments as rows_segments
from fedsim.gradients.rows.attention import NAME, _varlen_right, attention_configs, packed_attention
from fedsim.gradients.rows.packed import PackedRows, packed_batch
from fedsim.gradients.rows.segments import Segments, joined
from fedsim.rows import IGNORED_LABEL, TokenRows

OBJECTIVE = CausalLanguageModel()
CPU = torch.device("cpu")


PACKED = {
    "gpt2": gpt2, "llama": llama, "mistral": mistral, "gemma2": gemma2, "gemma3": gemma3, "lora": adapted,
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("whole", [False, True])
def test_packed_sums_are_those_of_the_reference(
    name: str, dtype: torch.dtype, whole: bool, passes: list[FastSum], monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        monkeypatch.setattr(units, "SHORT_ROW", 0)
    torch.manual_seed(0)
    model = PACKED[name]().to(dtype)
    tolerance = 1e-5 if name.startswith("gemma") else TOLERANCE[dtype]  # which compute some things in float32
    for seed, most, tokens in ((0, 3, 120), (1, 9, 120), (2, 3, 10**6)):
        rows, ids = ragged(seed, units=12, most=most, longest=15)
        norms = clipped_sum(model, rows, ids, Clip(norm=1e6), objective=OBJECTIVE, method="reference").norms
        clip = Clip(norm=float(norms[norms > 0].median()))
        expected = clipped_sum(model, rows, ids, clip, objective=OBJECTIVE, method="reference")
        passes.clear()
        found = clipped_sum(model, rows, ids, clip, objective=OBJECTIVE, max_tokens=tokens)
        assert_same(found, expected, tolerance)
        assert all(asked.packed and asked.units.whole == whole for asked in passes[-1:])
        assert passes


def test_short_rows_are_tried_without_their_last_tokens_and_long_ones_with(passes: list[FastSum]) -> None:
    """Each once: which of the two a cohort's rows are may change from round to round."""
    model, tried = llama(), []
    for longest in (300, 15, 300, 15):
        rows, ids = ragged(units=9, longest=longest)
        passes.clear()
        clipped_sum(model, rows, ids, Clip(norm=1.0), objective=OBJECTIVE, max_tokens=4096)
        assert {asked.units.whole for asked in passes} == {longest == 300}
        assert passes[-1].packed
        tried.append(len(passes))
    assert tried == [2, 2, 1, 1]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[FastSum]:
    """Whose passes ran, one for each."""
    ran: list[FastSum] = []
    passed = FastSum.passed
    monkeypatch.setattr(FastSum, "passed", lambda self, units: (ran.append(self), passed(self, units))[1])
    return ran


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_checkpointing_and_mixed_precision_pack(autocast: torch.dtype | None, passes: list[FastSum]) -> None:
    model, (rows, ids) = llama(), ragged(units=9, longest=15)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    arguments = {"objective": OBJECTIVE, "autocast": autocast}
    expected = clipped_sum(model, rows, ids, Clip(norm=1.0), method="reference", **arguments)
    found = clipped_sum(model, rows, ids, Clip(norm=1.0), max_tokens=150, **arguments)
    assert passes[-1].packed
    assert_same(found, expected, 1e-5 if autocast is None else 2e-2)


@pytest.mark.usefixtures("any_code")
@pytest.mark.parametrize("leak", LEAKS)
def test_a_model_that_leaks_to_the_next_row_is_not_packed(leak: str, passes: list[FastSum], caplog) -> None:
    """Though it is right for padded rows, whose tokens are their own."""
    caplog.set_level(logging.INFO)
    model, (rows, ids) = Leaky(LEAKS[leak]), ragged(units=30, longest=15, most=3)
    expected = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")
    found = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, max_tokens=200)
    assert "rows are padded, for packed ones fail" in caplog.text
    assert not passes[-1].packed
    assert_same(found, expected, 1e-5)


@pytest.mark.usefixtures("any_code")
def test_the_same_without_a_leak_is_packed(passes: list[FastSum]) -> None:
    clipped_sum(Leaky(torch.zeros_like), *ragged(units=9), Clip(norm=0.5), objective=OBJECTIVE, max_tokens=200)
    assert passes[-1].packed


@pytest.mark.usefixtures("any_code")
def test_micro_batches_longer_than_the_one_tried_are_tried(passes: list[FastSum]) -> None:
    """Of 64 tokens none crosses a block."""
    model, (rows, ids) = Leaky(of_the_block_before(64)), ragged(units=30, longest=15, most=3)
    clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, max_tokens=64)
    assert passes[-1].packed
    found = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, max_tokens=256)
    assert not passes[-1].packed
    assert_same(found, clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference"), 1e-5)


def recurrent() -> torch.nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=VOCABULARY, pad_token_id=0)
    ).eval()


def own_attention() -> torch.nn.Module:
    """Looks nothing up in the registry."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256, window_size=4,
        attention_types=[[["global", "local"], 1]], resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize("make", [recurrent, own_attention, lambda: Tables(8, True, None).eval()])
def test_models_that_cannot_keep_rows_apart_stay_padded(make: Callable[[], torch.nn.Module], passes) -> None:
    model, (rows, ids) = make(), ragged(units=12, longest=15)
    expected = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")
    assert_same(clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, max_tokens=150), expected, 1e-5)
    assert not any(asked.packed for asked in passes[-1:])


@pytest.mark.parametrize("arguments", [{"position_bias": torch.zeros(1)}, {"dropout": 0.1}, {"is_causal": False}])
def test_an_attention_that_is_asked_for_more_refuses(arguments: dict[str, object], monkeypatch) -> None:
    from fedsim.gradients.rows import attention

    model, rows = llama(), PackedRows(np.array([3, 4]), CPU)
    layer, x = model.model.layers[0].self_attn, torch.randn(1, 4, 7, 4)
    with packed_attention(attention_configs(model), rows):
        assert attention.attention(layer, x, x[:, :2], x[:, :2], None, scaling=0.5)[0].shape == (1, 7, 4, 4)
        with pytest.raises(attention.NotPackableError, match="asks its attention for"):
            attention.attention(layer, x, x[:, :2], x[:, :2], None, **arguments)


def test_the_model_is_as_it_was_after_a_packed_pass() -> None:
    model = llama()
    before = model.config._attn_implementation
    assert before != NAME
    with packed_attention(attention_configs(model), PackedRows(np.array([3, 4]), CPU)):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == before
    clipped_sum(model, *ragged(), Clip(norm=1.0), objective=OBJECTIVE)
    assert model.config._attn_implementation == before
    assert model.training is False


def test_no_mask_of_all_tokens_by_all_tokens_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.gradients.rows import attention

    seen = []
    mask = attention.mask_of_rows
    monkeypatch.setattr(attention, "mask_of_rows", lambda **a: (seen.append(mask(**a)), seen[-1])[1])
    model = mistral()
    clipped_sum(model, *ragged(units=20), Clip(norm=1.0), objective=OBJECTIVE, max_tokens=100)
    assert {None if x is None else x.shape[-1] <= 14 for x in seen} == {True}


def test_sinks_compete_with_scores() -> None:
    from fedsim.gradients.rows import attention

    model, rows = llama(), PackedRows(np.array([3, 4]), CPU)
    layer, x, sinks = model.model.layers[0].self_attn, torch.randn(1, 4, 7, 4), torch.randn(4)
    with packed_attention(attention_configs(model), rows):
        found, _ = attention.attention(layer, x, x[:, :2], x[:, :2], None, scaling=0.5, s_aux=sinks)
    q, k = x[0, :, 3:], x[0, :2, 3:].repeat_interleave(2, 0)
    scores = torch.exp(0.5 * q @ k.mT).tril()
    weights = scores / (scores.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(found[0, 3:], (weights @ k).transpose(0, 1))


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=40)
@given(lengths=LENGTHS)
def test_places_lead_there_and_back(lengths: list[int]) -> None:
    rows = PackedRows(np.array(lengths), CPU)
    there, back = rows.places
    assert torch.equal(there[back], torch.arange(rows.tokens))
    assert sum(number * length for number, length in rows.buckets) == len(there)
    assert rows.position_ids[0].tolist() == [place for length in lengths for place in range(length)]
    whose = np.repeat(np.arange(len(lengths)), lengths)
    start = 0
    for number, length in rows.buckets:
        for row in there[start : start + number * length].view(number, length).numpy():
            assert len(set(whose[row])) == 1
        start += number * length


@settings(max_examples=60)
@given(lengths=LENGTHS, most=st.integers(1, 30), width=st.integers(1, 5), times=st.integers(1, 3))
def test_segments_bucket_and_cut_every_vector_once(lengths: list[int], most: int, width: int, times: int) -> None:
    segments = Segments(np.sort(lengths), CPU).times(times)
    x = torch.randn(segments.total + 3, width, dtype=torch.float64)  # the last three are nobody's
    expected = [x[a:b] for a, b in zip(segments.offsets[:-1], segments.offsets[1:], strict=True)]
    sums = torch.stack([part.sum(0) for part in expected])
    with patch.object(rows_segments, "BAG_LENGTH", most):
        torch.testing.assert_close(segments.sums(x), sums)
    assert sum(bucket.copied for bucket in segments.buckets) == segments.copied
    for zero in (False, True):
        for bucket, filled in zip(segments.buckets, segments.filled(x, zeroed=zero), strict=True):
            assert torch.equal(filled, bucket.of(x, zeroed=zero))
    zeroed = torch.cat([bucket.of(x, zeroed=True).sum(1) for bucket in segments.buckets])
    torch.testing.assert_close(zeroed, sums)
    for bucket in segments.buckets:
        for filled, own in zip(bucket.of(x), expected[bucket.units], strict=True):
            assert torch.equal(filled[: len(own)], own)
            assert torch.equal(filled[len(own) :], own[-1:].expand(bucket.length - len(own), -1))
    pieces = segments.pieces(most)
    assert torch.equal(
        torch.cat([torch.arange(segments.total)[piece] for piece in pieces]), torch.arange(segments.total)
    )
    owner = segments.owner
    assert all(int(torch.bincount(owner[piece]).max()) <= most for piece in pieces)
    whole, (both,) = joined([(segments, (x,)), (segments, (2 * x,))])
    torch.testing.assert_close(whole.sums(both), 3 * sums)


def test_a_row_predicts_its_own_tokens_alone() -> None:
    rows = TokenRows.from_lists([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    batch, packed = packed_batch(rows, np.array([2, 0]), CPU)
    assert batch.input_ids.tolist() == [[6, 7, 8, 9, 1, 2, 3]]
    assert batch.labels.tolist() == [[7, 8, 9, IGNORED_LABEL, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("lengths", [[1], [3, 5], [7] * 40, [200, 1]])
def test_what_fills_a_micro_batch_is_read_at_positions_that_its_rows_have(
    lengths: list[int], device: torch.device
) -> None:
    """A model need not have more, and on a GPU a position that it has not ends all computing."""
    rows = TokenRows.from_lists([[5] * length for length in lengths])
    batch, packed = packed_batch(rows, np.arange(len(rows)), device)
    assert batch.position_ids is not None
    assert int(batch.position_ids.max()) == max(lengths) - 1
    assert packed.lengths[: len(rows)].tolist() == lengths
    assert packed.tokens == batch.input_ids.shape[1] == 128 * -(-sum(lengths) // 128)
    assert (batch.labels[0, sum(lengths) - 1 :] == IGNORED_LABEL).all()


@pytest.mark.parametrize("changed", ["a class", "a hook", "a forward pass"])
def test_code_of_somebodys_own_is_not_packed(changed: str, passes: list[FastSum]) -> None:
    """Whatever a trial would see of it."""
    model = Leaky(torch.zeros_like) if changed == "a class" else llama()
    if changed == "a hook":
        model.model.norm.register_forward_hook(lambda module, inputs, output: output)
    if changed == "a forward pass":
        model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)
    clipped_sum(model, *ragged(units=9), Clip(norm=0.5), objective=OBJECTIVE, max_tokens=200)
    assert not any(asked.packed for asked in passes)


def test_a_device_on_which_nothing_can_be_drawn_is_left_to_attention_row_by_row() -> None:
    """Whatever fails while torch's own attention is tried tells that it is not to be used."""
    assert not _varlen_right(torch.device("meta"), torch.bfloat16, 8, 2)


def test_attention_of_rows_of_various_lengths_is_tried_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a reader of a run's output would take for a fault, and which where warnings are errors ends the trial."""

    def row_by_row(packed: list[torch.Tensor], boundaries: torch.Tensor, longest: int, scale: float) -> torch.Tensor:
        parts = []
        for start, end in itertools.pairwise(boundaries.tolist()):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in packed)
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            part = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention, "_varlen", row_by_row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention._varlen_right.__wrapped__(torch.device("cpu"), torch.bfloat16, 8, 2)
    monkeypatch.setattr(attention, "_varlen", lambda *given: 1.1 * row_by_row(*given))
    assert not attention._varlen_right.__wrapped__(torch.device("cpu"), torch.bfloat16, 8, 2)
