"""The fast path's forward and backward pass as one compiled graph each, which also keep what the clipped sum needs."""

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch

from fedsim.gradients.layers import conv1d, normal_of, rule_for
from fedsim.gradients.model import compute_dtype, wide_dtype
from fedsim.gradients.objective import Batch, causal_logits
from fedsim.gradients.tape import Forms, Given, Record, RowsMixedError, Tape

log = logging.getLogger(__name__)

BACKEND = "inductor"
"""Of torch.compile."""
KINDS = ("linear", "embedding", "normalisation")
"""Layers that a compiled pass may hold, as `rule_for` names them."""


@dataclass(frozen=True)
class Call:
    """One call of a layer within the forward pass.

    Attributes:
        name, module, kind: Of the layer; the module is the caller's own.
        form: How its argument holds the rows, as of `Tape.forms`.
        features: Of its output.
        dtype: Of its output.
        probes: What autograd is asked for, in order: "gradient" is the output's, [rows, tokens, features]; "weight"
            and "bias" are these parameters', [rows, features], already added up over tokens.
    """

    name: str
    module: Any
    kind: str
    form: tuple[str, ...]
    features: int
    dtype: torch.dtype
    probes: tuple[str, ...]


class CompiledPass:
    """A model's body, up to its last hidden states, compiled.

    What hooks keep in the ordinary pass are further outputs here: each layer's inputs, and its output's gradients as
    those of probes, which are zeros that cost nothing. So all elementwise work is fused, that of the normalisations'
    and biases' gradients included. A graph cannot be hooked from outside, and the caller's model must stay as it is:
    the hooks are those of a copy that shares its parameters and buffers.

    Args:
        model: The caller's.
        layers: Its layers with trainable parameters, with names; the head is not among them.
        head: What `plain_head` returned.
        varied: Whether micro-batches of several shapes are to come: then the graphs are made for all from the start,
            and otherwise for the first shape alone, as long as it stays the only one.

    Attributes:
        trusted: Whether it was compared with the ordinary pass.

    Raises:
        RowsMixedError: A layer of a kind that a compiled pass does not hold.
    """

    def __init__(
        self, model: torch.nn.Module, layers: Mapping[torch.nn.Module, tuple[str, Record]], head: Any, varied: bool
    ) -> None:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self._wanted = {id(p) for p in model.parameters() if p.requires_grad}
        body = dict(self.model.named_modules())
        names = {module: name for name, module in model.named_modules()}
        body[names[head]].forward = lambda hidden: hidden
        for module, (name, _) in layers.items():
            kind = rule_for(module)[0]
            if kind not in KINDS:
                raise RowsMixedError(f"{name} is {kind}, which a compiled pass does not hold")
            body[name].register_forward_hook(self._hook(kind, name, module), with_kwargs=True)
        self.calls: list[Call] = []
        self._finding = False
        self._rows = 0
        self._inputs: list[torch.Tensor] = []
        self._probes: list[torch.Tensor] = []
        self._place = 0
        # A function of its own: torch counts the graphs made of one piece of code, and gives up after a few.
        code = FunctionType(CompiledPass._run.__code__.replace(), globals())
        dynamic = True if varied else None
        self._compiled = torch.compile(MethodType(code, self), backend=BACKEND, fullgraph=True, dynamic=dynamic)
        self._probes_by_shape: dict[torch.Size, list[torch.Tensor]] = {}  # of the last shape
        self._first = True
        self.trusted = False

    def forms(self) -> Forms:
        """In which forms the layers are called, as of `Tape`."""
        found: Forms = {}
        for call in self.calls:
            found.setdefault(call.name, set()).add(call.form)
        return found

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """The last hidden states [rows, tokens, d], each call's input, and the calls' probes, in order of calls."""
        ids = batch.input_ids
        if not self.calls:
            self._find_calls(ids)
        if ids.shape not in self._probes_by_shape:
            self._probes_by_shape = {ids.shape: [p for call in self.calls for p in self._probes_of(call, ids)]}
        probes = self._probes_by_shape[ids.shape]
        start, first, self._first = time.perf_counter(), self._first, False
        if first:
            log.info("compiling the forward and backward pass, once; a large model takes a minute or two")
        hidden, inputs = self._compiled(ids, probes)
        self._inputs, self._probes = [], []  # else they would lie there until the next pass has replaced them
        if first:
            log.info("compiled in %.0f s", time.perf_counter() - start)
        return hidden, inputs, probes

    def record(self, tape: Tape, inputs: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]) -> None:
        """Write to the tape what the pass left."""
        left = iter(gradients)
        vectors: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        for call, kept in zip(self.calls, inputs, strict=True):
            found = {probe: next(left) for probe in call.probes}
            module = call.module
            if call.kind == "embedding":
                rule_for(module)[1](tape, module, Given((kept,), {}), found["gradient"])
                continue
            if "gradient" in found:
                input_first = rule_for(module)[1] is conv1d
                one, other = (kept, found["gradient"]) if input_first else (found["gradient"], kept)
                tape.outer(module.weight, one, other)
            vectors += [(getattr(module, which), found[which]) for which in ("weight", "bias") if which in found]
        tape.summed_rows([parameter for parameter, _ in vectors], [gradient for _, gradient in vectors])

    def _run(self, ids: torch.Tensor, probes: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self._inputs, self._probes, self._place, self._rows = [], probes, 0, ids.shape[0]
        hidden = causal_logits(self.model, Batch(input_ids=ids, attention_mask=None, labels=ids))
        if not self._finding and len(self._inputs) != len(self.calls):
            raise RowsMixedError("layers are called less often than when their calls were counted")
        return hidden.to(compute_dtype(hidden)), self._inputs

    def _find_calls(self, ids: torch.Tensor) -> None:
        """Which layers are called, and how: a forward pass as it is, without gradients."""
        self._finding = True
        try:
            with torch.no_grad():
                self._run(ids, [])
        except RowsMixedError:
            self.calls = []
            raise
        finally:
            self._finding = False
            self._inputs = []

    def _probes_of(self, call: Call, ids: torch.Tensor) -> list[torch.Tensor]:
        shapes = {"gradient": (*ids.shape, call.features)}
        found = []
        for probe in call.probes:
            dtype = call.dtype if probe == "gradient" else wide_dtype(call.dtype)
            zero = torch.zeros((), dtype=dtype, device=ids.device)
            found.append(zero.expand(shapes.get(probe, (len(ids), call.features))).requires_grad_())
        return found

    def _hook(self, kind: str, name: str, module: Any) -> Callable[..., torch.Tensor]:
        whole = kind != "normalisation" and id(module.weight) in self._wanted
        weight = kind == "normalisation" and id(module.weight) in self._wanted
        bias = id(getattr(module, "bias", None)) in self._wanted

        def hook(copied: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
            (given,) = args
            if kind == "embedding" and len(output) == 1 < self._rows:
                output = output.expand(self._rows, *output.shape[1:])
            if self._finding:
                self._found(kind, name, module, given, output, (whole, weight, bias))
                return output  # type: ignore[no-any-return]
            self._expect(name, given, output)
            probes = self._probes
            if kind == "normalisation":
                self._inputs.append(output.new_empty(0))
                # Of the caller's own module, which has no hooks.
                normal = normal_of(module, Given((given.detach(),), {}), output.dtype)
                first = self._place
                self._place += weight + bias
                return _normalised(  # type: ignore[no-any-return]
                    output, normal, probes[first] if weight else None, probes[first + weight] if bias else None
                )
            self._inputs.append((given if kind == "embedding" else given.to(output.dtype)).detach())
            first = self._place
            self._place += whole + bias
            return _kept(output, probes[first] if whole else None, probes[first + whole] if bias else None)  # type: ignore[no-any-return]

        return hook

    def _expect(self, name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        """Refuse, while a graph is traced, a call that is not the one that was found at this place."""
        place = len(self._inputs)
        call = self.calls[place] if place < len(self.calls) else None
        form = "rows on axis 0" if len(given) == self._rows else "whole"
        if (
            call is None
            or call.name != name
            or (form,) != call.form
            or output.dtype != call.dtype
            or output.shape[-1] != call.features
            or len(output) != self._rows
            or ("gradient" in call.probes and output.ndim != 3)
        ):
            raise RowsMixedError(f"{name} is called otherwise than when the layers' calls were found")

    def _found(
        self,
        kind: str,
        name: str,
        module: Any,
        given: torch.Tensor,
        output: torch.Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        if given.ndim < (3 if given.is_floating_point() else 2) or len(output) != self._rows:
            raise RowsMixedError(f"{name} is called with {tuple(given.shape)} vectors of unknown rows")
        if wanted[0] and output.ndim != 3:
            raise RowsMixedError(f"{name} returns {tuple(output.shape)}, which a compiled pass does not hold")
        form = "rows on axis 0" if len(given) == self._rows else "whole"
        probes = tuple(p for p, is_wanted in zip(("gradient", "weight", "bias"), wanted, strict=True) if is_wanted)
        self.calls.append(Call(name, module, kind, (form,), output.shape[-1], output.dtype, probes))


class _Kept(torch.autograd.Function):
    """The identity; its output's gradient is its second argument's too, and summed over tokens its third's."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, whole: torch.Tensor | None, summed: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.wanted = whole is not None, summed is not None
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole, summed = ctx.wanted
        return gradient, gradient if whole else None, _over_tokens(gradient) if summed else None


class _Normalised(torch.autograd.Function):
    """The identity on a normalisation's output w · x̂ + b, which leaves per row the gradients of w and b."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        normal: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.wanted = weight is not None, bias is not None
        ctx.save_for_backward(normal)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, bias = ctx.wanted
        (normal,) = ctx.saved_tensors
        return (
            gradient,
            None,
            _over_tokens(gradient * normal) if weight else None,
            _over_tokens(gradient) if bias else None,
        )


def _over_tokens(gradient: torch.Tensor) -> torch.Tensor:
    """[rows, …, d] added up to [rows, d], in float32 or wider."""
    return gradient.flatten(1, -2).sum(1, dtype=wide_dtype(gradient.dtype))


_kept: Callable[..., Any] = _Kept.apply
_normalised: Callable[..., Any] = _Normalised.apply
"""torch leaves the calls untyped."""
