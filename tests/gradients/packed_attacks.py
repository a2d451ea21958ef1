"""What tests that attack packed rows share."""

from collections.abc import Sequence

import numpy as np
import torch
from gradient_checks import VOCABULARY

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum
from fedsim.rows import TokenRows

OBJECTIVE = CausalLanguageModel()
CLIP = Clip(norm=0.5)


def rows_of(lengths: Sequence[int], seed: int = 0, first: int = 2, words: int = VOCABULARY) -> TokenRows:
    rng = np.random.default_rng(seed)
    return TokenRows.from_lists([rng.integers(first, words, length).tolist() for length in lengths])


def off(model: torch.nn.Module, rows: TokenRows, units: Sequence[int], **arguments: object) -> float:
    """By how much of the clip a sum differs, at worst, from that without a unit and the unit's own."""
    ids = np.arange(len(rows))
    whole = clipped_sum(model, rows, ids, CLIP, objective=OBJECTIVE, **arguments).total
    worst = 0.0
    for unit in units:
        rest = rows.take(np.delete(ids, unit))
        left = clipped_sum(model, rest, ids[:-1], CLIP, objective=OBJECTIVE, **arguments).total
        own = clipped_sum(
            model, rows.take(ids[unit : unit + 1]), ids[:1], CLIP, objective=OBJECTIVE, method="reference"
        ).total
        worst = max(worst, float((whole - left - own).norm()) / CLIP.norm)
    return worst


class Around(torch.nn.Module):
    """A model around another of transformers."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.eval()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        return self.inner(input_ids, **arguments).logits
