"""Rows laid end to end: the same sums as unit after unit, and a model whose rows see each other is refused."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradient_checks import TOLERANCE, VOCABULARY, Tables, assert_same, ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum
from fedsim.gradients.fast import FastSum
from fedsim.gradients.rows.attention import NAME, attention_configs, packed_attention
from fedsim.gradients.rows.packed import PackedRows, packed_batch
from fedsim.gradients.rows.segments import Segments, joined
from fedsim.rows import IGNORED_LABEL, TokenRows

OBJECTIVE = CausalLanguageModel()
CPU = torch.device("cpu")


def llama(**settings: object) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.3, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mistral() -> torch.nn.Module:
    """Each token sees five."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def gemma2() -> torch.nn.Module:
    """Capped scores and logits, windows in every second layer, tables that scale."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=VOCABULARY, sliding_window=5, attn_logit_softcapping=0.5,
        final_logit_softcapping=3.0, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def gemma3() -> torch.nn.Module:
    """Normalises queries and keys when heads come before tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=VOCABULARY, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=1, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def adapted() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


PACKED = {
    "gpt2": gpt2, "llama": llama, "mistral": mistral, "gemma2": gemma2, "gemma3": gemma3, "lora": adapted,
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_sums_are_those_of_the_reference(name: str, dtype: torch.dtype, passes: list[FastSum]) -> None:
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
        assert all(asked.packed for asked in passes[-1:])
        assert passes


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


class Leaky(torch.nn.Module):
    """A decoder between whose layers something moves from token to token, whatever the rows."""

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.move = gpt2(), move
        self.config = self.inner.config
        self.inner.transformer.h[0].register_forward_hook(lambda _, inputs, output: output + self.move(output))
        self.eval()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        return self.inner(input_ids, **arguments).logits


def fading(x: torch.Tensor) -> torch.Tensor:
    """A state that is left to a hundredth by every token."""
    state, found = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        found.append(state)
        state = 0.01 * (state + x[:, t])
    return torch.stack(found, 1)


def earlier(by: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.nn.functional.pad(x, (0, 0, by, 0))[:, : x.shape[1]]


def of_the_block_before(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What each token of a block of so many sees is the last of the one before: nothing in short micro-batches."""

    def move(x: torch.Tensor) -> torch.Tensor:
        block = torch.arange(x.shape[1]) // size
        return torch.where((block > 0)[:, None], x[:, (block * size - 1).clamp(min=0)], 0.0)

    return move


LEAKS = {
    "the token before": earlier(1),
    "a ten thousandth of it": lambda x: 1e-4 * earlier(1)(x),
    "a millionth of it": lambda x: 1e-6 * earlier(1)(x),
    "a state that fades": fading,
    "twenty tokens before": earlier(20),
    "the first token of all": lambda x: 0.1 * x[:, :1].expand_as(x),
    "the block before": of_the_block_before(64),
    "whether 180 tokens came before": lambda x: (torch.arange(x.shape[1]) > 180)[:, None] * torch.eye(x.shape[2])[3],
    "the count of tokens": lambda x: torch.sin(torch.arange(x.shape[1])[:, None] * torch.arange(x.shape[2]))[None],
}


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


def test_the_same_without_a_leak_is_packed(passes: list[FastSum]) -> None:
    clipped_sum(Leaky(torch.zeros_like), *ragged(units=9), Clip(norm=0.5), objective=OBJECTIVE, max_tokens=200)
    assert passes[-1].packed


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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, most=st.integers(1, 30), width=st.integers(1, 5), times=st.integers(1, 3))
def test_segments_bucket_and_cut_every_vector_once(lengths: list[int], most: int, width: int, times: int) -> None:
    segments = Segments(np.sort(lengths), CPU).times(times)
    x = torch.randn(segments.total + 3, width, dtype=torch.float64)  # the last three are nobody's
    expected = [x[a:b] for a, b in zip(segments.offsets[:-1], segments.offsets[1:], strict=True)]
    sums = torch.stack([part.sum(0) for part in expected])
    torch.testing.assert_close(segments.sums(x), sums)
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
