"""Adapters over orthonormal rows: a clip of what is trained is one of the weights, and so is noise."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import clipped_sum
from fedsim.models.config import ModelConfig
from fedsim.models.export import export, probe_rows
from fedsim.models.load import load_model
from fedsim.models.lora import adapters_of

SCALE = 16 / 4
FIELDS = {"lora_rank": 4, "lora_init": "orthonormal"}


def weights(loaded, flat: torch.Tensor) -> torch.Tensor:
    """What adapters with these trained values add to the weights of the base, end to end: PEFT's own ΔW."""
    loaded.layout.load(loaded.model, flat)
    return torch.cat([layer.get_delta_weight("default").flatten() for _, layer in adapters_of(loaded.model)])


def drawn(loaded, seed: int) -> torch.Tensor:
    return torch.randn(loaded.layout.size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("of", ["linear", "transposed"])
def test_what_changes_in_the_weights_has_the_norm_of_what_changes_in_b(load, story_llama: str, of: str) -> None:
    """For layers that keep their weights as [out, in], and for those of GPT-2, which do the other way round."""
    loaded = load_model(ModelConfig(path=story_llama, **FIELDS)) if of == "linear" else load(**FIELDS)
    assert all(".lora_B." in name for name in loaded.layout.names)
    assert torch.count_nonzero(weights(loaded, torch.zeros(loaded.layout.size))) == 0
    here, there, noise = (drawn(loaded, seed) for seed in range(3))
    moved = weights(loaded, here) - weights(loaded, there)
    assert float(moved.norm()) == pytest.approx(SCALE * float((here - there).norm()), rel=1e-5)
    # Noise on what is trained is the same noise on the weights, wherever training has got to.
    for place in (here, there):
        found = weights(loaded, place + noise) - weights(loaded, place)
        torch.testing.assert_close(found, weights(loaded, noise), rtol=1e-4, atol=1e-4)


def test_ordinary_adapters_do_not_keep_norms(story_llama: str) -> None:
    loaded = load_model(ModelConfig(path=story_llama, lora_rank=4))
    here, there = drawn(loaded, 0), drawn(loaded, 1)
    ratio = float((weights(loaded, here) - weights(loaded, there)).norm()) / float((here - there).norm())
    assert not 0.9 * SCALE < ratio < 1.1 * SCALE


def test_a_clipped_update_moves_the_weights_by_no_more_than_the_clip(story_llama: str) -> None:
    loaded = load_model(ModelConfig(path=story_llama, **FIELDS))
    rows = probe_rows(loaded, count=1)
    update = clipped_sum(loaded.model, rows, np.zeros(1, int), Clip(norm=0.25), objective=loaded.objective).total
    assert float(update.norm()) == pytest.approx(0.25, rel=1e-3)
    assert float(weights(loaded, update).norm()) == pytest.approx(SCALE * 0.25, rel=1e-3)


def test_every_process_draws_the_same_rows_however_many_threads_it_has(story_llama: str) -> None:
    def rows(seed: int) -> torch.Tensor:
        loaded = load_model(ModelConfig(path=story_llama, seed=seed, **FIELDS))
        return torch.cat([layer.lora_A["default"].weight.flatten() for _, layer in adapters_of(loaded.model)])

    threads = torch.get_num_threads()
    first, other = rows(0), rows(1)
    try:
        torch.set_num_threads(3)
        assert torch.equal(rows(0), first)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(first, other)


def test_rows_that_are_read_must_be_orthonormal_to_be_frozen(story_llama: str, tmp_path: Path) -> None:
    ours = export(load_model(ModelConfig(path=story_llama, **FIELDS)), tmp_path / "ours")
    again = load_model(ModelConfig(path=str(ours), lora_init="orthonormal"))
    assert all(".lora_B." in name for name in again.layout.names)
    assert any(".lora_A." in name for name in load_model(ModelConfig(path=str(ours))).layout.names)
    theirs = export(load_model(ModelConfig(path=story_llama, lora_rank=4)), tmp_path / "theirs")
    with pytest.raises(InvalidInput, match="A·Aᵀ") as raised:
        load_model(ModelConfig(path=str(theirs), lora_init="orthonormal"))
    assert raised.value.field == "model.lora-init"
