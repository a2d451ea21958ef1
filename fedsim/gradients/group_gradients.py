"""What the backward pass left for the units of one group, every parameter together."""

import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.groups import Group
from fedsim.gradients.unit_gradients import UnitGradients


class GroupGradients:
    """The gradients of a group's u units: the norms of their blocks, and their weighted sum.

    A model has many one-dimensional parameters (biases, normalisation weights) and each is small. Those of one block
    are laid side by side, one matrix [u, sizes together]: a few kernels in all, where one by one each would take a
    few.

    Args:
        group: The units.
        gradients: By parameter name.
        clip: Says which parameters belong together, and what each is divided by.
    """

    def __init__(self, group: Group, gradients: dict[str, UnitGradients], clip: ModelClip) -> None:
        self.units = group.units
        self.clip = clip
        vectors = {name: g.held for name, g in gradients.items() if len(g.shape) == 1 and g.held is not None}
        self.names: dict[int, list[str]] = {}
        for name in vectors:
            self.names.setdefault(clip.block[name], []).append(name)
        self.sizes = {name: held.shape[1] for name, held in vectors.items()}
        self.vectors = {b: torch.cat([vectors[name] for name in names], 1) for b, names in self.names.items()}
        self.matrices = {name: g for name, g in gradients.items() if name not in vectors}
        self._known_paths = {name: gradients[name].paths for name in vectors}

    @property
    def paths(self) -> dict[str, set[str]]:
        """How each parameter's norms were formed, by its name."""
        return self._known_paths | {name: gradients.paths for name, gradients in self.matrices.items()}

    def squared_norms(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By block, squared norms [u] and spreads [u] as of UnitGradients, of gradients divided by their scales.

        Blocks of which the group has no gradient are left out.
        """
        squared: dict[int, list[torch.Tensor]] = {}
        spread: dict[int, list[torch.Tensor]] = {}
        for block in self.vectors:
            norms = torch.linalg.vector_norm(self._scaled_vectors(block), dim=1)
            squared.setdefault(block, []).append(norms.square())
        for name, gradients in self.matrices.items():
            block, power = self.clip.block[name], self.clip.inverse[name] ** 2
            squares, spreads = gradients.squared_norms()
            squared.setdefault(block, []).append(squares * power)
            if spreads is not None:
                spread.setdefault(block, []).append(spreads * power)
        sums = {block: torch.stack(parts).sum(0, dtype=torch.float64) for block, parts in squared.items()}
        return {
            block: (
                total,
                torch.stack(spread[block]).sum(0, dtype=torch.float64) if block in spread else torch.zeros_like(total),
            )
            for block, total in sums.items()
        }

    def add_weighted(self, targets: dict[str, torch.Tensor], factors: torch.Tensor) -> None:
        """targets[name] += Σ over units of factors [blocks, u] of the parameter's block · gradient."""
        for name, gradients in self.matrices.items():
            gradients.add_weighted(targets[name], factors[self.clip.block[name]])
        for block, vectors in self.vectors.items():
            added = vectors.t() @ factors[block].to(vectors.dtype)
            names = self.names[block]
            for name, part in zip(names, added.split([self.sizes[name] for name in names]), strict=True):
                targets[name] += part

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        for gradients in self.matrices.values():
            gradients.zero(units)
        for vectors in self.vectors.values():
            vectors[units] = 0

    def _scaled_vectors(self, block: int) -> torch.Tensor:
        vectors, names, inverse = self.vectors[block], self.names[block], self.clip.inverse
        if all(inverse[name] == 1 for name in names):
            return vectors
        parts = vectors.split([self.sizes[name] for name in names], 1)
        return torch.cat([part * inverse[name] for name, part in zip(names, parts, strict=True)], 1)
