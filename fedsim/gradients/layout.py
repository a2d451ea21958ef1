"""The one flat vector in which trainable parameters move between server and clients."""

from dataclasses import dataclass

import numpy as np
import torch

from fedsim.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """Where each trainable parameter lies in the flat vector.

    Frozen parameters (requires_grad=False) are not part of it, so they never travel. A parameter that two modules
    share appears once, under the name that `model.named_parameters()` gives it. Two layouts are equal if and only if
    names, order and shapes agree: server and client compare them before they exchange vectors.

    Attributes:
        names: Parameter names in the order of `model.named_parameters()`.
        shapes: Shape of each parameter.
        offsets: P_0 = 0 and the running sums of sizes; parameter i is flat[offsets[i]:offsets[i + 1]].
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ParameterLayout":
        """The layout of a model's trainable parameters.

        Raises:
            InvalidInput: The model has no trainable parameter.
        """
        named = trainable_parameters(model)
        offsets = [0]
        for parameter in named.values():
            offsets.append(offsets[-1] + parameter.numel())
        return cls(names=tuple(named), shapes=tuple(tuple(p.shape) for p in named.values()), offsets=tuple(offsets))

    @property
    def size(self) -> int:
        """Number of trainable values, P."""
        return self.offsets[-1]

    def flatten(self, model: torch.nn.Module) -> torch.Tensor:
        """The trainable parameters end to end: a new float32 tensor [P] on the model's device."""
        named = self._parameters(model)
        flat = torch.empty(self.size, dtype=torch.float32, device=next(iter(named.values())).device)
        for name, view in self.views(flat).items():
            view.copy_(named[name].detach())
        return flat

    def load(self, model: torch.nn.Module, flat: np.ndarray | torch.Tensor) -> None:
        """Write flat [P] into the model's parameters, in place and in their own dtype.

        Raises:
            InvalidInput: flat has another size than the layout, or the model has other trainable parameters.
        """
        if flat.ndim != 1 or len(flat) != self.size:
            raise InvalidInput("flat", tuple(flat.shape), f"a vector of {self.size} values")
        named = self._parameters(model)
        with torch.no_grad():
            for name, start, stop in zip(self.names, self.offsets[:-1], self.offsets[1:], strict=True):
                # Copied piece by piece: torch refuses to share arrays that a read-only object store owns.
                piece = (
                    flat[start:stop] if isinstance(flat, torch.Tensor) else torch.from_numpy(flat[start:stop].copy())
                )
                named[name].copy_(piece.view(named[name].shape))

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of flat [P] by parameter name and in the parameter's shape; writing to one writes to flat."""
        return {
            name: flat[start:stop].view(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets[:-1], self.offsets[1:], strict=True
            )
        }

    def _parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        named = trainable_parameters(model)
        if tuple((name, tuple(p.shape)) for name, p in named.items()) != tuple(
            zip(self.names, self.shapes, strict=True)
        ):
            raise InvalidInput(
                "model",
                type(model).__name__,
                "a model with the trainable parameters that this layout was made of",
                "Make the layout with ParameterLayout.of after adapters are added and parameters are frozen.",
            )
        return named


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A model's parameters with requires_grad, shared ones once, in the order of the flat vector.

    Raises:
        InvalidInput: There is none.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise InvalidInput("model", type(model).__name__, "a model with at least one trainable parameter")
    return named
