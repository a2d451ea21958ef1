"""The fast path: one forward and one backward pass for the units of a micro-batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.gradients.clipping import CLIP_MARGIN, ClippedSum, ModelClip, is_finite, rounded_down
from fedsim.gradients.compiled.graphs import CompiledPass
from fedsim.gradients.head import fused_loss, head_loss, plain_head
from fedsim.gradients.layers import rule_for
from fedsim.gradients.model import (
    ParameterLayout,
    accumulation_dtype,
    autocasting,
    device_of,
    keeps_half,
    on_device,
    pad_token_of,
    trainable_parameters,
)
from fedsim.gradients.objective import Batch, CausalLanguageModel, Objective, RowLosses
from fedsim.gradients.per_unit.group_gradients import GroupGradients
from fedsim.gradients.per_unit.unit_gradients import FACTOR_BITS
from fedsim.gradients.reference import unit_gradient
from fedsim.gradients.tape import Forms, Record, Tape, recording
from fedsim.gradients.units import Units, groups_of, measured_pass, pack_units
from fedsim.rows import TokenRows


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward and backward pass left of its u units.

    Attributes:
        units: Which they are, int64 [u], as ordered in the pass.
        groups: Their gradients.
        losses: [u].
        norms: [blocks, u], before the clip.
        unsure: bool [blocks, u], where a norm needs to be computed another way.
    """

    units: np.ndarray
    groups: list[GroupGradients]
    losses: torch.Tensor
    norms: torch.Tensor
    unsure: torch.Tensor


