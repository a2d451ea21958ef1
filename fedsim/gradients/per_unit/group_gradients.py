"""The gradients of a group of units, parameter by parameter: norms and sums of many parameters in few kernels."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.kernels import gram_norms_of, usable, weighted_products
from fedsim.gradients.kernels.tables import Pair
from fedsim.gradients.model import on_device
from fedsim.gradients.per_unit.unit_gradients import UnitGradients, squared_row_norms
from fedsim.gradients.units import Group

BUNDLE_ELEMENTS = 2**28
"""Values of one bundle at most: 1 GiB of float32."""


@dataclass
class Bundle:
    """Held gradients of parameters of one block, side by side.

    Attributes:
        names: The parameters.
        sizes: Values of each.
        matrix: [u, sizes together].
    """

    names: list[str]
    sizes: list[int]
    matrix: torch.Tensor


class GroupGradients:
    """The gradients of a group's u units: the norms of their blocks, and their weighted sum.

    A model has many small parameters (biases, normalisation weights, adapters). Those of one block are laid side by
    side; on a CPU only vectors are, where a copy of larger ones would cost more than it saves. Kernels for a GPU take
    the factors of many parameters in one launch.

    Args:
        group: The units.
        gradients: By parameter name. What is bundled is taken out of them.
        clip: Says which parameters belong together, and what each is divided by.
    """

    def __init__(self, group: Group, gradients: dict[str, UnitGradients], clip: ModelClip) -> None:
        self.units = group.units
        self.clip = clip
        small = [name for name, g in gradients.items() if g.only_held() and (len(g.shape) == 1 or g.held.is_cuda)]  # type: ignore[union-attr]
        self._known_paths = {name: gradients[name].paths for name in small}
        self.bundles: dict[int, list[Bundle]] = {}
        for block in dict.fromkeys(clip.block[name] for name in small):
            names = [name for name in small if clip.block[name] == block]
            self.bundles[block] = list(_bundles(names, gradients))
        self.matrices = {name: g for name, g in gradients.items() if name not in self._known_paths}

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
        for block, bundles in self.bundles.items():
            squared[block] = [squared_row_norms(self._scaled(bundle)) for bundle in bundles]
        pairs = {name: pair for name, g in self.matrices.items() if (pair := g.gram_pair()) is not None}
        others = {name: g for name, g in self.matrices.items() if name not in pairs}
        for block, squares, spreads in (*self._norms_together(pairs), *self._norms_one_by_one(others)):
            squared.setdefault(block, []).append(squares)
            if spreads is not None:
                spread.setdefault(block, []).append(spreads)
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
        for block in dict.fromkeys(self.clip.block[name] for name in self.matrices):
            together: list[list[tuple[torch.Tensor, Pair]]] = []  # of each target no more than one in a list
            for name, gradients in self.matrices.items():
                if self.clip.block[name] != block:
                    continue
                target = targets[name]
                fitting = [pair for pair in gradients.outers if target.dtype == torch.float32 and usable(*pair)]
                gradients.add_weighted(target, factors[block], without=fitting)
                together += [[] for _ in range(len(fitting) - len(together))]
                for place, pair in enumerate(fitting):
                    together[place].append((target, pair))
            for products in together:
                weighted_products([target for target, _ in products], [pair for _, pair in products], factors[block])
        for block, bundles in self.bundles.items():
            for bundle in bundles:
                added = bundle.matrix.t() @ factors[block].to(bundle.matrix.dtype)
                whole = [targets[name].view(-1) for name in bundle.names]
                torch._foreach_add_(whole, list(torch.split(added, bundle.sizes)))

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        for gradients in self.matrices.values():
            gradients.zero(units)
        for bundles in self.bundles.values():
            for bundle in bundles:
                bundle.matrix[units] = 0

    def _norms_together(self, pairs: dict[str, Pair]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Blocks, squared norms and spreads of the parameters whose norms one kernel finds together."""
        if not pairs:
            return
        squared, spread = gram_norms_of(list(pairs.values()))
        powers = [self.clip.inverse[name] ** 2 for name in pairs]
        if any(power != 1 for power in powers):
            scale = on_device(np.array(powers), squared.device, squared.dtype)[:, None]
            squared, spread = squared * scale, spread * scale
        blocks = [self.clip.block[name] for name in pairs]
        for block in dict.fromkeys(blocks):
            if len(set(blocks)) == 1:
                yield block, squared.sum(0), spread.sum(0)
            else:
                places = [place for place, b in enumerate(blocks) if b == block]
                own, its = ([part[place] for place in places] for part in (squared, spread))
                yield block, torch.stack(own).sum(0), torch.stack(its).sum(0)

    def _norms_one_by_one(
        self, gradients_by_name: dict[str, UnitGradients]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        for name, gradients in gradients_by_name.items():
            block, power = self.clip.block[name], self.clip.inverse[name] ** 2
            squares, spreads = gradients.squared_norms()
            yield (
                block,
                squares if power == 1 else squares * power,
                spreads if spreads is None or power == 1 else spreads * power,
            )

    def _scaled(self, bundle: Bundle) -> torch.Tensor:
        inverse = [self.clip.inverse[name] for name in bundle.names]
        if all(scale == 1 for scale in inverse):
            return bundle.matrix
        parts = torch.split(bundle.matrix, bundle.sizes, 1)
        return torch.cat([part * scale for part, scale in zip(parts, inverse, strict=True)], 1)


def _bundles(names: list[str], gradients: dict[str, UnitGradients]) -> Iterator[Bundle]:
    """What is held of the parameters, in bundles of at most BUNDLE_ELEMENTS or of one."""
    held: list[torch.Tensor] = []
    start = values = 0
    for place, name in enumerate(names):
        held.append(gradients[name].take_held().flatten(1))
        values += held[-1].numel()
        last = place + 1 == len(names)
        if last or values + gradients[names[place + 1]].held_elements() > BUNDLE_ELEMENTS:
            matrix = held[0] if len(held) == 1 else torch.cat(held, 1)
            yield Bundle(names[start : place + 1], [part.shape[1] for part in held], matrix)
            held, start, values = [], place + 1, 0
