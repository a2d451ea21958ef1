import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.errors import InvalidInput
from fedsim.gradients.head import CHUNK_ELEMENTS, LEAST_POSITIONS, _plain_heads
from fedsim.gradients.model import autocasting
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import LOGITS_PER_BATCH, Evaluation, EvaluationByUnit, evaluate, evaluate_rows
from fedsim.models.load import load_model
from fedsim.rows import IGNORED_LABEL, TokenRows


@pytest.fixture(scope="module")
def causal(load):
    return load()


@pytest.fixture(scope="module")
def classifier(load):
    return load(task="sequence-classification", num_labels=4)


def random_rows(count: int, seed: int = 0, longest: int = TINY.context) -> TokenRows:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    rows = TokenRows.from_lists([generator.integers(0, TINY.vocabulary_size, n).tolist() for n in lengths])
    labels = np.where(generator.random(len(rows.tokens)) < 0.2, IGNORED_LABEL, rows.tokens)
    classes = generator.integers(0, 4, count)
    return TokenRows(tokens=rows.tokens, offsets=rows.offsets, labels=labels, classes=classes)


class View:
    """Rows that are looked up, as in a store."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    @property
    def row_lengths(self) -> np.ndarray:
        return self.rows.lengths

    def take(self, row_indices: np.ndarray, /) -> TokenRows:
        bounds = [(self.rows.offsets[row], self.rows.offsets[row + 1]) for row in row_indices]
        return TokenRows(
            tokens=np.concatenate([self.rows.tokens[a:b] for a, b in bounds]),
            offsets=np.cumsum([0, *(b - a for a, b in bounds)]),
            labels=np.concatenate([self.rows.labels[a:b] for a, b in bounds]),
            classes=self.rows.classes[row_indices],
        )


def test_the_loss_is_the_one_that_transformers_computes(causal) -> None:
    rows = random_rows(1, longest=20)
    tokens, labels = torch.tensor(rows.tokens)[None], torch.tensor(rows.labels)[None]
    found = evaluate(causal.model, rows, causal.objective)
    assert found.loss == pytest.approx(causal.model(tokens, labels=labels).loss.item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    predicted = causal.model(tokens).logits[0, :-1].argmax(-1)
    scored = labels[0, 1:] != IGNORED_LABEL
    assert found.correct == int((predicted[scored] == labels[0, 1:][scored]).sum())


def test_a_classifier_counts_rows(classifier) -> None:
    rows = random_rows(12)
    found = evaluate(classifier.model, rows, classifier.objective)
    alone = [
        classifier.model(torch.tensor(rows.tokens[a:b])[None]).logits[0]
        for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    ]
    losses = torch.nn.functional.cross_entropy(torch.stack(alone), torch.tensor(rows.classes), reduction="sum")
    assert found.loss_sum == pytest.approx(losses.item(), rel=1e-5)
    assert found.label_count == found.rows == 12
    assert found.correct == sum(int(logits.argmax()) == c for logits, c in zip(alone, rows.classes, strict=True))


@settings(max_examples=15)
@given(count=st.integers(1, 30), max_tokens=st.integers(1, 400), cut=st.integers(0, 30), seed=st.integers(0, 99))
def test_neither_batches_nor_parts_change_the_sums(causal, classifier, count, max_tokens, cut, seed) -> None:
    rows = random_rows(count, seed)
    cut = min(cut, count)
    for loaded in (causal, classifier):
        whole = evaluate(loaded.model, rows, loaded.objective)
        parts = Evaluation()
        for indices in (np.arange(cut), np.arange(cut, count)):
            parts += evaluate(loaded.model, rows, loaded.objective, indices=indices, max_tokens=max_tokens)
        assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
        assert (parts.label_count, parts.rows) == (whole.label_count, count)
        # A tie between two logits may fall either way by rounding.
        assert abs(parts.correct - whole.correct) <= 1


class MostLogits(TorchDispatchMode):
    """Within it, how many logits, or values for each of them, the largest tensor of such has."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (TINY.vocabulary_size,):
                self.number = max(self.number, made.numel())
        return result


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_logits_exist_for_some_positions_at_a_time(causal, autocast, monkeypatch) -> None:
    """However many tokens a batch has; a model whose logits are more than a product gets batches of few tokens."""
    rows = random_rows(400)
    tokens = 400 * TINY.context
    with MostLogits() as chunked:
        evaluate(causal.model, rows, causal.objective, max_tokens=tokens, autocast=autocast)
    assert 0 < chunked.number <= CHUNK_ELEMENTS["cpu"] < len(rows.tokens) * TINY.vocabulary_size / 2
    monkeypatch.setitem(LOGITS_PER_BATCH, "cpu", 2**16)
    capped = causal.model.register_forward_hook(lambda model, given, output: output.logits.tanh())
    _plain_heads.pop(causal.model.get_output_embeddings())
    with MostLogits() as whole:
        evaluate(causal.model, rows, causal.objective)
    capped.remove()
    _plain_heads.pop(causal.model.get_output_embeddings())
    assert 0 < whole.number <= 2**16


