"""Whether the kernels run on a device, and are right there: tried once, against float64."""

import torch

from fedsim.gradients.kernels.gram import gram_norms_of
from fedsim.gradients.kernels.loss import loss_gradient_
from fedsim.gradients.kernels.weighted import PROGRAMS, weighted_products

TOLERANCE = 2.0**-18
"""Of a norm, relatively: a quarter of the margin of a clip."""


def fault_of(device: torch.device) -> str:
    """What is wrong with the kernels on a device, in words; empty if nothing is.

    A device may lack the memory or the instructions that they are compiled to, and how its matrix units round is for
    it to show: units whose second half takes back most of the first would be longer than their norm says if running
    sums were rounded towards zero for too long.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 3, 700, 72, generator=generator)
    drawn[:, :, 350:] -= 0.9 * drawn[:, :, :350]  # tokens that are alike and opposite
    drawn[1, :, 350:] += 1.9 * drawn[1, :, :350]
    try:
        left, right = drawn.to(torch.bfloat16).to(device)
        factors = torch.tensor([0.3, 1.0, 0.0], device=device)
        fault = _sums_fault(left, right, factors) or _norms_fault(left[:, :350], right[:, :350])
        return fault or _loss_fault(device, generator)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _sums_fault(left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor) -> str:
    each = left.double().transpose(1, 2) @ right.double()
    for unit in range(len(left)):
        alone = torch.zeros_like(factors).index_copy_(
            0, torch.tensor([unit], device=left.device), factors[unit : unit + 1]
        )
        expected = each[unit] * alone[unit].double()
        for programs in (1, PROGRAMS):  # added to the target at once, and by way of parts
            totals = torch.zeros(2, left.shape[2], right.shape[2], device=left.device)
            weighted_products(list(totals), [(left, right), (left.flip(2), right)], alone, programs)
            for total in (totals[0], totals[1].flip(0)):
                off = float((total - expected).norm())
                if not off <= TOLERANCE * float(expected.norm()):
                    return f"a weighted sum is off by {off:.3g} of {float(expected.norm()):.3g}"
    return ""


def _norms_fault(left: torch.Tensor, right: torch.Tensor) -> str:
    expected = (left.double().transpose(1, 2) @ right.double()).square().sum((1, 2))
    found, _ = gram_norms_of([(left, right), (left.flip(2), right)])
    off = float((found / expected - 1).abs().max())
    return "" if off <= 8 * TOLERANCE else f"a squared norm is off by {off:.3g}, relatively"


def _loss_fault(device: torch.device, generator: torch.Generator) -> str:
    logits = (4 * torch.randn(4, 1000, generator=generator)).to(torch.bfloat16).to(device)
    labels = torch.tensor([0, 999, -100, 5], device=device)
    expected = torch.log_softmax(logits.double(), 1)
    wanted = torch.where(labels < 0, 0.0, -expected.gather(1, labels.clamp(min=0)[:, None])[:, 0])
    gradient = expected.exp().scatter_add_(1, labels.clamp(min=0)[:, None], -torch.ones_like(expected[:, :1]))
    gradient[labels < 0] = 0
    losses, _ = loss_gradient_(logits, labels)
    off = max(float((losses - wanted).abs().max()), float((logits.double() - gradient).abs().max()) - 2.0**-7)
    return "" if off <= 1e-4 else f"a loss or its gradient is off by {off:.3g}"
