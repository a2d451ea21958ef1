"""A position's cross-entropy and its gradient, over the logits and in their place."""

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Logits that a program holds at a time."""


def loss_gradient_(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and hits of positions; logits become p − onehot(label), zero where no label is scored.

    Two passes over a position's logits, in float32: one for the largest and the sum of exponentials, one that writes.

    Args:
        logits: bfloat16 [N, V], rows at any distance; overwritten.
        labels: int64 [N], below zero where nothing is scored; of one that is V or more the loss is nan.

    Returns:
        −log p(label), float32 [N], 0 where nothing is scored, and whether no logit is above the label's, bool [N].
    """
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    right = torch.empty(len(logits), device=logits.device, dtype=torch.bool)
    _loss[(len(logits),)](logits, labels, losses, right, logits.shape[1], logits.stride(0), BLOCK=BLOCK, num_warps=8)
    return losses, right


@triton.jit
def _loss(logits, labels, losses, right, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * stride
    # A label beyond the vocabulary makes the loss, and with it the unit, not finite.
    own = tl.load(start + tl.maximum(label, 0), mask=label < width, other=float("nan")).to(tl.float32)
    step = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, width, BLOCK):  # each lane keeps a largest and a sum of its own
        x = tl.load(start + k + step, mask=k + step < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        before = mass * tl.where(higher == largest, 1.0, tl.exp(largest - higher))
        mass = before + tl.where(x == -float("inf"), 0.0, tl.exp(x - higher))
        largest = higher
    top = tl.max(largest, 0)
    total = tl.sum(tl.where(mass > 0, mass * tl.exp(largest - top), mass), 0)
    scored = label >= 0
    tl.store(losses + row, tl.where(scored, tl.log(total) + top - own, 0.0))
    tl.store(right + row, scored & (own >= top))
    for k in range(0, width, BLOCK):
        x = tl.load(start + k + step, mask=k + step < width, other=0.0).to(tl.float32)
        gradient = tl.exp(x - top) / total - tl.where(k + step == label, 1.0, 0.0)
        tl.store(start + k + step, tl.where(scored, gradient, 0.0).to(tl.bfloat16), mask=k + step < width)
