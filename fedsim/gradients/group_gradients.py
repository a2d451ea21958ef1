"""What the backward pass left for the units of one group, every parameter together."""

import torch

from fedsim.gradients.groups import Group
from fedsim.gradients.unit_gradients import UnitGradients


class GroupGradients:
    """The gradients of a group's u units: their norms over all parameters, and their weighted sum.

    A model has many one-dimensional parameters (biases, normalisation weights) and each is small. Their gradients are
    laid side by side, one matrix [u, sizes together]: a few kernels in all, where one by one each would take a few.

    Args:
        group: The units.
        gradients: By parameter name.
    """

    def __init__(self, group: Group, gradients: dict[str, UnitGradients]) -> None:
        self.units = group.units
        vectors = {name: g.held for name, g in gradients.items() if len(g.shape) == 1 and g.held is not None}
        self.sizes = {name: held.shape[1] for name, held in vectors.items()}
        self.vectors = torch.cat(list(vectors.values()), 1) if vectors else None
        self.matrices = {name: g for name, g in gradients.items() if name not in vectors}
        self._known_paths = {name: gradients[name].paths for name in vectors}

    @property
    def paths(self) -> dict[str, set[str]]:
        """How each parameter's norms were formed, by its name."""
        return self._known_paths | {name: gradients.paths for name, gradients in self.matrices.items()}

    def squared_norms(self, inverse: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms [u] and spreads [u] as of UnitGradients, each parameter's gradient times inverse[name]."""
        squared, spread = [], []
        if self.vectors is not None:
            squared.append(torch.linalg.vector_norm(self._scaled_vectors(inverse), dim=1).square())
        for name, gradients in self.matrices.items():
            norms, spreads = gradients.squared_norms()
            squared.append(norms * inverse[name] ** 2)
            if spreads is not None:
                spread.append(spreads * inverse[name] ** 2)
        total = torch.stack(squared).sum(0, dtype=torch.float64)
        return total, torch.stack(spread).sum(0, dtype=torch.float64) if spread else torch.zeros_like(total)

    def add_weighted(self, targets: dict[str, torch.Tensor], factors: torch.Tensor) -> None:
        """targets[name] += Σ over units of factors [u] · gradient."""
        for name, gradients in self.matrices.items():
            gradients.add_weighted(targets[name], factors)
        if self.vectors is not None:
            added = self.vectors.t() @ factors.to(self.vectors.dtype)
            for name, part in zip(self.sizes, added.split(list(self.sizes.values())), strict=True):
                targets[name] += part

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        for gradients in self.matrices.values():
            gradients.zero(units)
        if self.vectors is not None:
            self.vectors[units] = 0

    def _scaled_vectors(self, inverse: dict[str, float]) -> torch.Tensor:
        assert self.vectors is not None
        if all(inverse[name] == 1 for name in self.sizes):
            return self.vectors
        parts = self.vectors.split(list(self.sizes.values()), 1)
        return torch.cat([part * inverse[name] for name, part in zip(self.sizes, parts, strict=True)], 1)
