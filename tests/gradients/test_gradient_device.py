"""Sums on a device that is not the host's have the values of the host's, and no part of them is left on the host."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gradient_checks import CLASSES, VOCABULARY, Tables, architectures, ragged

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients import (
    CausalLanguageModel,
    ClippedSum,
    LocalSteps,
    ParameterLayout,
    SequenceClassification,
    clipped_sum,
    clipped_units,
    layer_paths,
)
from fedsim.gradients.model import exact_products, model_device
from fedsim.rows import TokenRows

LANGUAGE = CausalLanguageModel()


def uniform(units: int = 4, rows: int = 2, length: int = 12) -> tuple[TokenRows, np.ndarray]:
    """Rows of one length, equally many for each unit."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, units * rows * length)
    offsets = np.arange(units * rows + 1) * length
    return TokenRows(tokens=tokens, offsets=offsets), np.repeat(np.arange(units), rows)


def blocks_of(model: torch.nn.Module, norm: float = 0.5) -> Clip:
    """A clip of two blocks, of which one is scaled."""
    names = ParameterLayout.of(model).names
    half, share = len(names) // 2, 0.5**0.5
    parts = (names[:half], names[half:])
    return Clip(
        norm=norm,
        scales={name: 0.5 for name in parts[0]},
        blocks=tuple(ClipBlock(parameters=part, share=share) for part in parts),
    )


def scaled(model: torch.nn.Module) -> Clip:
    names = ParameterLayout.of(model).names
    return Clip(norm=0.5, scales=dict(zip(names, np.linspace(0.5, 2.0, len(names)).tolist(), strict=True)))


def compare(found: ClippedSum, expected: ClippedSum, device: torch.device, tolerance: float = 1e-5) -> None:
    """Everything of a sum lies on the device, and has the host's values."""
    for name in ("total", "norms", "losses", "finite"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.device == device, name
        if name == "finite":
            assert torch.equal(one.cpu(), other)
            continue
        one, other = (x if name == "total" else x[expected.finite] for x in (one.cpu(), other))
        assert float((one - other).norm()) <= tolerance * float(other.norm()), name


def check(
    model: torch.nn.Module,
    rows: TokenRows,
    ids: np.ndarray,
    clip: Clip,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
    tolerance: float = 1e-5,
    **how: Any,
) -> ClippedSum:
    """The sum on the device is the host's, and no other path was taken to it."""
    how = {"objective": LANGUAGE, **how}
    expected = clipped_sum(model.eval(), rows, ids, clip, **how)
    there = copy.deepcopy(model).to(device)
    with caplog.at_level(logging.WARNING):
        found = clipped_sum(there, rows, ids, clip, **how)
    refused = [record.getMessage() for record in caplog.records if "reference path" in record.getMessage()]
    assert not refused, refused
    compare(found, expected, device, tolerance)
    assert model_device(there) == device
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[torch.nn.Module, Any]]:
    return {name: (model.eval(), objective) for name, model, objective in architectures()}


@pytest.mark.parametrize("name", ["gpt2, tied", "gpt2 classifier", "llama", "llama, tied", "qwen3", "bert classifier", "mlp"])
def test_models_of_every_shape(
    name: str, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model, objective = models[name]
    check(model, *ragged(), Clip(norm=0.5), device, caplog, objective=objective)


@pytest.mark.parametrize("max_tokens", [None, 40, 12])
def test_rows_of_one_length_and_units_of_several_micro_batches(
    max_tokens: int | None, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    check(models["llama"][0], *uniform(), Clip(norm=0.5), device, caplog, max_tokens=max_tokens)
    check(models["gpt2, tied"][0], *ragged(3), Clip(norm=0.5), device, caplog, max_tokens=max_tokens)
