"""The clip of a model's updates, and what a clipped sum reports."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedsim.clip import CLIP_MARGIN, Clip
from fedsim.gradients.model import ParameterLayout

LARGEST_NORM = 1e18
"""A unit whose norm, as in ClippedSum.norms, exceeds this counts as not finite: its square would overflow float32."""

SMALLEST_LIMIT = 1e-8
"""Norms are added up in float32 only for a clip to no less than this: what squares of gradients lose to underflow
(2⁻¹²⁶ a term) does not count then. What Gram matrices lose, of which the other factor may make much, is in a norm's
spread (`products.gram_inner`)."""


@dataclass(frozen=True, kw_only=True)
class ClippedSum:
    """The sum of clipped updates and what each unit was like before the clip.

    `total` is what a mechanism adds noise to. The rest is private: it must not leave the server without noise.

    Attributes:
        total: [P] in the order of the ParameterLayout, on the model's device; float32 (float64 where the model's
            parameters are float64).
        norms: [U], each unit's norm before the clip (of Δ⊘s where scales are given); with blocks, clip.norm times the
            largest ratio of a block's norm to its limit. A unit was clipped if and only if this exceeds clip.norm.
            nan, inf or above LARGEST_NORM where the unit is not finite.
        losses: [U], each unit's weighted mean loss in nats; 0 for a unit without labels.
        finite: bool [U]; a unit that is not finite added exactly zero.
    """

    total: torch.Tensor
    norms: torch.Tensor
    losses: torch.Tensor
    finite: torch.Tensor


class ModelClip:
    """A clip of updates of one model: what each of its parameters is divided by, and which are clipped together.

    Blocks are the clip's, in its order; without blocks there is one, of every parameter, which then costs nothing:
    no kernel is run that a single clip would not need.

    Args:
        clip: The clip.
        layout: The model's parameters.

    Attributes:
        clip, layout: As given.
        limits: The norm to which each block is clipped, [blocks].
        inverse: 1/s by parameter name.
        block: The index of its block by parameter name.

    Raises:
        InvalidInput: The clip is of other parameters.
    """

    def __init__(self, clip: Clip, layout: ParameterLayout) -> None:
        clip.require_parameters(layout.names)
        self.clip = clip
        self.layout = layout
        self.limits = clip.limits
        self.inverse = {name: 1.0 / clip.scales.get(name, 1.0) for name in layout.names}
        self.block = dict(zip(layout.names, clip.block_of(layout.names), strict=True))

    def block_norms(self, views: Mapping[str, torch.Tensor], device: torch.device | None = None) -> torch.Tensor:
        """The norm of each block of an update given by parameter, divided by the scales: float64 [blocks].

        Powers are added up in float64.

        Args:
            views: The update, a tensor for each parameter.
            device: Where each is looked at, one after the other; by default where it is.
        """
        order = self.clip.order
        parts: list[list[torch.Tensor]] = [[] for _ in self.limits]
        for name, view in views.items():
            view = view if device is None else view.to(device)
            norm = torch.linalg.vector_norm(view, order, dtype=torch.float64) * self.inverse[name]
            parts[self.block[name]].append(norm)
        if len(parts) == 1:
            whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts[0]), order)
            return whole[None]
        nothing = torch.zeros_like(next(norm for norms in parts for norm in norms))
        return torch.stack([torch.linalg.vector_norm(torch.stack(norms or [nothing]), order) for norms in parts])

    def unit_norms(self, block_norms: torch.Tensor) -> torch.Tensor:
        """`ClippedSum.norms`, [U], of units whose blocks have these norms, [blocks, U]."""
        if not self.clip.blocks:
            return block_norms[0]
        ratios = block_norms.double() / self._limits(block_norms)
        return (self.clip.norm * ratios.amax(0)).to(block_norms.dtype)  # amax keeps a nan

    def factors(self, block_norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What brings each block to its limit, float64 [blocks, U], and which units are finite, bool [U].

        A factor is min(1, limit / (norm · (1 + CLIP_MARGIN))), rounded so that factor · norm ≤ limit. It is 0 in
        every block of a unit that is not finite in one.

        Args:
            block_norms: [blocks, U].
        """
        finite = is_finite(self.unit_norms(block_norms))
        safe = torch.where(finite, block_norms, torch.ones_like(block_norms)).double()
        factors = (self._limits(block_norms) / (safe * (1 + CLIP_MARGIN))).clamp(max=1.0)
        return torch.where(finite, factors, torch.zeros_like(factors)), finite

    def clip_(self, update: torch.Tensor) -> torch.Tensor:
        """Clip an update [P] in place, to exactly zero if it is not finite.

        Returns:
            Its norm before, as in `ClippedSum.norms`: a scalar, float64.
        """
        views = self.layout.views(update)
        norms = self.block_norms(views)[:, None]
        factors, finite = self.factors(norms)
        if not finite:
            update.zero_()
        elif len(factors) == 1:
            update *= factors[0, 0]
        else:
            for name, view in views.items():
                view *= factors[self.block[name], 0]
        return self.unit_norms(norms)[0]

    def clip_views_(self, views: Mapping[str, torch.Tensor], device: torch.device) -> float:
        """The same as `clip_` of an update that lies on the host, a tensor for each parameter.

        Args:
            views: In the order of the layout.
            device: Where norms are computed, one parameter after the other.
        """
        norms = self.block_norms(views, device)[:, None]
        factors, finite = (found.cpu() for found in self.factors(norms))
        for name, view in views.items():
            if finite:
                view *= factors[self.block[name], 0]
            else:
                view.zero_()
        return float(self.unit_norms(norms)[0])

    def _limits(self, like: torch.Tensor) -> torch.Tensor | float:
        """The limits as what [blocks, U] can be divided by."""
        if len(self.limits) == 1:
            return self.limits[0]
        return torch.tensor(self.limits, dtype=torch.float64, device=like.device)[:, None]


def is_finite(norms: torch.Tensor) -> torch.Tensor:
    """Which units of these norms, as in `ClippedSum.norms`, count as finite: bool of the same shape."""
    return norms <= LARGEST_NORM  # False for nan


def rounded_down(factors: torch.Tensor, bits: int) -> torch.Tensor:
    """Factors of at most `bits` significant bits, none above what was given and each less than 2^(1 - bits) below."""
    mantissa, exponent = torch.frexp(factors)
    return torch.ldexp(torch.floor(mantissa * 2**bits) / 2**bits, exponent)
