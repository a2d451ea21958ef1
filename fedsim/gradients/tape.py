"""What one forward and backward pass leaves for the clipped sum: each layer's inputs and output gradients."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.per_unit.pass_gradients import PassGradients
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.order import RowOrder
from fedsim.gradients.rows.segments import Segments


class RowsMixedError(RuntimeError):
    """A layer's tensors cannot be split by row, so one pass cannot tell units apart."""


Forms = dict[str, set[tuple[str, ...]]]
"""For each layer by name, how the arguments of its calls held the rows."""


class Tape:
    """Per-unit gradients of a micro-batch, as they come out of the backward pass.

    A micro-batch is [rows, tokens] of padded rows, or one row [1, tokens] of rows laid end to end (packed). For the
    tape a packed token is what a padded row is: the least that belongs to one unit. Both are called rows here.

    Args:
        segments: The micro-batch's units, by how many rows each has.
        rows: Rows of the micro-batch, those that belong to no unit included.
        parameters: Those whose gradients are summed.
        allowed: In which forms each layer may be called, as `forms` of a pass that was compared with plain autograd;
            None for any.
        packed: Whether rows are tokens.

    Attributes:
        segments, rows, packed: As given.
        gradients: UnitGradients by parameter (its identity: tied layers meet here).
        forms: In which forms each layer was called: how its arguments hold the rows.
        order: Follows vectors without an axis of rows; None where no layer may be called with such.
    """

    def __init__(
        self,
        segments: Segments,
        rows: int,
        parameters: Iterable[torch.nn.Parameter],
        allowed: Forms | None = None,
        packed: bool = False,
    ) -> None:
        self._wanted = {id(parameter) for parameter in parameters}
        self.segments, self.rows, self.packed = segments, rows, packed
        self.gradients: dict[int, UnitGradients] = {}
        self.forms: Forms = {}
        self._allowed = allowed
        self._together = len(segments) > 1 or packed  # a unit by itself has nobody to be mixed with
        vectors = allowed is None or any("vectors" in form for forms in allowed.values() for form in forms)
        self.order = RowOrder(rows, packed) if self._together and vectors else None

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
        """How an argument holds the rows: first, "vectors" of one after the other, on another axis, or not at all."""
        if argument.ndim >= (3 if argument.is_floating_point() else 2):
            axes = self._axes(argument)
            if len(axes) > 1:
                raise RowsMixedError(f"{name} is called with {tuple(argument.shape)}, of which two axes may be tokens")
            return f"rows on axis {axes[0]}" if axes else "whole"
        if self.order is not None and argument.ndim == 2 and self.order.known(argument):
            return "vectors"
        if place == 0 or (argument.ndim and len(argument) == self.rows):
            raise RowsMixedError(f"{name} is called with {tuple(argument.shape)} vectors of unknown rows")
        return "whole"

    def _axes(self, tensor: torch.Tensor) -> list[int]:
        """Which axes of a tensor may hold the rows, of those where rows are looked for."""
        shape = tensor.shape
        if not self.packed:
            return [0] if shape[0] == self.rows else []
        if shape[0] != 1:
            return []
        # Heads may come before tokens or after; the last axis is that of features, but for indices.
        last = len(shape) - 1 if tensor.is_floating_point() else len(shape)
        return [axis for axis in range(1, min(3, last)) if shape[axis] == self.rows]

    def wants(self, parameter: torch.nn.Parameter | None) -> bool:
        """Whether the parameter is one of those whose gradients are summed."""
        return id(parameter) in self._wanted

    def at(self, parameter: torch.nn.Parameter) -> UnitGradients:
        """Where a parameter's gradients are collected."""
        found = self.gradients.get(id(parameter))
        if found is None:
            found = self.gradients[id(parameter)] = UnitGradients(parameter.shape, len(self.segments))
        return found

    def finished(self, parameters: dict[str, torch.nn.Parameter], clip: ModelClip) -> PassGradients:
        """The gradients, once the backward pass is over, with the parameters' names."""
        met = self.gradients
        named = {name: met[id(p)] for name, p in parameters.items() if id(p) in met}
        return PassGradients(named, clip, self.segments)

    def by_row(self, tensor: torch.Tensor, trailing: int = 1) -> torch.Tensor:
        """A layer's tensor as [rows, n, …], the last `trailing` axes kept.

        Raises:
            RowsMixedError: None of its axes is that of the rows, and it is not the rows' vectors.
        """
        kept = tensor.shape[tensor.ndim - trailing :]
        if tensor.ndim == 1 + trailing and not len(tensor) % self.rows:
            return tensor.reshape(self.rows, -1, *kept)
        axes = self._axes(tensor)
        if len(axes) != 1:
            raise RowsMixedError(f"a tensor of shape {tuple(tensor.shape)} for {self.rows} rows")
        behind_heads = tensor.transpose(1, 2) if axes[0] == 2 else tensor
        return behind_heads.reshape(self.rows, -1, *kept)

    def outer(self, parameter: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """The parameter's gradient is left^T right, summed over tokens; left [rows, n, p], right [rows, n, q]."""
        if self.wants(parameter):
            segments = self.segments.times(left.shape[1])
            self.at(parameter).add_outer(left.flatten(0, 1), right.flatten(0, 1), segments)

    def lookup(self, parameter: torch.nn.Parameter, index: torch.Tensor, gradient: torch.Tensor) -> None:
        """The parameter's gradient is gradient [rows, n, q] added at index [rows, n]."""
        if self.wants(parameter):
            segments = self.segments.times(index.shape[1])
            self.at(parameter).add_lookup(index.flatten(), gradient.flatten(0, 1), segments)

    def summed(self, parameter: torch.nn.Parameter | None, gradient: torch.Tensor) -> None:
        """The parameter's gradient is the sum over tokens of gradient [rows, n, *shape]."""
        if parameter is not None and self.wants(parameter):
            sums = self.segments.times(gradient.shape[1]).sums(gradient.flatten(0, 1))
            self.at(parameter).add_held(sums)

    def summed_rows(self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> None:
        """The same of vectors' gradients [rows, size] that are added up over tokens already; all in one go."""
        if not parameters:
            return
        sums = self.segments.sums(torch.cat(gradients, 1))
        parts = torch.split(sums, [gradient.shape[1] for gradient in gradients], 1)
        for parameter, part in zip(parameters, parts, strict=True):
            self.at(parameter).add_held(part)


Record = Callable[[Tape, Any, tuple[torch.Tensor, ...], torch.Tensor], None]
"""A layer's rule: from its inputs and its output's gradient to terms of its parameters' gradients."""


class LayerHooks:
    """Hooks on layers that write to the tape of the pass under way, and do nothing between passes.

    A layer's parameters get no gradients of its calls meanwhile: what autograd would do for them is done by its rule.
    Of a use past such a call nobody would know whose gradient it is, and it would be missing from the sum: where a
    gradient reaches one of them the pass ends with RowsMixedError.

    Args:
        parameters: Those of which no gradient may be seen.
        layers: With names and rules. Parameters of theirs that are not in `parameters` are the caller's to freeze.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], layers: dict[torch.nn.Module, tuple[str, Record]]
    ) -> None:
        self._watched = {id(parameter): parameter for parameter in parameters}
        self._layers = layers
        self._tape: Tape | None = None
        # Makes every recorded output require a gradient, wherever the first trainable layer is.
        self._anchor = torch.zeros((), requires_grad=True)
        self._installed = ExitStack()

    def __enter__(self) -> "LayerHooks":
        with ExitStack() as stack:
            for parameter in self._watched.values():
                stack.callback(parameter.register_hook(self._refuse).remove)  # type: ignore[no-untyped-call]
            for module, (name, record) in self._layers.items():
                own = [self._watched[id(p)] for p in module._parameters.values() if id(p) in self._watched]
                if own:
                    stack.callback(module.register_forward_pre_hook(self._switch(own, False)).remove)
                    stack.callback(module.register_forward_hook(self._switch(own, True), always_call=True).remove)
                stack.callback(module.register_forward_hook(self._hook(name, record), with_kwargs=True).remove)
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._installed.close()

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        """Within it, a forward pass through the layers and its backward pass write to the tape."""
        self._tape = tape
        try:
            with nullcontext() if tape.order is None else tape.order:
                yield
        finally:
            self._tape = None
            for parameter in self._watched.values():  # a call that was broken off may have left it off
                if not parameter.requires_grad:
                    parameter.requires_grad_(True)

    def _refuse(self, gradient: torch.Tensor) -> None:
        if self._tape is not None:
            raise RowsMixedError("a parameter is used past the calls of the layer that holds it")

    def _switch(self, own: list[torch.nn.Parameter], on: bool) -> Callable[..., None]:
        def hook(*call: object) -> None:
            if self._tape is not None:
                for parameter in own:
                    parameter.requires_grad_(on)

        return hook

    def _hook(self, name: str, record: Record) -> Callable[..., object]:
        def hook(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any], output: object) -> object:
            tape = self._tape
            if tape is None or not torch.is_grad_enabled():
                return None
            if not isinstance(output, torch.Tensor) or not all(isinstance(a, torch.Tensor) for a in args) or kwargs:
                raise RowsMixedError(f"{type(module).__name__} takes or returns something other than tensors")
            tape.called(name, args)  # type: ignore[arg-type]
            if isinstance(module, torch.nn.Embedding) and len(output) == 1 < tape.rows and not tape.packed:
                # Positions looked up once for all rows: looked up for each row instead, so that rows stay apart.
                output = output.expand(tape.rows, *output.shape[1:])
            recorded = _recorded(output, self._anchor, tape, record, module, *args)
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