@pytest.mark.parametrize("positions", [1, 5, 40])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_chunks_of_any_size_give_the_losses_of_whole_logits(causal, positions, autocast, monkeypatch) -> None:
    """Of float32, or of bfloat16 as products of other shapes round them; the loss itself is never of bfloat16."""
    rows = random_rows(12)
    monkeypatch.setitem(LEAST_POSITIONS, "cpu", positions)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1)
    found = evaluate_rows(causal.model, rows, causal.objective, autocast=autocast)
    with torch.inference_mode(), autocasting(torch.device("cpu"), autocast):
        expected = causal.objective.row_losses(causal.model, causal.objective.collate(rows, np.arange(12), "cpu"))
    tolerance = 1e-6 if autocast is None else 3e-4
    np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=tolerance)
    np.testing.assert_array_equal(found.label_count, expected.label_count)
    assert abs(found.correct - expected.correct.numpy()).sum() <= (0 if autocast is None else 2)


def test_autocast_reaches_the_model_and_no_other_precision_is_taken(causal) -> None:
    rows = random_rows(12)
    plain, mixed = (
        evaluate_rows(causal.model, rows, causal.objective, autocast=dtype).loss_sum
        for dtype in (None, torch.bfloat16)
    )
    off = abs(mixed - plain).sum() / plain.sum()
    assert 1e-7 < off < 1e-2
    with pytest.raises(InvalidInput, match="autocast"):
        evaluate_rows(causal.model, rows, causal.objective, autocast=torch.float16)


def test_a_view_is_read_by_index(causal) -> None:
    rows = random_rows(20)
    indices = np.array([7, 3, 11])
    seen = evaluate_rows(causal.model, View(rows), causal.objective, indices=indices, max_tokens=40)
    everything = evaluate_rows(causal.model, rows, causal.objective)
    np.testing.assert_allclose(seen.loss_sum, everything.loss_sum[indices], rtol=1e-5)
    np.testing.assert_array_equal(seen.label_count, everything.label_count[indices])


def test_units_add_up_their_rows(causal) -> None:
    rows = random_rows(10)
    unit_ids = np.array([0, 0, 2, 2, 2, 4, 0, 2, 4, 4])
    by_row = evaluate_rows(causal.model, rows, causal.objective)
    users = by_row.by_unit(unit_ids, units=6)
    assert users.rows.tolist() == [3, 0, 4, 0, 3, 0]
    assert users.losses[2] == pytest.approx(
        by_row.loss_sum[[2, 3, 4, 7]].sum() / by_row.label_count[[2, 3, 4, 7]].sum()
    )
    assert np.isnan(users.losses[[1, 3, 5]]).all()
    assert np.isnan(users.accuracies[[1, 3, 5]]).all()
    assert users.total == by_row.total


def test_nothing_scored_is_not_a_number(causal) -> None:
    found = evaluate(causal.model, TokenRows.from_lists([[5], [7]]), causal.objective)
    assert (found.label_count, found.rows) == (0, 2)
    assert math.isnan(found.loss)
    assert math.isnan(found.perplexity)
    assert math.isnan(found.accuracy)
    assert Evaluation(loss_sum=1e6, label_count=1).perplexity == math.inf


def test_the_standard_error_is_that_of_drawing_units_again() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 200, 400)
    means = generator.normal(5, 1, 400) + 0.01 * counts
    users = EvaluationByUnit(
        loss_sum=means * counts, label_count=counts, correct=counts // 2, rows=np.ones(400, np.int64)
    )
    draws = generator.integers(0, 400, (2000, 400))
    losses = users.loss_sum[draws].sum(1) / counts[draws].sum(1)
    assert users.loss_standard_error == pytest.approx(losses.std(), rel=0.1)
    assert math.isnan(users.by_unit(np.zeros(400, np.int64)).loss_standard_error)


def test_a_classifier_finds_its_last_token_whatever_fills_the_row(story_llama: str) -> None:
    loaded = load_model(ModelConfig(path=story_llama, task="sequence-classification", num_labels=4))
    assert loaded.pad_token == loaded.model.config.pad_token_id == 2
    rows = TokenRows.from_lists([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]], np.array([1, 3]))
    together, alone = (
        evaluate_rows(loaded.model, rows, loaded.objective, max_tokens=limit).loss_sum for limit in (100, 1)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5)
