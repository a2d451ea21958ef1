"""Activations that are computed again: the same sums with fewer of them kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from clients.computing import Computing
from fedsim.clip import Clip
from fedsim.config import EngineConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.gradients import clipped_sum, layer_paths
from fedsim.models.checkpointing import checkpoint_blocks
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.rows import TokenRows

FORMS = [{}, {"lora_rank": 2}, {"task": "sequence-classification", "num_labels": 3}]


def users() -> tuple[TokenRows, np.ndarray]:
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, 300, length).tolist() for length in (9, 3, 30, 20, 20, 31, 7)]
    return TokenRows.from_lists(lists, rng.integers(0, 3, len(lists))), np.array([0, 0, 1, 1, 2, 3, 4])


class Kept:
    """Bytes that autograd keeps for the backward pass."""

    size = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.size += tensor.nbytes
        return tensor


@pytest.mark.parametrize("path", ["default", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_the_same_and_fewer_activations_are_kept(load, story_llama, path, form, caplog) -> None:
    form = form if path == "default" else {**form, "path": story_llama}
    plain, again = load(**form), load(**form, checkpointing=True)
    rows, ids = users()
    kept = []
    for loaded in (plain, again):
        flat = loaded.layout.flatten(loaded.model)
        noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
        loaded.layout.load(loaded.model, flat + 0.05 * noise)
    for method in ("fast", "reference"):
        sums = []
        for loaded in (plain, again):
            # Once before, for the first call tries the fast path on units of its own.
            clipped_sum(loaded.model, rows, ids, Clip(norm=1.0), objective=loaded.objective, method=method)
            counted = Kept()
            with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda x: x):
                sums.append(
                    clipped_sum(loaded.model, rows, ids, Clip(norm=1.0), objective=loaded.objective, method=method)
                )
            kept.append(counted.size)
        expected, found = sums
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)
        assert float((found.total - expected.total).norm()) <= 1e-5 * float(expected.total.norm())
    assert layer_paths(again.model) == layer_paths(plain.model) != {}
    assert "reference path" not in caplog.text
    assert kept[1] < kept[0] / 2  # of the fast path
    assert kept[3] < kept[2] / 2
    losses = [evaluate(loaded.model, rows, loaded.objective).loss for loaded in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_blocks_alone_are_in_training_mode(load) -> None:
    model = load(lora_rank=2, checkpointing=True).model
    training = [module for module in model.modules() if module.training]
    assert training
    assert all(isinstance(module, GradientCheckpointingLayer) for module in training)


def test_a_model_without_blocks_is_refused() -> None:
    config = ModelConfig(checkpointing=True)
    with pytest.raises(InvalidInput, match=r"model\.checkpointing"):
        checkpoint_blocks(torch.nn.Linear(2, 2), config)


def test_passes_are_then_not_compiled() -> None:
    config = RunConfig(model=ModelConfig(checkpointing=True))
    assert Computing.of(config, 16).compiled is False
    assert Computing.of(replace(config, model=ModelConfig()), 16).compiled is None
    with pytest.raises(InvalidInput, match=r"engine\.compile"):
        replace(config, engine=EngineConfig(compile="on"))
