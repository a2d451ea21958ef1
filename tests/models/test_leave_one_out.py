"""Whose contribution is whose, over many families: take one user out, and exactly that user's contribution is gone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import CLASSES, DECODERS, ENCODERS, VOCABULARY, saved, tiny

from fedsim.clip import Clip
from fedsim.gradients import ClippedSum, clipped_sum, clipped_units
from fedsim.models.config import ModelConfig
from fedsim.models.load import LoadedModel, load_model
from fedsim.rows import TokenRows

LENGTHS = ((9, 3, 1), (14,), (2, 2, 6))
"""Tokens of each user's rows: of many lengths, so that whoever shares a micro-batch is padded by the others."""

CUT = 20
"""Tokens of a micro-batch that splits the first and the third user's rows and leaves every user alone."""

FLOAT32_INSIDE = ("gpt_neo", "gptj", "mpt", "mamba", "gemma", "gemma2", "gemma3_text", "cohere")
"""Families that compute some things in float32 whatever they are given: the order of their sums shows up to 1e-6."""

CLASSIFYING = ("gpt2", "llama", "mixtral", "bloom", "opt", "gemma3_text")
CASES = [
    *((family, "causal-lm", rank) for family in DECODERS for rank in (0, 2)),
    *((family, "sequence-classification", rank) for family in ENCODERS for rank in (0, 2)),
    *((family, "sequence-classification", 0) for family in CLASSIFYING),
]


def loaded_in_float64(family: str, task: str, rank: int, folder: Path) -> LoadedModel:
    config = ModelConfig(
        path=saved(tiny(family, task), folder),
        task=task,
        num_labels=CLASSES,
        lora_rank=rank,
    )
    loaded = load_model(config)
    torch.manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.5)
    for module in loaded.model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # the default one has no float64
    loaded.model.double()
    return loaded


def users() -> tuple[TokenRows, np.ndarray]:
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, VOCABULARY, length).tolist() for user in LENGTHS for length in user]
    ids = np.repeat(np.arange(len(LENGTHS)), [len(user) for user in LENGTHS])
    return TokenRows.from_lists(lists, rng.integers(0, CLASSES, len(lists))), ids


@pytest.mark.parametrize(("family", "task", "rank"), CASES)
def test_removing_a_user_removes_what_it_added_and_nothing_else(
    family: str, task: str, rank: int, tmp_path: Path
) -> None:
    loaded = loaded_in_float64(family, task, rank, tmp_path)
    rows, ids = users()

    def total(clip: Clip, of: np.ndarray = ids, max_tokens: int = 10**6, method: str = "fast") -> ClippedSum:
        chosen = np.flatnonzero(np.isin(ids, of))
        return clipped_sum(
            loaded.model, rows.take(chosen), ids[chosen], clip, objective=loaded.objective, max_tokens=max_tokens,
            method=method,
        )  # fmt: skip

    norms = total(Clip(norm=1e6)).norms
    assert norms.min() > 0
    clip = Clip(norm=float(norms.min()) / 2)
    # Sums of three vectors of norm C in float64 are off by some 2⁻⁵² of it, whole networks by a hundred times that.
    # A clipped user is aimed 2⁻¹⁶ = 1.5e-5 below C, so what moves the sum is within C by more than any rounding here.
    relative = 1e-5 if family in FLOAT32_INSIDE else 1e-12
    rounding = relative * clip.norm
    whole = total(clip)
    for other in (total(clip, max_tokens=CUT), total(clip, ids, CUT, "reference")):
        assert float((other.total - whole.total).norm()) <= rounding
        torch.testing.assert_close(other.norms, whole.norms, rtol=relative, atol=0)
        torch.testing.assert_close(other.losses, whole.losses, rtol=relative, atol=0)
    units = clipped_units(loaded.model, rows, ids, clip, objective=loaded.objective)
    each = [update for _, update, _, _ in units]
    for user in range(len(LENGTHS)):
        left = total(clip, np.delete(np.arange(len(LENGTHS)), user))
        moved = whole.total - left.total
        assert float(moved.norm()) <= clip.norm * (1 + 1e-12)
        assert float((moved - each[user]).norm()) <= rounding
        others = [u for u in range(len(left.norms)) if u != user]
        torch.testing.assert_close(left.norms[others], whole.norms[others], rtol=relative, atol=0)
        torch.testing.assert_close(left.losses[others], whole.losses[others], rtol=relative, atol=0)
