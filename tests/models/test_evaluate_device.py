"""Evaluation, and the trial of a model's rows, on a device that is not the host's."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import TINY

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate, evaluate_rows
from fedsim.models.independence import require_independent_rows
from fedsim.rows import IGNORED_LABEL, TokenRows


def rows_of(count: int) -> TokenRows:
    """Rows of many lengths, one of them empty of labels."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, TINY.context + 1, count))])
    tokens = rng.integers(0, TINY.vocabulary_size, offsets[-1])
    labels = np.where(rng.random(len(tokens)) < 0.2, IGNORED_LABEL, tokens)
    return TokenRows(tokens=tokens, offsets=offsets, labels=labels, classes=rng.integers(0, 4, count))


@pytest.mark.parametrize("task", [{}, {"task": "sequence-classification", "num_labels": 4}, {"lora_rank": 2}])
def test_losses_on_a_device_are_the_hosts(load, task: dict, device: torch.device) -> None:
    """Of all rows and of some, in one batch and in several, and where the device is not named."""
    loaded, rows = load(**task), rows_of(9)
    there = copy.deepcopy(loaded.model).to(device)
    chosen = np.array([5, 2, 7])
    for indices, max_tokens, named in ((None, None, None), (chosen, None, device), (None, TINY.context, None)):
        how = {"indices": indices, "max_tokens": max_tokens}
        expected = evaluate_rows(loaded.model, rows, loaded.objective, **how)
        found = evaluate_rows(there, rows, loaded.objective, device=named, **how)
        np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-5)
        np.testing.assert_array_equal(found.label_count, expected.label_count)
        np.testing.assert_array_equal(found.correct, expected.correct)
    assert evaluate(there, rows, loaded.objective).loss == pytest.approx(
        evaluate(loaded.model, rows, loaded.objective).loss, rel=1e-5
    )


def test_rows_that_depend_on_each_other_are_found_on_a_device(load, device: torch.device) -> None:
    """And only these are refused."""
    model = copy.deepcopy(load().model).to(device)
    require_independent_rows(model, ModelConfig(small=TINY), 0, None, TINY.context)
    model.register_forward_pre_hook(lambda module, args, kwargs: ((args[0].flip(0),), kwargs), with_kwargs=True)
    with pytest.raises(InvalidInput, match="row beside it"):
        require_independent_rows(model, ModelConfig(small=TINY), 0, None, TINY.context)
