"""Rows of a table by index: token, position and segment embeddings."""

from typing import Any

import torch

from fedsim.gradients.tape import Record, Tape


def rule(module: Any) -> tuple[str, Record] | None:
    """The rule for torch's Embedding, None for other layers."""
    plain = type(module).forward is torch.nn.Embedding.forward
    if plain and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
        return "embedding", embedding
    return None


def embedding(tape: Tape, module: Any, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    """The output gradient goes to the row that was looked up; none to the padding index."""
    index = inputs[0].expand(gradient.shape[:-1])
    if module.padding_idx is not None:
        gradient = gradient.masked_fill((index == module.padding_idx).unsqueeze(-1), 0)
    tape.lookup(module.weight, tape.by_row(index.unsqueeze(-1))[..., 0], tape.by_row(gradient))
