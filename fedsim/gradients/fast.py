"""The fast path: one forward and one backward pass for the units of a micro-batch."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.gradients.clipping import SMALLEST_LIMIT, ClippedSum, ModelClip, is_finite, rounded_down
from fedsim.gradients.compiled.graphs import CompiledPass
from fedsim.gradients.head import fused_loss, head_loss, plain_head
from fedsim.gradients.hooks import LayerHooks
from fedsim.gradients.layers import layer_kinds, rule_for, trained_layers
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
from fedsim.gradients.objective import Batch, CausalLanguageModel, Objective, RowLosses, token_losses
from fedsim.gradients.per_unit.outer_products import FACTOR_BITS
from fedsim.gradients.per_unit.pass_gradients import PassGradients
from fedsim.gradients.per_unit.products import unsure
from fedsim.gradients.rows.attention import Configured, attention_configs, packed_attention
from fedsim.gradients.rows.packed import packed_batch
from fedsim.gradients.rows.segments import Segments
from fedsim.gradients.rules.adapters import own_parameters
from fedsim.gradients.tape import Forms, Record, Tape
from fedsim.gradients.trial.settings import settings_of
from fedsim.gradients.units import Units, measured_pass, pack_units, split_rows
from fedsim.rows import TokenRows


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward and backward pass left of its u units.

    Attributes:
        units: Which they are, int64 [u], as ordered in the pass.
        gradients: Theirs.
        losses: [u].
        norms: [blocks, u], before the clip.
        unsure: bool [blocks, u], where a norm needs to be computed another way.
    """

    units: np.ndarray
    gradients: PassGradients
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
        packable: Whether a trial may find that rows may be packed; a compiled pass takes padded ones.
        packed: Whether a micro-batch's rows lie end to end, without padding; at first they do not.
        settings: What the model was when the sum was asked for.
        half: Whether activations may be kept in bfloat16 or float16.
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
        self.parameters = self._trained()
        self.layout = ParameterLayout.of_parameters(self.parameters)
        self.clip = ModelClip(clip, self.layout)
        self.device = device_of(self.parameters.values())
        self.half, self.settings = keeps_half(model, autocast), settings_of(model)
        self.head = self._found_head()
        self._of_head = [] if self.head is None else [p for p in self._owned(self.head) if p.requires_grad]
        self._hooks: LayerHooks | None = None
        self.paths: dict[str, set[str]] = {}
        self.packable, self.packed = True, False
        self.allowed: Forms | None = None
        self.forms: Forms = {}
        self.compiled: CompiledPass | None = None
        self.dtype = accumulation_dtype(self.parameters.values())
        self.layers = self._layers()
        self.norms = torch.zeros(len(units), dtype=self.dtype, device=self.device)
        self.losses = torch.zeros(len(units), dtype=self.dtype, device=self.device)

    @cached_property
    def total(self) -> torch.Tensor:
        """The sum so far, [P]."""
        return torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)

    @cached_property
    def views(self) -> dict[str, torch.Tensor]:
        """The same by parameter."""
        return self.layout.views(self.total)

    def anew(self) -> "FastSum":
        """The same sum, empty, with layers called as is allowed here."""
        clip = self.clip.clip
        other = FastSum(self.model, self.rows, self.units, self.objective, clip, self.budget, self.autocast)
        other.packable, other.packed, other.allowed = self.packable, self.packed, self.allowed
        return other

    def result(self) -> ClippedSum:
        """The sum so far."""
        return ClippedSum(total=self.total, norms=self.norms, losses=self.losses, finite=is_finite(self.norms))

    def run(self) -> ClippedSum:
        """Every unit once: small ones together, a unit that fills a micro-batch by itself alone.

        Where the device runs out of memory the budget is halved and the units are packed anew.
        """
        with self._hooked() if self.compiled is None else nullcontext():
            return self._run()

    def _run(self) -> ClippedSum:
        together, alone = pack_units(self.units, self.budget, self.packed)
        pending = together[::-1]
        while pending:
            units = pending.pop()
            pass_ = None
            try:
                with measured_pass(self.model, self.device, self.tokens(units), self.autocast):
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

    def tokens(self, units: np.ndarray) -> int:
        """Tokens of a pass over the units, padding included."""
        if self.packed:
            return int(self.units.tokens[units].sum())
        lengths = self.units.lengths[self.units.positions(units)]
        return int(len(lengths) * lengths.max())

    @cached_property
    def attention(self) -> Configured:
        """Where the model's parts look up what attention to use."""
        return attention_configs(self.model)

    @contextmanager
    def _hooked(self) -> Iterator[LayerHooks]:
        """Within it the layers have their hooks, the same for all passes."""
        if self._hooks is not None:
            yield self._hooks
            return
        own = [p for p in self.parameters.values() if not any(p is of_head for of_head in self._of_head)]
        with LayerHooks(own, self.layers, self._owned) as self._hooks:
            try:
                yield self._hooks
            finally:
                self._hooks = None

    @cached_property
    def unreached(self) -> list[torch.nn.Parameter]:
        """Parameters of layers that no allowed form calls, so that the trial saw no use of them."""
        if self.allowed is None:
            return []
        called = [module for module, (name, _) in self.layers.items() if name in self.allowed]
        called += [] if self.head is None else [self.head]
        reached = {id(parameter) for module in called for parameter in own_parameters(module)}
        return [parameter for parameter in self.parameters.values() if id(parameter) not in reached]

    def kinds(self) -> dict[str, str]:
        """The kind of rule of each layer with trainable parameters, by the layer's name."""
        return layer_kinds(self.model, self.head)

    def add_alone(self, unit: int) -> None:
        """A unit whose micro-batches hold no other: plain autograd, then the clip."""
        update, loss = self._alone(unit)
        self.norms[unit] = self.clip.clip_(update)
        self.losses[unit] = loss
        self.total += update

    def passed(self, units: np.ndarray) -> Pass:
        """Forward and backward pass and norms of units that share a micro-batch; their rows must fit it."""
        size = self.units.tokens if self.packed else self.units.counts
        units = units[np.argsort(size[units], kind="stable")]
        tape, row_losses, coefficients = self._backward(units)
        gradients = tape.finished(self.parameters, self.clip)
        norms, doubtful = self._norms(gradients)
        weighted = coefficients * row_losses.loss_sum.detach().to(coefficients.dtype)
        losses = tape.segments.sums(weighted[:, None])[:, 0]
        return Pass(units=units, gradients=gradients, losses=losses, norms=norms, unsure=doubtful)

    def _add(self, pass_: Pass) -> None:
        """Clip what a pass left and add it up; a unit unsure in any block is done again, alone."""
        factors, again = self._weights(pass_)
        pass_.gradients.add_weighted(self.views, factors)
        for unit in again:
            self.add_alone(unit)

    def _weights(self, pass_: Pass) -> tuple[torch.Tensor, list[int]]:
        """What a pass's units are added up with, [blocks, u], and which of them have to be done again, alone.

        These, and those that are not finite, are made exactly zero; norms and losses of all are noted.
        """
        factors, finite = self.clip.factors(pass_.norms)
        if self.half:
            factors = rounded_down(factors, FACTOR_BITS)
        doubtful = pass_.unsure[0] if len(pass_.unsure) == 1 else pass_.unsure.any(0)
        left_out = doubtful | ~finite
        any_left_out = bool(left_out.any())
        if any_left_out:
            pass_.gradients.zero(left_out)
        where = on_device(pass_.units, self.device)
        self.norms[where] = self.clip.unit_norms(pass_.norms)
        self.losses[where] = pass_.losses
        again = pass_.units[doubtful.cpu().numpy()].tolist() if any_left_out else []
        return factors.to(self.dtype), again

    def _batch(self, positions: np.ndarray) -> tuple[Batch, torch.Tensor, AbstractContextManager[None]]:
        """Rows as a micro-batch, a coefficient for each row or packed token, and what the pass runs within."""
        indices, pad = self.units.rows[positions], pad_token_of(self.model)
        coefficients = self.units.coefficients[positions]
        if self.packed:
            batch, packed = packed_batch(self.rows, indices, self.device, pad, self.units.whole)
            lengths, each = self.units.packed_lengths[positions], np.zeros(packed.tokens)
            each[: lengths.sum()] = np.repeat(coefficients, lengths)
            each_on_device = on_device(each, self.device, self.dtype)
            return batch, each_on_device, packed_attention(self.attention, packed)
        batch = self.objective.collate(self.rows, indices, self.device, pad)
        return batch, on_device(coefficients, self.device, self.dtype), nullcontext()

    def _loss(
        self, batch: Batch, coefficients: torch.Tensor, tape: Tape | None = None
    ) -> tuple[torch.Tensor, RowLosses]:
        """Σ coefficient · loss of a micro-batch, and the losses, of packed rows' tokens each by itself."""
        with autocasting(self.device, self.autocast):
            if self.head is not None:
                return fused_loss(self.model, self.head, batch, coefficients, tape)
            losses = (token_losses if self.packed else self.objective.row_losses)(self.model, batch)
            return (coefficients * losses.loss_sum).sum(), losses

    def _backward(self, units: np.ndarray) -> tuple[Tape, RowLosses, torch.Tensor]:
        """One pass over the rows of units: what it left, and the losses and coefficients of the tape's rows."""
        batch, coefficients, within = self._batch(self.units.positions(units))
        each = self.units.tokens if self.packed else self.units.counts
        segments = Segments(each[units], self.device)
        tape = Tape(segments, len(coefficients), self.parameters.values(), self.allowed, self.packed)
        if self.compiled is not None and len(batch.input_ids) > 1:  # a single row's graph would be one of its own
            with frozen(list(self.parameters.values())):
                row_losses = self._compiled_backward(self.compiled, tape, batch, coefficients)
            return tape, row_losses, coefficients
        with frozen(self._of_head), self._hooked() as hooks, hooks.recording(tape), within:
            loss, row_losses = self._loss(batch, coefficients, tape)
            torch.autograd.backward(loss)
        self.forms = tape.forms
        return tape, row_losses, coefficients

    def _compiled_backward(
        self, compiled: CompiledPass, tape: Tape, batch: Batch, coefficients: torch.Tensor
    ) -> RowLosses:
        """The same by compiled graphs, of padded rows."""
        assert self.head is not None
        assert not self.packed
        with autocasting(self.device, self.autocast):
            hidden, inputs, probes = compiled.hidden(batch)
            loss, row_losses = head_loss(hidden, self.head, batch, coefficients, tape)
        compiled.record(tape, inputs, torch.autograd.grad(loss, probes))
        self.forms = compiled.forms()
        return row_losses

    def _alone(self, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A unit's gradient, [P] flat, and its loss, as of `unit_gradient`, without padding where rows are packed."""
        gradient, loss = torch.zeros_like(self.total), self.losses.new_zeros(())
        for part in split_rows(self.units, unit, self.budget, self.packed):
            batch, coefficients, within = self._batch(part)
            with within:
                part_loss, _ = self._loss(batch, coefficients)
                pieces = torch.autograd.grad(part_loss, list(self.parameters.values()), allow_unused=True)
            for view, piece in zip(self.layout.views(gradient).values(), pieces, strict=True):
                if piece is not None:
                    view += piece
            loss += part_loss.detach()
        return gradient, loss

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the sum is of, by name."""
        return trainable_parameters(self.model)

    def _owned(self, module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
        """A layer's own parameters."""
        return own_parameters(module)

    def _found_head(self) -> torch.nn.Linear | None:
        """The last layer, where it is computed together with the loss."""
        return plain_head(self.model, self.settings) if type(self.objective) is CausalLanguageModel else None

    def _layers(self) -> dict[torch.nn.Module, tuple[str, Record]]:
        """Every module with trainable parameters of its own, its name and rule; the fused head records by itself."""
        trained = trained_layers(self.model)
        return {module: (name, rule_for(module)[1]) for name, module in trained if module is not self.head}

    def _norms(self, gradients: PassGradients) -> tuple[torch.Tensor, torch.Tensor]:
        """The norms of the units' blocks, [blocks, u], and whether each needs to be computed another way."""
        squared, spread = gradients.squared_norms()
        for name, paths in gradients.paths.items():
            self.paths.setdefault(name, set()).update(paths)
        # Factors in half precision are added up in float32, whatever the parameters are.
        added_in = torch.float32 if self.half else self.norms.dtype
        least = min(*self.clip.limits, SMALLEST_LIMIT)
        return squared.clamp(min=0).sqrt().to(self.norms.dtype), unsure(squared, spread, added_in, least)


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
