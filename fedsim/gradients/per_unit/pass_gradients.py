"""The gradients of a pass's units, parameter by parameter: norms and sums of many parameters in few kernels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.kernels import gram_norms_of, usable, weighted_products
from fedsim.gradients.kernels.tables import Pair
from fedsim.gradients.model import on_device
from fedsim.gradients.per_unit.products import squared_row_norms
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments, Term

BUNDLE_ELEMENTS = 2**28
"""Values of one bundle at most: 1 GiB of float32."""
COPIED_ELEMENTS = 2**29
"""Values of factors that are copied at a time: 1 GiB of bfloat16. Fewer would be more launches."""

Whose = TypeVar("Whose")


@dataclass
class Bundle:
    """Held gradients of parameters of one block, side by side.

    Attributes:
        block: Theirs.
        units: Of which units they are.
        names: The parameters.
        sizes: Values of each.
        matrix: [units, sizes together].
    """

    block: int
    units: slice
    names: list[str]
    sizes: list[int]
    matrix: torch.Tensor


class PassGradients:
    """The gradients of the u units of a pass: the norms of their blocks, and their weighted sum.

    A model has many small parameters (biases, normalisation weights, adapters). Those of one block are laid side by
    side; on a CPU only vectors are, where a copy of larger ones would cost more than it saves. Kernels for a GPU take
    the factors of many parameters in one launch, where these are of the same units.

    Args:
        gradients: By parameter name. What is bundled is taken out of them.
        clip: Says which parameters belong together, and what each is divided by.
        segments: The u units of the pass.
    """

    def __init__(self, gradients: dict[str, UnitGradients], clip: ModelClip, segments: Segments) -> None:
        self.clip, self.segments = clip, segments
        self.paths = {name: g.paths for name, g in gradients.items()}
        together: dict[tuple[int, int], list[str]] = {}
        for name, g in gradients.items():
            if _side_by_side(g):
                together.setdefault((clip.block[name], g.first), []).append(name)
        self.bundles = [
            bundle
            for (block, first), names in together.items()
            for bundle in _bundles(block, slice(first, len(segments)), names, gradients)
        ]
        self.matrices = {name: g for name, g in gradients.items() if g.any}

    def squared_norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms and spreads as of UnitGradients, of gradients divided by their scales: float64 [blocks, u]."""
        parts: dict[tuple[int, int, int], list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        for block, units, squares, spreads in self._norms():
            parts.setdefault((block, units.start, units.stop), []).append((squares, spreads))
        sizes = len(self.clip.limits), len(self.segments)
        squared = torch.zeros(sizes, dtype=torch.float64, device=self.segments.device)
        spread = torch.zeros_like(squared)
        for (block, start, stop), found in parts.items():
            wide = [spreads for _, spreads in found if spreads is not None]
            squared[block, start:stop] += torch.stack([squares for squares, _ in found]).sum(0)
            if wide:
                spread[block, start:stop] += torch.stack(wide).sum(0)
        return squared, spread

    def add_weighted(self, targets: dict[str, torch.Tensor], factors: torch.Tensor) -> None:
        """targets[name] += Σ over units of factors [blocks, u] of the parameter's block · gradient."""
        # By block, and by how many of the target's terms come before: of each target no more than one together.
        together: dict[tuple[int, int], list[tuple[torch.Tensor, Term]]] = {}
        for name, gradients in self.matrices.items():
            block, target = self.clip.block[name], targets[name]
            fitting = [term for term in gradients.outers if target.dtype == torch.float32 and usable(*term[1])]
            gradients.add_weighted(target, factors[block], without=fitting)
            for place, term in enumerate(fitting):
                together.setdefault((block, place), []).append((target, term))
        for (block, _), products in together.items():
            for units, launch in _launches(products):
                whole, pairs = [target for target, _ in launch], [pair for _, pair in launch]
                weighted_products(whole, pairs, factors[block, units])
        for bundle in self.bundles:
            added = bundle.matrix.t() @ factors[bundle.block, bundle.units].to(bundle.matrix.dtype)
            whole = [targets[name].view(-1) for name in bundle.names]
            torch._foreach_add_(whole, list(torch.split(added, bundle.sizes)))

    def add_weighted_of(self, name: str, target: torch.Tensor, factors: torch.Tensor) -> None:
        """The same of one parameter alone: target, of its shape, is what is added to."""
        if name in self.matrices:
            self.matrices[name].add_weighted(target, factors[self.clip.block[name]])
        for bundle in self.bundles:
            if name in bundle.names:
                place = bundle.names.index(name)
                start = sum(bundle.sizes[:place])
                own = bundle.matrix[:, start : start + bundle.sizes[place]]
                target.view(-1).add_(own.t() @ factors[bundle.block, bundle.units].to(own.dtype))

    def zero(self, units: torch.Tensor) -> None:
        """Make the gradients of units, bool [u], exactly zero: a factor of 0 would leave 0 · inf = nan."""
        for gradients in self.matrices.values():
            gradients.zero(units)
        for bundle in self.bundles:
            bundle.matrix[units[bundle.units]] = 0

    def _norms(self) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor | None]]:
        """Blocks, some units, and these units' squared norms and spreads, of one parameter or several."""
        for bundle in self.bundles:
            yield bundle.block, bundle.units, squared_row_norms(self._scaled(bundle)), None
        terms = {name: term for name, g in self.matrices.items() if (term := g.gram_term()) is not None}
        for units, launch in _launches(terms.items()):
            for block, squares, spreads in self._gram_norms(launch):
                yield block, units, squares, spreads
        for name, gradients in self.matrices.items():
            first = len(terms[name][0]) if name in terms else gradients.units.start
            if first == gradients.units.stop:
                continue
            block, power = self.clip.block[name], self.clip.inverse[name] ** 2
            squares, spreads = gradients.squared_norms(first)
            if power != 1:
                squares, spreads = squares * power, spreads * power
            yield block, slice(first, gradients.units.stop), squares, spreads

    def _gram_norms(self, launch: list[tuple[str, Pair]]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Blocks, squared norms and spreads of the parameters whose norms one kernel finds together."""
        squared, spread = gram_norms_of([pair for _, pair in launch])
        powers = [self.clip.inverse[name] ** 2 for name, _ in launch]
        if any(power != 1 for power in powers):
            scale = on_device(np.array(powers)[:, None], squared.device, squared.dtype)
            squared, spread = squared * scale, spread * scale
        blocks = [self.clip.block[name] for name, _ in launch]
        for block in dict.fromkeys(blocks):
            if len(set(blocks)) == 1:
                yield block, squared.sum(0), spread.sum(0)
            else:  # one by one: a list of places would have to be brought to the device, and waited for
                places = [place for place, b in enumerate(blocks) if b == block]
                own, its = ([part[place] for place in places] for part in (squared, spread))
                yield block, torch.stack(own).sum(0), torch.stack(its).sum(0)

    def _scaled(self, bundle: Bundle) -> torch.Tensor:
        inverse = [self.clip.inverse[name] for name in bundle.names]
        if all(scale == 1 for scale in inverse):
            return bundle.matrix
        parts = torch.split(bundle.matrix, bundle.sizes, 1)
        return torch.cat([part * scale for part, scale in zip(parts, inverse, strict=True)], 1)


def _side_by_side(gradients: UnitGradients) -> bool:
    """Whether what is held of a parameter is laid beside what is held of others."""
    return gradients.held is not None and (len(gradients.shape) == 1 or gradients.held.is_cuda)


def _bundles(block: int, units: slice, names: list[str], gradients: dict[str, UnitGradients]) -> Iterator[Bundle]:
    """What is held of the parameters, in bundles of at most BUNDLE_ELEMENTS or of one."""
    held: list[torch.Tensor] = []
    start = values = 0
    for place, name in enumerate(names):
        held.append(gradients[name].take_held().flatten(1))
        values += held[-1].numel()
        last = place + 1 == len(names)
        if last or values + gradients[names[place + 1]].held_elements() > BUNDLE_ELEMENTS:
            matrix = held[0] if len(held) == 1 else torch.cat(held, 1)
            yield Bundle(block, units, names[start : place + 1], [part.shape[1] for part in held], matrix)
            held, start, values = [], place + 1, 0


def _launches(terms: Iterable[tuple[Whose, Term]]) -> Iterator[tuple[slice, list[tuple[Whose, Pair]]]]:
    """Some units and the factors of these, of as many terms together as copies allow: those filled up are copied."""
    chunk: list[tuple[Whose, Term]] = []
    values = 0
    for whose, (segments, factors) in terms:
        more = segments.copied * sum(factor.shape[1] for factor in factors)
        if chunk and values + more > COPIED_ELEMENTS:
            yield from _by_units(chunk)
            chunk, values = [], 0
        chunk.append((whose, (segments, factors)))
        values += more
    yield from _by_units(chunk)


def _by_units(terms: Iterable[tuple[Whose, Term]]) -> Iterator[tuple[slice, list[tuple[Whose, Pair]]]]:
    together: dict[tuple[int, int], list[tuple[Whose, Pair]]] = {}
    for whose, (segments, (left, right)) in terms:
        pairs = zip(segments.filled(left, zeroed=True), segments.filled(right), strict=True)
        for bucket, pair in zip(segments.buckets, pairs, strict=True):
            together.setdefault((bucket.units.start, bucket.units.stop), []).append((whose, pair))
    for (start, stop), launch in together.items():
        yield slice(start, stop), launch
