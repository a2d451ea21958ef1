"""The generic checker: whatever the model, the fast path must give what plain autograd gives, unit by unit."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, SequenceClassification, clipped_sum
from fedsim.gradients.fast import FastSum
from fedsim.gradients.objective import RowLosses
from fedsim.gradients.units import make_units
from fedsim.rows import IGNORED_LABEL, TokenRows

VOCABULARY = 61
CLASSES = 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Prescribed(CausalLanguageModel):
    """The model returns its rows' losses itself."""

    def row_losses(self, model: torch.nn.Module, batch) -> RowLosses:
        losses = model(batch.input_ids)
        return RowLosses(loss_sum=losses, label_count=torch.ones(len(losses)), correct=torch.zeros(len(losses)))


class Made(torch.nn.Module):
    """One matrix [p, q], tied or not, whose gradient is Σ_t left_t right_t^T + Σ_t rows_t at place_t.

    The loss is linear: what the head makes of right_t, times left_t, and what is looked up at place_t, times rows_t.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, place=None, rows=None) -> None:
        super().__init__()
        self.left, self.right, self.place, self.rows = left, right, place, rows
        self.head = torch.nn.Linear(right.shape[1], left.shape[1], bias=False)
        torch.nn.init.zeros_(self.head.weight)
        if place is not None:
            self.table = torch.nn.Embedding(left.shape[1], right.shape[1])
            self.table.weight = self.head.weight
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        units = len(input_ids)
        loss = (self.head(self.right.expand(units, -1, -1)) * self.left).sum((1, 2))
        if self.place is not None:
            loss = loss + (self.table(self.place.expand(units, -1)) * self.rows).sum((1, 2))
        return loss

    def gradient(self) -> torch.Tensor:
        exact = self.left.double().t() @ self.right.double()
        return exact if self.place is None else exact.index_add(0, self.place, self.rows.double())


def ragged(seed: int = 0, units: int = 7, longest: int = 14, most: int = 5) -> tuple[TokenRows, np.ndarray]:
    """Rows of many lengths (none, one, many tokens), some labels ignored, for units of 1 to `most` rows."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(units), rng.integers(1, most + 1, units)))
    lengths = rng.integers(2, longest + 1, len(ids))
    lengths[rng.random(len(ids)) < 0.1] = 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1, VOCABULARY, offsets[-1])
    labels = np.where(rng.random(len(tokens)) < 0.15, IGNORED_LABEL, tokens)
    classes = rng.integers(0, CLASSES, len(ids))
    return TokenRows(tokens=tokens, offsets=offsets, labels=labels, classes=classes), ids


def fast_sum(model, rows, ids, clip, *, objective, max_tokens=10**6, autocast=None):
    """The fast path itself, without the check on first use and its way out to the reference."""
    units = make_units(rows, ids, objective, "examples", None)
    return FastSum(model, rows, units, objective, clip, max_tokens, autocast).run()


def assert_same(found, expected, tolerance: float) -> None:
    """Sums, norms and losses agree to a relative tolerance, and the same units are finite."""
    assert torch.equal(found.finite, expected.finite)
    for name in ("total", "norms", "losses"):
        left, right = (getattr(x, name) for x in (found, expected))
        if name != "total":
            left, right = left[expected.finite], right[expected.finite]
        difference = float((left - right).norm())
        assert difference <= tolerance * float(right.norm()), (name, difference, float(right.norm()))


def check(
    model: torch.nn.Module,
    objective=None,
    *,
    seed: int = 0,
    max_tokens: int = 10**6,
    dtypes=tuple(TOLERANCE),
    **shapes,
) -> None:
    """Fast equals reference in both precisions, with a clip that bites and one that does not."""
    objective = objective or CausalLanguageModel()
    rows, ids = ragged(seed, **shapes)
    for dtype in dtypes:
        model, tolerance = model.to(dtype), TOLERANCE[dtype]
        expected = clipped_sum(model, rows, ids, Clip(norm=1e6), objective=objective, method="reference")
        assert expected.norms.max() > 0
        found = fast_sum(model, rows, ids, Clip(norm=1e6), objective=objective, max_tokens=max_tokens)
        assert_same(found, expected, tolerance)
        clip = Clip(norm=float(expected.norms[expected.norms > 0].median()))
        expected = clipped_sum(model, rows, ids, clip, objective=objective, method="reference")
        found = fast_sum(model, rows, ids, clip, objective=objective, max_tokens=max_tokens)
        assert_same(found, expected, tolerance)


class Around(torch.nn.Module):
    """A language model made of one layer: tokens → table of features → the layer → logits; only the layer trains."""

    def __init__(self, layer: torch.nn.Module, width: int, out: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.features = torch.nn.Parameter(torch.randn(VOCABULARY, width, generator=generator), requires_grad=False)
        self.layer = layer
        self.logits = torch.nn.Parameter(
            torch.randn(VOCABULARY, out or width, generator=generator) / 4, requires_grad=False
        )
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # A running mean makes it causal and rows of tokens unlike.
        x = self.features[input_ids].cumsum(1) / torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).view(
            1, -1, 1
        )
        return torch.tanh(self.layer(x)) @ self.logits.t()


class Tables(torch.nn.Module):
    """Token, position (looked up once for all rows) and tied output embeddings, each used in a way of its own."""

    def __init__(self, width: int, tied: bool, padding_idx: int | None) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(VOCABULARY, width, padding_idx=padding_idx)
        self.position = torch.nn.Embedding(32, width)
        self.out = torch.nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.out.weight = self.token.weight
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return self.out(torch.tanh(self.token(input_ids) + self.position(positions)).cumsum(1))


def architectures() -> Iterator[tuple[str, torch.nn.Module, object]]:
    """Small models of every shape that the fast path promises, in evaluation mode, all parameters trained."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    gpt2 = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": VOCABULARY,
        "n_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    llama = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    bert = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "num_labels": CLASSES,
        "max_position_embeddings": 16,
    }
    language, classes = CausalLanguageModel(), SequenceClassification()
    yield "gpt2, tied", GPT2LMHeadModel(GPT2Config(**gpt2)), language
    yield "gpt2, untied", GPT2LMHeadModel(GPT2Config(**gpt2, tie_word_embeddings=False)), language
    yield "gpt2 classifier", GPT2ForSequenceClassification(GPT2Config(**gpt2, num_labels=CLASSES)), classes
    yield "llama", LlamaForCausalLM(LlamaConfig(**llama)), language
    yield "llama, tied", LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)), language
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(**llama, head_dim=4)), language
    yield "bert classifier", BertForSequenceClassification(BertConfig(**bert)), classes
    yield "mlp", MLP(), classes


class MLP(torch.nn.Module):
    """A plain classifier over the mean of token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.LayerNorm(12), torch.nn.Linear(12, CLASSES, bias=False)
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.unsqueeze(-1).to(self.table.weight.dtype)
        return self.layers((self.table(input_ids) * mask).sum(1) / mask.sum(1))
