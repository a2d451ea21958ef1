"""What one forward and backward pass leaves for the clipped sum: each unit's gradients, as they come in."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.per_unit.pass_gradients import PassGradients
from fedsim.gradients.per_unit.routed import RoutedGradients, Routing
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.order import RowOrder
from fedsim.gradients.rows.segments import Segments


class RowsMixedError(RuntimeError):
    """A layer's tensors cannot be split by row, so one pass cannot tell units apart.

    Args:
        cause: Why, in words of the model alone.
        seen: What was seen of the rows, which are private.
    """

    def __init__(self, cause: str, seen: str = "") -> None:
        super().__init__(f"{cause}: {seen}" if seen else cause)
        self.cause = cause


Forms = dict[str, set[tuple[str, ...]]]
"""For each layer by name, how the arguments of its calls held the rows."""
PLAIN = (bool, int, float, str, type(None), torch.dtype)
"""What a layer may be given or return besides tensors: anything else, as a cache, it may write to."""


class Given(NamedTuple):
    """What a layer was called with.

    Attributes:
        args: By position.
        named: By name.
    """

    args: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def tensor(self) -> torch.Tensor:
        """The one tensor that it is.

        Raises:
            RowsMixedError: It is something else.
        """
        if len(self.args) != 1 or self.named or not isinstance(self.args[0], torch.Tensor):
            raise RowsMixedError("a layer takes something other than a tensor")
        return self.args[0]


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
        together: Whether there is anybody to be mixed with.
        paused: Whether calls of layers are none of the pass's, as a layer is being run again.
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
        self.together = len(segments) > 1 or packed  # a unit by itself has nobody to be mixed with
        vectors = allowed is None or any("vectors" in form for forms in allowed.values() for form in forms)
        self.order = RowOrder(rows, packed) if self.together and vectors else None
        self.paused = False
        self.tried = allowed is None

    def called(self, name: str, arguments: Sequence[object], features: bool = True) -> None:
        """Note how a layer is called: with tensors, and with numbers, words and switches.

        Args:
            features: Whether floats have a last axis of features; those that tell a table what to look up have none.

        Raises:
            RowsMixedError: Not so in the pass that was compared, which then tells nothing of it; or with vectors of
                which nobody knows whose they are.
        """
        if not self.together:
            return
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        held = iter(self._all_held_by(name, tensors, features))
        # Of numbers alone, as that of tokens, no more is noted than that they are there.
        form = tuple(
            next(held)
            if isinstance(argument, torch.Tensor)
            else type(argument).__name__
            if isinstance(argument, int | float) and not isinstance(argument, bool)
            else repr(argument)
            for argument in arguments
        )
        if self._allowed is not None and form not in self._allowed.get(name, ()):
            raise RowsMixedError(f"{name} is called in a way in which it was not when the model was tried")
        self.forms.setdefault(name, set()).add(form)

    def _all_held_by(self, name: str, tensors: list[torch.Tensor], features: bool) -> list[str]:
        held = [self._held_by(name, place, tensor, features) for place, tensor in enumerate(tensors)]
        vectors = {len(tensor) for tensor, how in zip(tensors, held, strict=True) if how == "vectors"}
        if any(how == "whole" and x.ndim and len(x) in vectors for x, how in zip(tensors, held, strict=True)):
            raise RowsMixedError(f"{name} is called with vectors of unknown rows beside others")
        return held

    def _held_by(self, name: str, place: int, argument: torch.Tensor, features: bool = True) -> str:
        """How an argument holds the rows: first, "vectors" of one after the other, on another axis, or not at all."""
        if self.order is not None and argument.ndim == 2 and self.order.known(argument):
            return "vectors"
        features = features and argument.is_floating_point()
        if argument.ndim >= 2 + features:
            axes = self._axes(argument, features)
            if len(axes) > 1:
                raise RowsMixedError(
                    f"two axes of what {name} is called with may be tokens", str(tuple(argument.shape))
                )
            return f"rows on axis {axes[0]}" if axes else "whole"
        if place == 0 or (argument.ndim and len(argument) == self.rows):
            raise RowsMixedError(f"{name} is called with vectors of unknown rows", str(tuple(argument.shape)))
        return "whole"

    def _axes(self, tensor: torch.Tensor, features: bool = True) -> list[int]:
        """Which axes of a tensor may hold the rows, of those where they are looked for: not on that of features."""
        shape = tensor.shape
        if not self.packed:
            return [0] if shape[0] == self.rows else []
        if shape[0] != 1:
            return []
        last = len(shape) - features  # heads may come before tokens or after
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

    def per_row(self, tensor: torch.Tensor) -> int:
        """How many of a tensor's first places belong to each row; 0 where it is the same for all.

        Raises:
            RowsMixedError: Its rows are elsewhere.
        """
        how = self._held_by("a layer", 1, tensor) if self.together else "rows on axis 0"
        if how == "whole":
            return 0
        if how not in ("vectors", "rows on axis 0") or len(tensor) % self.rows:
            raise RowsMixedError("a layer's tensor has no axis of rows", f"{tuple(tensor.shape)} for {self.rows}")
        return len(tensor) // self.rows

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Within it layers are called without leaving anything here."""
        self.paused = True
        try:
            with nullcontext() if self.order is None else self.order.resting():
                yield
        finally:
            self.paused = False

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
            raise RowsMixedError("a layer's tensor has no axis of rows", f"{tuple(tensor.shape)} for {self.rows}")
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

    def routed(
        self,
        parameter: torch.nn.Parameter,
        routing: Routing,
        left: torch.Tensor,
        right: torch.Tensor,
        stacked: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole,
    ) -> None:
        """The parameter's gradient is each expert's left^T right, of vectors ordered as the routing says.

        Args:
            stacked: Views a tensor of the parameter's shape as [experts, p, q].

        Raises:
            RowsMixedError: The parameter has other gradients in this pass, whose cross terms nobody would know.
        """
        if self.wants(parameter):
            if id(parameter) in self.gradients:
                raise RowsMixedError("a weight of experts is used more than once")
            self.gradients[id(parameter)] = RoutedGradients(parameter.shape, routing, left, right, stacked)

    def summed(self, parameter: torch.nn.Parameter | None, gradient: torch.Tensor) -> None:
        """The parameter's gradient is the sum over tokens of gradient [rows, n, *shape]."""
        if parameter is not None and self.wants(parameter):
            sums = self.segments.times(gradient.shape[1]).sums(gradient.flatten(0, 1).flatten(1))
            self.at(parameter).add_held(sums.view(-1, *parameter.shape))

    def summed_rows(self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> None:
        """The same of vectors' gradients [rows, size] that are added up over tokens already; all in one go."""
        if not parameters:
            return
        sums = self.segments.sums(torch.cat(gradients, 1))
        parts = torch.split(sums, [gradient.shape[1] for gradient in gradients], 1)
        for parameter, part in zip(parameters, parts, strict=True):
            self.at(parameter).add_held(part)


Record = Callable[[Tape, Any, Given, Any], None]
"""A layer's rule: from what it is given and its output's gradient to terms of its parameters' gradients. Of a layer
that returns several things: a tuple, the gradients of those that are floats."""
