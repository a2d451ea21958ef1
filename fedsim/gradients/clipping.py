"""The clip, and what a clipped sum reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.layout import ParameterLayout

CLIP_MARGIN = 2.0**-16
"""How far below clip_norm a clipped unit is aimed, relatively.

Norms are computed in float32 to better than this (the fast path checks it for each unit and recomputes a unit whose
norm cancellation made less sure), and scaling rounds by 2⁻²⁴; so a clipped unit never exceeds clip_norm.
"""

LARGEST_NORM = 1e18
"""A unit whose norm exceeds this counts as not finite: its square would overflow float32."""


@dataclass(frozen=True, kw_only=True)
class ClippedSum:
    """The sum of clipped updates and what each unit was like before the clip.

    `total` is what a mechanism adds noise to. The rest is private: it must not leave the server without noise.

    Attributes:
        total: [P] in the order of the ParameterLayout, on the model's device; float32 (float64 where the model's
            parameters are float64).
        norms: [U], each unit's norm before the clip (of Δ⊘s where scales are given); nan or inf where not finite.
        losses: [U], each unit's weighted mean loss in nats; 0 for a unit without labels.
        finite: bool [U]; a unit that is not finite added exactly zero.
    """

    total: torch.Tensor
    norms: torch.Tensor
    losses: torch.Tensor
    finite: torch.Tensor


def clip_factors(norms: torch.Tensor, clip_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [U] that bring updates of these norms [U] to at most clip_norm, and which are finite, bool [U].

    The factor is min(1, clip_norm / (norm · (1 + CLIP_MARGIN))), rounded so that factor · norm ≤ clip_norm, and 0
    where the norm is not finite.
    """
    finite = norms <= LARGEST_NORM  # False for nan
    safe = torch.where(finite, norms, torch.ones_like(norms)).double()
    factors = (clip_norm / (safe * (1 + CLIP_MARGIN))).clamp(max=1.0)
    return torch.where(finite, factors, torch.zeros_like(factors)), finite


def rounded_down(factors: torch.Tensor, bits: int) -> torch.Tensor:
    """Factors of at most `bits` significant bits, none above what was given and each less than 2^(1 - bits) below."""
    mantissa, exponent = torch.frexp(factors)
    return torch.ldexp(torch.floor(mantissa * 2**bits) / 2**bits, exponent)


def inverse_scales(layout: ParameterLayout, scales: Mapping[str, float] | None) -> dict[str, float]:
    """1/s for each parameter; 1 where no scale is given.

    Raises:
        InvalidInput: A scale for an unknown parameter, or one that is not a finite number above 0.
    """
    for name, scale in (scales or {}).items():
        if name not in layout.names:
            raise InvalidInput("scales", name, "named after trainable parameters of the model")
        if not (math.isfinite(scale) and scale > 0):
            raise InvalidInput(f"scales[{name!r}]", scale, "a finite number above 0")
    return {name: 1.0 / (scales or {}).get(name, 1.0) for name in layout.names}


def check_clip(clip_norm: float, norm_order: int) -> None:
    """Refuse a clip that is none.

    Raises:
        InvalidInput: clip_norm is not a finite number above 0, or norm_order is neither 1 nor 2.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise InvalidInput("clip_norm", clip_norm, "a finite number above 0")
    if norm_order not in (1, 2):
        raise InvalidInput("norm_order", norm_order, "1 or 2")


def flat_norm(views: Mapping[str, torch.Tensor], inverse: Mapping[str, float], norm_order: int) -> torch.Tensor:
    """The norm of an update given by parameter, each divided by its scale; accumulated in float64."""
    parts = [
        torch.linalg.vector_norm(view, norm_order, dtype=torch.float64) * inverse[name] for name, view in views.items()
    ]
    return torch.linalg.vector_norm(torch.stack(parts), norm_order)
