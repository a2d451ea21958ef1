"""What one forward and backward pass leaves for the clipped sum: each layer's inputs and output gradients."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.model import wide_dtype
from fedsim.gradients.per_unit.group_gradients import GroupGradients
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.units import Group, RowOrder


class RowsMixedError(RuntimeError):
    """A layer's tensors cannot be split by row, so one pass cannot tell units apart."""


Forms = dict[str, set[tuple[str, ...]]]
"""For each layer by name, how the arguments of its calls held the rows."""


class Tape:
    """Per-unit gradients of a micro-batch, as they come out of the backward pass.

    Args:
        groups: The micro-batch's units.
        parameters: Those whose gradients are summed.
        allowed: In which forms each layer may be called, as `forms` of a pass that was compared with plain autograd;
            None for any.

    Attributes:
        groups: As given.
        rows: Rows of the micro-batch.
        gradients: For each group, UnitGradients by parameter (its identity: tied layers meet here).
        forms: In which forms each layer was called: how its arguments hold the rows.
        order: Follows vectors without an axis of rows; None where no layer may be called with such.
    """

    def __init__(
        self, groups: list[Group], parameters: Iterable[torch.nn.Parameter], allowed: Forms | None = None
    ) -> None:
        self._wanted = {id(parameter) for parameter in parameters}
        self.groups = groups
        self.rows = groups[-1].rows.stop
        self.gradients: list[dict[int, UnitGradients]] = [{} for _ in groups]
        self.forms: Forms = {}
        self._allowed = allowed
        self._together = sum(group.size for group in groups) > 1  # a unit by itself has nobody to be mixed with
        vectors = allowed is None or any("vectors" in form for forms in allowed.values() for form in forms)
        self.order = RowOrder(self.rows) if self._together and vectors else None

    def called(self, name: str, arguments: tuple[torch.Tensor, ...]) -> None:
        """Note how a layer is called.

        Raises:
            RowsMixedError: Not so in the pass that was compared, which then tells nothing of it; or with vectors of
                which nobody knows whose they are.
        """
        if not self._together:
            return
        form = tuple(self._held_by(name, place, argument) for place, argument in enumerate(arguments))
        if self._allowed is not None and form not in self._allowed.get(name, ()):
            raise RowsMixedError(f"{name} is called in a way in which it was not when the model was tried")
        self.forms.setdefault(name, set()).add(form)

    def _held_by(self, name: str, place: int, argument: torch.Tensor) -> str:
        """How an argument holds the rows: "rows" first, "vectors" of one row after the other, or not at all."""
        if argument.ndim >= (3 if argument.is_floating_point() else 2):
            return "rows" if len(argument) == self.rows else "whole"
        if self.order is not None and argument.ndim == 2 and self.order.known(argument):
            return "vectors"
        if place == 0 or (argument.ndim and len(argument) == self.rows):
            raise RowsMixedError(f"{name} is called with {tuple(argument.shape)} vectors of unknown rows")
        return "whole"

    def wants(self, parameter: torch.nn.Parameter | None) -> bool:
        """Whether the parameter is one of those whose gradients are summed."""
        return id(parameter) in self._wanted

    def at(self, group: int, parameter: torch.nn.Parameter) -> UnitGradients:
        """Where a parameter's gradients for a group are collected."""
        return self.gradients[group].setdefault(id(parameter), UnitGradients(parameter.shape))

    def finished(self, parameters: dict[str, torch.nn.Parameter], clip: ModelClip) -> list[GroupGradients]:
        """The gradients of each group, once the backward pass is over, with the parameters' names."""
        return [
            GroupGradients(group, {name: met[id(p)] for name, p in parameters.items() if id(p) in met}, clip)
            for group, met in zip(self.groups, self.gradients, strict=True)
        ]

    def by_row(self, tensor: torch.Tensor, trailing: int = 1) -> torch.Tensor:
        """A layer's tensor as [rows, n, …], the last `trailing` axes kept.

        Raises:
            RowsMixedError: Its first axis is neither the rows nor the rows' tokens.
        """
        if len(tensor) % self.rows or (len(tensor) != self.rows and tensor.ndim != 1 + trailing):
            raise RowsMixedError(f"a tensor of shape {tuple(tensor.shape)} for {self.rows} rows")
        return tensor.reshape(self.rows, -1, *tensor.shape[tensor.ndim - trailing :])

    def outer(self, parameter: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """The parameter's gradient is left^T right, summed over tokens; left [rows, n, p], right [rows, n, q]."""
        if not self.wants(parameter):
            return
        for number, group in enumerate(self.groups):
            self.at(number, parameter).add_outer(group.by_unit(left), group.by_unit(right))

    def lookup(self, parameter: torch.nn.Parameter, index: torch.Tensor, gradient: torch.Tensor) -> None:
        """The parameter's gradient is gradient [rows, n, q] added at index [rows, n]."""
        if not self.wants(parameter):
            return
        for number, group in enumerate(self.groups):
            self.at(number, parameter).add_lookup(group.by_unit(index), group.by_unit(gradient))

    def summed(self, parameter: torch.nn.Parameter | None, gradient: torch.Tensor) -> None:
        """The parameter's gradient is the sum over tokens of gradient [rows, n, *shape]."""
        if parameter is None or not self.wants(parameter):
            return
        wide = wide_dtype(gradient.dtype)
        for number, group in enumerate(self.groups):
            self.at(number, parameter).add_held(group.by_unit(gradient).sum(1, dtype=wide))

    def summed_rows(self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> None:
        """The same of vectors' gradients [rows, size] that are added up over tokens already; all in one go."""
        if not parameters:
            return
        together = torch.cat(gradients, 1)
        for number, group in enumerate(self.groups):
            each = group.by_unit(together[:, None]).sum(1) if group.rows_per_unit > 1 else together[group.rows]
            parts = torch.split(each, [gradient.shape[1] for gradient in gradients], 1)
            for parameter, part in zip(parameters, parts, strict=True):
                self.at(number, parameter).add_held(part)


Record = Callable[[Tape, Any, tuple[torch.Tensor, ...], torch.Tensor], None]
"""A layer's rule: from its inputs and its output's gradient to terms of its parameters' gradients."""


@contextmanager
def recording(tape: Tape, layers: dict[torch.nn.Module, tuple[str, Record]]) -> Iterator[None]:
    """Within it, a forward pass through the layers, given with names, and its backward pass write to the tape.

    The model's parameters must not require gradients meanwhile: what autograd would do for them is done here.
    """
    # Makes every recorded output require a gradient, wherever the first trainable layer is.
    anchor = torch.zeros((), requires_grad=True)
    with ExitStack() as stack:
        for module, (name, record) in layers.items():
            handle = module.register_forward_hook(_hook(tape, name, record, anchor), with_kwargs=True)
            stack.callback(handle.remove)
        if tape.order is not None:
            stack.enter_context(tape.order)
        yield


def _hook(tape: Tape, name: str, record: Record, anchor: torch.Tensor) -> Callable[..., object]:
    def hook(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any], output: object) -> object:
        if not torch.is_grad_enabled():
            return None
        if not isinstance(output, torch.Tensor) or not all(isinstance(a, torch.Tensor) for a in args) or kwargs:
            raise RowsMixedError(f"{type(module).__name__} takes or returns something other than tensors")
        tape.called(name, args)  # type: ignore[arg-type]
        if isinstance(module, torch.nn.Embedding) and len(output) == 1 < tape.rows:
            # Positions looked up once for all rows: looked up for each row instead, so that rows stay apart.
            output = output.expand(tape.rows, *output.shape[1:])
        recorded = _recorded(output, anchor, tape, record, module, *args)
        if tape.order is not None and recorded.ndim == 2 and not len(recorded) % tape.rows:
            tape.order.mark(recorded)  # in the order of the arguments, which are known by now
        return recorded

    return hook


class _Recorded(torch.autograd.Function):
    """The identity; its backward pass writes to the tape.

    Inputs are saved through autograd, which refuses them if they were overwritten in place, recomputes them under
    activation checkpointing and frees them with the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        anchor: torch.Tensor,
        tape: Tape,
        record: Record,
        module: torch.nn.Module,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.tape, ctx.record, ctx.module = tape, record, module
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors  # checkpointing allows reading them once
        ctx.record(ctx.tape, ctx.module, tuple(saved.detach() for saved in inputs), gradient)
        return gradient, None, None, None, None, *(None for _ in inputs)


_recorded: Callable[..., torch.Tensor] = _Recorded.apply
"""torch leaves the call untyped."""
