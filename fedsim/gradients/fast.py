"""The fast path: one forward and one backward pass for the units of a micro-batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fedsim.gradients.clipping import CLIP_MARGIN, ClippedSum, clip_factors, rounded_down
from fedsim.gradients.group_gradients import GroupGradients
from fedsim.gradients.groups import groups_of
from fedsim.gradients.head import fused_loss, plain_head
from fedsim.gradients.layers import rule_for
from fedsim.gradients.layout import ParameterLayout, trainable_parameters
from fedsim.gradients.objective import CausalLanguageModel, Objective, RowLosses
from fedsim.gradients.packing import pack_units, pad_token_of
from fedsim.gradients.precision import accumulation_dtype, autocasting, keeps_half, model_device
from fedsim.gradients.products import FACTOR_BITS
from fedsim.gradients.reference import clip_, unit_gradient
from fedsim.gradients.tape import Record, Tape, recording
from fedsim.gradients.units import Units
from fedsim.rows import TokenRows


class FastSum:
    """A clipped sum under way.

    Args:
        model, rows, units, objective: As for `clipped_sum`.
        clip_norm: C.
        inverse: 1/s by parameter name.
        budget: Tokens of a micro-batch.
        autocast: bfloat16 or None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: TokenRows,
        units: Units,
        objective: Objective,
        clip_norm: float,
        inverse: dict[str, float],
        budget: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.rows, self.units, self.objective = model, rows, units, objective
        self.clip_norm, self.inverse, self.budget, self.autocast = clip_norm, inverse, budget, autocast
        self.layout = ParameterLayout.of(model)
        self.parameters = trainable_parameters(model)
        self.device = model_device(model)
        self.head = plain_head(model) if type(objective) is CausalLanguageModel else None
        self.paths: dict[str, set[str]] = {}
        dtype = accumulation_dtype(model)
        self.layers = self._layers()
        self.total = torch.zeros(self.layout.size, dtype=dtype, device=self.device)
        self.views = self.layout.views(self.total)
        self.norms = torch.zeros(len(units), dtype=dtype, device=self.device)
        self.losses = torch.zeros(len(units), dtype=dtype, device=self.device)

    def result(self) -> ClippedSum:
        """The sum so far."""
        return ClippedSum(
            total=self.total, norms=self.norms, losses=self.losses, finite=clip_factors(self.norms, self.clip_norm)[1]
        )

    def run(self) -> ClippedSum:
        """Every unit once: small ones together, a unit that fills a micro-batch by itself alone.

        Where the device runs out of memory the budget is halved and the units are packed anew.
        """
        together, alone = pack_units(self.units, self.budget)
        pending = together[::-1]
        while pending:
            units = pending.pop()
            try:
                pass_ = self._pass(units)
            except torch.OutOfMemoryError:
                if len(units) == 1:
                    raise
                torch.cuda.empty_cache()
                self.budget //= 2
                pending += [units[len(units) // 2 :], units[: len(units) // 2]]
                continue
            self._add(*pass_)
        for unit in alone:
            self.add_alone(unit)
        return self.result()

    def kinds(self) -> dict[str, str]:
        """The kind of rule of each layer with trainable parameters, by the layer's name."""
        return {
            name: "fused with the loss" if module is self.head else rule_for(module)[0]
            for name, module in self.model.named_modules()
            if module is self.head or module in self.layers
        }

    def add_alone(self, unit: int) -> None:
        """A unit whose micro-batches hold no other: plain autograd, then the clip."""
        update, loss = unit_gradient(
            self.model, self.rows, self.units, unit, self.objective, self.layout, self.budget, self.autocast, self.head
        )
        self.norms[unit] = clip_(update, self.layout, self.clip_norm, self.inverse, 2)
        self.losses[unit] = loss
        self.total += update

    def add_together(self, units: np.ndarray) -> None:
        """Units that share a micro-batch; their rows must fit it."""
        self._add(*self._pass(units))

    def _pass(
        self, units: np.ndarray
    ) -> tuple[np.ndarray, list[GroupGradients], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Forward and backward pass and norms: units as ordered, what they left, losses, norms, which are unsure."""
        units = units[np.argsort(self.units.counts[units], kind="stable")]
        tape, row_losses, coefficients = self._backward(units)
        groups = tape.finished(self.parameters)
        norms, doubtful = self._norms(groups, len(units))
        owner = torch.as_tensor(np.repeat(np.arange(len(units)), self.units.counts[units]), device=self.device)
        weighted = coefficients * row_losses.loss_sum.detach().to(coefficients.dtype)
        losses = torch.zeros_like(norms).index_add_(0, owner, weighted)
        return units, groups, losses, norms, doubtful

    def _add(
        self,
        units: np.ndarray,
        groups: list[GroupGradients],
        losses: torch.Tensor,
        norms: torch.Tensor,
        doubtful: torch.Tensor,
    ) -> None:
        """Clip what a pass left and add it up; doubtful units are done again, alone."""
        factors, finite = clip_factors(norms, self.clip_norm)
        if keeps_half(self.model, self.autocast):
            factors = rounded_down(factors, FACTOR_BITS)
        factors = factors.to(self.total.dtype)
        left_out = doubtful | ~finite
        any_left_out = bool(left_out.any())
        for group in groups:
            if any_left_out:
                group.zero(left_out[group.units])
            group.add_weighted(self.views, factors[group.units])
        where = torch.as_tensor(units, device=self.device)
        self.norms[where] = norms
        self.losses[where] = losses
        if any_left_out:
            for unit in units[doubtful.cpu().numpy()]:
                self.add_alone(int(unit))

    def _backward(self, units: np.ndarray) -> tuple[Tape, RowLosses, torch.Tensor]:
        """One pass over the rows of units; returns what it left, and the rows' losses and coefficients."""
        starts = self.units.offsets[units]
        positions = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts, self.units.counts[units], strict=True)]
        )
        batch = self.objective.collate(self.rows, self.units.rows[positions], self.device, pad_token_of(self.model))
        coefficients = torch.as_tensor(self.units.coefficients[positions], dtype=self.total.dtype, device=self.device)
        tape = Tape(groups_of(self.units.counts[units]), self.parameters.values())
        with frozen(list(self.parameters.values())), recording(tape, self.layers):
            with autocasting(self.device, self.autocast):
                if self.head is not None:
                    loss, row_losses = fused_loss(self.model, self.head, batch, coefficients, tape)
                else:
                    row_losses = self.objective.row_losses(self.model, batch)
                    loss = (coefficients * row_losses.loss_sum).sum()
            loss.backward()
        return tape, row_losses, coefficients

    def _layers(self) -> dict[torch.nn.Module, Record]:
        """Every module with trainable parameters of its own, and its rule; the fused head records by itself."""
        wanted = {id(p) for p in self.parameters.values()}
        return {
            module: rule_for(module)[1]
            for module in self.model.modules()
            if module is not self.head and any(id(p) in wanted for p in module.parameters(recurse=False))
        }

    def _norms(self, groups: list[GroupGradients], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The units' norms, [number], and whether each needs to be computed another way."""
        squared = torch.zeros(number, dtype=torch.float64, device=self.device)
        spread = torch.zeros_like(squared)
        for group in groups:
            squared[group.units], spread[group.units] = group.squared_norms(self.inverse)
            for name, paths in group.paths.items():
                self.paths.setdefault(name, set()).update(paths)
        return squared.clamp(min=0).sqrt().to(self.norms.dtype), unsure(squared, spread, self.norms.dtype)


def unsure(squared: torch.Tensor, spread: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where tokens cancel so far that the Gram form's norm may be off by more than CLIP_MARGIN / 2, bool [U].

    Each entry of a Gram product carries a rounding error of about eps times the product of the lengths; these
    errors are independent, so their sum is about eps · Σ_t |a_t|²|b_t|² (`spread`), of which we allow for 8 times.
    """
    return 8 * torch.finfo(dtype).eps * spread > CLIP_MARGIN / 2 * squared


@contextmanager
def frozen(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within it autograd computes no gradients for these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