class FastSum:
    """A clipped sum under way.

    Args:
        model, rows, units, objective: As for `clipped_sum`.
        clip: As for `clipped_sum`, of L2 norms.
        budget: Tokens of a micro-batch.
        autocast: bfloat16 or None.

    Attributes:
        allowed: In which forms layers may be called, as of `Tape`; None for any.
        forms: In which forms they were.
        compiled: What does the forward and backward passes; None for the model itself.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: TokenRows,
        units: Units,
        objective: Objective,
        clip: Clip,
        budget: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.rows, self.units, self.objective = model, rows, units, objective
        self.budget, self.autocast = budget, autocast
        self.parameters = trainable_parameters(model)
        self.layout = ParameterLayout.of_parameters(self.parameters)
        self.clip = ModelClip(clip, self.layout)
        self.device = device_of(self.parameters.values())
        self.head = plain_head(model) if type(objective) is CausalLanguageModel else None
        self.paths: dict[str, set[str]] = {}
        self.allowed: Forms | None = None
        self.forms: Forms = {}
        self.compiled: CompiledPass | None = None
        dtype = accumulation_dtype(self.parameters.values())
        self.layers = self._layers()
        self.total = torch.zeros(self.layout.size, dtype=dtype, device=self.device)
        self.views = self.layout.views(self.total)
        self.norms = torch.zeros(len(units), dtype=dtype, device=self.device)
        self.losses = torch.zeros(len(units), dtype=dtype, device=self.device)

    def anew(self) -> "FastSum":
        """The same sum, empty, with layers called as is allowed here."""
        clip = self.clip.clip
        other = FastSum(self.model, self.rows, self.units, self.objective, clip, self.budget, self.autocast)
        other.allowed = self.allowed
        return other

    def result(self) -> ClippedSum:
        """The sum so far."""
        return ClippedSum(total=self.total, norms=self.norms, losses=self.losses, finite=is_finite(self.norms))

    def run(self) -> ClippedSum:
        """Every unit once: small ones together, a unit that fills a micro-batch by itself alone.

        Where the device runs out of memory the budget is halved and the units are packed anew.
        """
        together, alone = pack_units(self.units, self.budget)
        pending = together[::-1]
        while pending:
            units = pending.pop()
            pass_ = None
            try:
                with measured_pass(self.model, self.device, self.padded(units), self.autocast):
                    pass_ = self.passed(units)
            except torch.OutOfMemoryError:
                if len(units) == 1:
                    raise
            if pass_ is None:  # by now the error is gone, and with it what the pass had taken
                torch.cuda.empty_cache()
                self.budget //= 2
                pending += [units[len(units) // 2 :], units[: len(units) // 2]]
                continue
            self._add(pass_)
            del pass_  # else its activations would lie beside the next one's
        for unit in alone:
            self.add_alone(unit)
        return self.result()

    def padded(self, units: np.ndarray) -> int:
        """Tokens of a pass over the units, padding included."""
        rows = self.units.counts[units]
        longest = max(self.units.lengths[self.units.offsets[u] : self.units.offsets[u + 1]].max() for u in units)
        return int(rows.sum() * longest)

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
        self.norms[unit] = self.clip.clip_(update)
        self.losses[unit] = loss
        self.total += update

    def passed(self, units: np.ndarray) -> Pass:
        """Forward and backward pass and norms of units that share a micro-batch; their rows must fit it."""
        units = units[np.argsort(self.units.counts[units], kind="stable")]
        tape, row_losses, coefficients = self._backward(units)
        groups = tape.finished(self.parameters, self.clip)
        norms, doubtful = self._norms(groups, len(units))
        owner = on_device(np.repeat(np.arange(len(units)), self.units.counts[units]), self.device)
        weighted = coefficients * row_losses.loss_sum.detach().to(coefficients.dtype)
        losses = torch.zeros_like(norms[0]).index_add_(0, owner, weighted)
        return Pass(units=units, groups=groups, losses=losses, norms=norms, unsure=doubtful)

    def _add(self, pass_: Pass) -> None:
        """Clip what a pass left and add it up; a unit unsure in any block is done again, alone."""
        factors, finite = self.clip.factors(pass_.norms)
        if keeps_half(self.model, self.autocast):
            factors = rounded_down(factors, FACTOR_BITS)
        factors = factors.to(self.total.dtype)
        doubtful = pass_.unsure[0] if len(pass_.unsure) == 1 else pass_.unsure.any(0)
        left_out = doubtful | ~finite
        any_left_out = bool(left_out.any())
        for group in pass_.groups:
            if any_left_out:
                group.zero(left_out[group.units])
            group.add_weighted(self.views, factors[:, group.units])
        where = on_device(pass_.units, self.device)
        self.norms[where] = self.clip.unit_norms(pass_.norms)
        self.losses[where] = pass_.losses
        if any_left_out:
            for unit in pass_.units[doubtful.cpu().numpy()]:
                self.add_alone(int(unit))

    def _backward(self, units: np.ndarray) -> tuple[Tape, RowLosses, torch.Tensor]:
        """One pass over the rows of units; returns what it left, and the rows' losses and coefficients."""
        starts = self.units.offsets[units]
        positions = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts, self.units.counts[units], strict=True)]
        )
        batch = self.objective.collate(self.rows, self.units.rows[positions], self.device, pad_token_of(self.model))
        coefficients = on_device(self.units.coefficients[positions], self.device, self.total.dtype)
        tape = Tape(groups_of(self.units.counts[units]), self.parameters.values(), self.allowed)
        if self.compiled is not None and len(batch.input_ids) > 1:  # a single row's graph would be one of its own
            with frozen(list(self.parameters.values())):
                row_losses = self._compiled_backward(self.compiled, tape, batch, coefficients)
            return tape, row_losses, coefficients
        with frozen(list(self.parameters.values())), recording(tape, self.layers):
            with autocasting(self.device, self.autocast):
                if self.head is not None:
                    loss, row_losses = fused_loss(self.model, self.head, batch, coefficients, tape)
                else:
                    row_losses = self.objective.row_losses(self.model, batch)
                    loss = (coefficients * row_losses.loss_sum).sum()
            torch.autograd.backward(loss)
        self.forms = tape.forms
        return tape, row_losses, coefficients

    def _compiled_backward(
        self, compiled: CompiledPass, tape: Tape, batch: Batch, coefficients: torch.Tensor
    ) -> RowLosses:
        """The same by compiled graphs."""
        assert self.head is not None
        with autocasting(self.device, self.autocast):
            hidden, inputs, probes = compiled.hidden(batch)
            loss, row_losses = head_loss(hidden, self.head, batch, coefficients, tape)
        compiled.record(tape, inputs, torch.autograd.grad(loss, probes))
        self.forms = compiled.forms()
        return row_losses

    def _layers(self) -> dict[torch.nn.Module, tuple[str, Record]]:
        """Every module with trainable parameters of its own, its name and rule; the fused head records by itself."""
        wanted = {id(p) for p in self.parameters.values()}
        return {
            module: (name, rule_for(module)[1])
            for name, module in self.model.named_modules()
            if module is not self.head and any(id(p) in wanted for p in module._parameters.values())
        }

    def _norms(self, groups: list[GroupGradients], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The norms of the units' blocks, [blocks, number], and whether each needs to be computed another way."""
        squared = torch.zeros(len(self.clip.limits), number, dtype=torch.float64, device=self.device)
        spread = torch.zeros_like(squared)
        for group in groups:
            for block, (squares, spreads) in group.squared_norms().items():
                squared[block, group.units], spread[block, group.units] = squares, spreads
            for name, paths in group.paths.items():
                self.paths.setdefault(name, set()).update(paths)
        return squared.clamp(min=0).sqrt().to(self.norms.dtype), unsure(squared, spread, self.norms.dtype)


def unsure(squared: torch.Tensor, spread: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where tokens cancel so far that a norm may be off by more than CLIP_MARGIN / 2: bool, same shape.

    Rounding errors reach about eps · `spread` of the squared norm (see `gram_inner` and `UnitGradients.squared_norms`
    for what a spread is), of which we allow for 8 times.
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
