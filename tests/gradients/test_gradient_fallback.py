"""What the fast path cannot serve takes the reference path by itself; the loss is fused only where that is right."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, Around, Tables, assert_same, ragged
from head_models import Language

from fedsim.clip import Clip
from fedsim.errors import Failure
from fedsim.gradients import CausalLanguageModel, clipped_sum, layer_paths
from fedsim.gradients import head as head_module
from fedsim.gradients.head import CHUNK_ELEMENTS, LEAST_POSITIONS, chunk_positions, fused_loss, plain_head
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.models.evaluate import evaluate

OBJECTIVE = CausalLanguageModel()


class Bypassing(torch.nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.bypassed = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.relu(self.called(x)), self.bypassed.weight)


class Sorting(torch.nn.Module):
    """Hands a layer the tokens of all rows in another order, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 6)
        order = flat[:, 0].argsort()
        return self.layer(flat[order])[order.argsort()].view(x.shape)


@pytest.mark.parametrize("layer", [Bypassing, Sorting])
def test_a_model_without_a_right_fast_path_takes_the_reference(layer: type, caplog) -> None:
    torch.manual_seed(0)
    model = Around(layer(), 6)
    rows, ids = ragged()
    expected = clipped_sum(model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE, method="reference")
    for _ in range(2):
        assert_same(clipped_sum(model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE), expected, 1e-5)
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert "reference path" in caplog.text


def test_a_wrong_sum_is_noticed_though_the_norms_are_right(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    right = UnitGradients.add_weighted
    monkeypatch.setattr(
        UnitGradients, "add_weighted", lambda self, target, factors, **rest: right(self, target, -factors, **rest)
    )
    torch.manual_seed(0)
    model = Tables(4, True, None)
    rows, ids = ragged()
    expected = clipped_sum(model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE, method="reference")
    assert_same(clipped_sum(model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE), expected, 1e-5)
    assert "differs from autograd's" in caplog.text


def test_the_default_is_the_fast_path_and_says_which_way_each_layer_went() -> None:
    model = Tables(4, True, None)
    rows, ids = ragged()
    expected = clipped_sum(model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE, method="reference")
    assert layer_paths(model) == {}
    assert_same(clipped_sum(model, rows, ids, Clip(norm=0.1), objective=OBJECTIVE), expected, 1e-5)
    assert set(layer_paths(model)) == {"token.weight", "position.weight"}


def language_model(**settings: object) -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if "final_logit_softcapping" in settings:
        config = Gemma2Config(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
            num_key_value_heads=1, vocab_size=VOCABULARY, **settings,
        )  # fmt: skip
        return Gemma2ForCausalLM(config).eval()
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def test_the_fused_loss_is_used_only_where_the_head_gives_the_logits() -> None:
    assert plain_head(language_model()) is not None
    assert plain_head(language_model(final_logit_softcapping=None)) is not None
    assert plain_head(language_model(final_logit_softcapping=30.0)) is None
    assert plain_head(Tables(4, True, None)) is None


def _forbidding() -> torch.nn.Module:
    """Writes to its logits where they are, as some models do to forbid a few tokens."""

    def forbid(module: torch.nn.Module, given: object, output) -> None:
        output.logits[..., 3:5] = -10.0

    model = language_model()
    model.register_forward_hook(forbid)
    return model


class Twice(torch.nn.Module):
    """Asks its head for more than the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        self.head = torch.nn.Linear(VOCABULARY, VOCABULARY)
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        return self.head(x + torch.tanh(self.head(x)))


@pytest.mark.parametrize("make", [_forbidding, Twice])
def test_a_head_whose_output_is_more_or_less_than_the_logits_is_not_plain(make: Callable[[], torch.nn.Module]) -> None:
    model = make()
    assert plain_head(model) is None
    rows, _ = ragged()
    found = evaluate(model, rows, OBJECTIVE)
    expected = OBJECTIVE.row_losses(model, OBJECTIVE.collate(rows, np.arange(len(rows)), "cpu")).loss_sum.detach()
    assert found.loss_sum == pytest.approx(float(expected.sum()), rel=1e-5)


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    """Memory that nobody has written to is nan."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("chunk", [1, 15, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_loss_equals_the_ordinary_one(chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "chunk_positions", lambda words, device: chunk)
    model = language_model().double()
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
    rows, _ = ragged()
    indices = np.arange(len(rows))
    batch = OBJECTIVE.collate(rows, indices, "cpu")
    coefficients = torch.rand(len(indices), dtype=torch.float64)
    plain = OBJECTIVE.row_losses(model, batch)
    expected = torch.autograd.grad((coefficients * plain.loss_sum).sum(), list(model.parameters()))
    loss, found = fused_loss(model, plain_head(model), batch, coefficients)
    torch.testing.assert_close(found.loss_sum, plain.loss_sum.detach())
    assert found.label_count.tolist() == plain.label_count.tolist()
    assert found.correct.tolist() == plain.correct.tolist()
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other)
    from gradient_checks import check

    check(model, most=3)


@pytest.mark.parametrize("chunk", [1, 15, 10**6])
@pytest.mark.parametrize("trained", ["bias", "weight"])
def test_a_head_of_which_a_part_is_frozen(trained: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model's biases alone are trained."""
    from gradient_checks import check

    monkeypatch.setattr(head_module, "chunk_positions", lambda words, device: chunk)
    model = Language(False, True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    check(model, most=3)


@pytest.mark.parametrize("words", [1, 61, 4_096, 50_257, 262_144])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_chunk_is_small_unless_products_of_fewer_positions_would_read_the_weights_too_often(
    words: int, kind: str
) -> None:
    positions = chunk_positions(words, torch.device(kind))
    assert positions >= LEAST_POSITIONS[kind]
    assert positions == LEAST_POSITIONS[kind] or positions * words <= CHUNK_ELEMENTS[kind] < (positions + 1) * words


def test_a_model_that_fails_on_a_unit_is_named() -> None:
    class Failing(Tables):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise AssertionError("use model.train()")

    rows, ids = ragged(units=3)
    with pytest.raises(Failure, match=r"Failing failed in the forward or backward pass.*use model\.train"):
        clipped_sum(Failing(4, True, None), rows, ids, Clip(norm=0.1), objective=OBJECTIVE)
