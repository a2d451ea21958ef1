"""Hooks on layers, by which a pass writes each layer's inputs and output gradients to its tape."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fedsim.gradients.rules.adapters import own_parameters
from fedsim.gradients.tape import PLAIN, Given, Record, RowsMixedError, Tape


class LayerHooks:
    """Hooks on layers that write to the tape of the pass under way, and do nothing between passes.

    A layer's parameters get no gradients of its calls meanwhile: what autograd would do for them is done by its rule.
    Of a use past such a call nobody would know whose gradient it is, and it would be missing from the sum: where a
    gradient reaches one of them the pass ends with RowsMixedError.

    Args:
        parameters: Those of which no gradient may be seen.
        layers: With names and rules. Parameters of theirs that are not in `parameters` are the caller's to freeze.
        owned: Each layer's own parameters.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        layers: dict[torch.nn.Module, tuple[str, Record]],
        owned: Callable[[torch.nn.Module], Iterable[torch.nn.Parameter]] = own_parameters,
    ) -> None:
        self._owned = owned
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
                own = [self._watched[id(p)] for p in self._owned(module) if id(p) in self._watched]
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
            if tape is None or tape.paused or not torch.is_grad_enabled():
                return None
            given, spec = tree_flatten((args, kwargs))
            outputs, form = tree_flatten(output)
            for thing in (*given, *outputs):
                if not isinstance(thing, (torch.Tensor, *PLAIN)):
                    raise RowsMixedError(f"{type(module).__name__} takes or returns a {type(thing).__name__}")
            table = isinstance(module, torch.nn.Embedding)
            tape.called(name, given, features=not table)
            if table and isinstance(output, torch.Tensor) and len(output) == 1 < tape.rows and not tape.packed:
                # Positions looked up once for all rows: for each row instead, so that rows stay apart.
                outputs = [output.expand(tape.rows, *output.shape[1:])]
            places = [place for place, thing in enumerate(outputs) if _has_gradient(thing)]
            call = _Call(tape, record, module, spec, given, len(places), isinstance(output, torch.Tensor))
            recorded = _recorded(self._anchor, call, *(outputs[place] for place in places), *call.tensors)
            for place, tensor in zip(places, recorded, strict=True):
                outputs[place] = tensor
            if tape.order is not None:
                for thing in outputs:
                    if isinstance(thing, torch.Tensor) and thing.ndim == 2 and not len(thing) % tape.rows:
                        tape.order.mark(thing)  # in the order of the arguments, which are known by now
            return tree_unflatten(outputs, form)

        return hook


def _has_gradient(thing: object) -> bool:
    return isinstance(thing, torch.Tensor) and thing.is_floating_point()


class _Call:
    """A call of a layer: what it was given but for the tensors, which autograd keeps.

    Args:
        tape, record, module: To be told of it, by which rule, and of what.
        spec: How `given` was arranged.
        given: Everything that the layer was given, end to end.
        outputs: How many of what it returned have gradients.
        single: Whether it returned a tensor and nothing else.
    """

    def __init__(
        self,
        tape: Tape,
        record: Record,
        module: torch.nn.Module,
        spec: TreeSpec,
        given: list[Any],
        outputs: int,
        single: bool,
    ) -> None:
        self.tape, self.record, self.module, self.spec = tape, record, module, spec
        self.outputs, self.single = outputs, single
        self.tensors = [thing for thing in given if isinstance(thing, torch.Tensor)]
        self._order = [tape.order is not None and x.ndim == 2 and tape.order.known(x) for x in self.tensors]
        self._given = [None if isinstance(thing, torch.Tensor) else thing for thing in given]
        self._places = [place for place, thing in enumerate(given) if isinstance(thing, torch.Tensor)]

    def finish(self, tensors: Sequence[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> None:
        """Write to the tape, once the gradients of what it returned are known."""
        given: list[Any] = list(self._given)
        for place, tensor, known in zip(self._places, tensors, self._order, strict=True):
            given[place] = again = tensor.detach()
            if known and self.tape.order is not None:
                self.tape.order.mark(again)
        args, named = tree_unflatten(given, self.spec)
        self.record(self.tape, self.module, Given(args, named), gradients[0] if self.single else gradients)


class _Recorded(torch.autograd.Function):
    """The identity; its backward pass writes to the tape.

    Inputs are saved through autograd, which refuses them if they were overwritten in place, recomputes them under
    activation checkpointing and frees them with the graph.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors[call.outputs :])
        call.tensors = []  # else they would be kept past what autograd decides
        # Not views, which a model could not add to where they are, as some do to their residual stream.
        return tuple(output.detach() for output in tensors[: call.outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors  # checkpointing allows reading them once
        ctx.call.finish(inputs, gradients)
        return None, None, *gradients, *(None for _ in inputs)


_recorded: Callable[..., tuple[torch.Tensor, ...]] = _Recorded.apply
"""torch leaves the call untyped."""
