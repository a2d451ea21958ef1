"""The clip of one release: how far one unit's update may reach, in which norm, and therefore in every other.

The mechanism makes it, the message carries it, and whoever clips, rounds or checks takes it. No other place derives a
bound, so that no two can disagree.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.validation import require_positive

CLIP_MARGIN = 2.0**-16
"""How far below its limit a clipped block is aimed, relatively.

Whoever clips computes norms to better than this, and scaling rounds float32 by 2⁻²⁴; so a clipped block never exceeds
its limit.
"""
SHARES_SLACK = 1e-9
"""Shares may sum to so much more than 1 by rounding; the limits are shortened by as much."""


@dataclass(frozen=True, kw_only=True)
class ClipBlock:
    """Parameters that are clipped together, apart from the others.

    Attributes:
        parameters: Their names.
        share: The block's limit over the clip norm, above 0 and at most 1.
    """

    parameters: tuple[str, ...]
    share: float


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What every unit's update is brought to before it is summed.

    With scales s > 0 the norm is that of Δ⊘s. With blocks, each block's part of Δ⊘s is clipped by itself to
    share · norm, where Σ share^order ≤ 1: the norm of the whole is then at most `norm` all the same. Noise that hides
    a contribution of `norm` hides every clipped update.

    Attributes:
        norm: C, the bound on the norm of Δ⊘s, above 0.
        order: 2, or 1 for the L1 norm.
        scales: s by parameter name; empty where all are 1, otherwise every parameter has one.
        blocks: Disjoint blocks that hold every parameter; empty where all are clipped together.

    Raises:
        InvalidInput: A value outside the above.
    """

    norm: float
    order: int = 2
    scales: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[ClipBlock, ...] = ()

    def __post_init__(self) -> None:
        require_positive("clip.norm", self.norm)
        if self.order not in (1, 2):
            raise InvalidInput("clip.order", self.order, "1 or 2")
        for name, scale in self.scales.items():
            require_positive(f"clip.scales[{name!r}]", scale)
        for block in self.blocks:
            require_positive("clip.blocks.share", block.share)
            if not block.parameters:
                raise InvalidInput("clip.blocks", "a block of no parameters", "blocks of at least one")
        if self.blocks and not self._whole_share() <= 1 + SHARES_SLACK:
            raise InvalidInput("clip.blocks", self._whole_share(), f"shares whose L{self.order} norm is at most 1")
        names = [name for block in self.blocks for name in block.parameters]
        if len(set(names)) != len(names):
            raise InvalidInput("clip.blocks", sorted({n for n in names if names.count(n) > 1}), "each in one block")

    @property
    def bound(self) -> float:
        """Largest L2 norm of one clipped update as it enters the sum: ‖Δ‖₂ ≤ max s · ‖Δ⊘s‖₂ ≤ max s · ‖Δ⊘s‖_order."""
        return self.norm * max(self.scales.values(), default=1.0)

    @property
    def limits(self) -> tuple[float, ...]:
        """The norm to which each block is clipped; one number where there are no blocks."""
        if not self.blocks:
            return (self.norm,)
        whole = max(1.0, self._whole_share())
        return tuple(self.norm * block.share / whole for block in self.blocks)

    def require_parameters(self, names: Mapping[str, Any] | tuple[str, ...]) -> None:
        """Refuse a clip that is not of a model with these parameters.

        Raises:
            InvalidInput: Scales or blocks that leave a parameter out, or name another one.
        """
        held = tuple(name for block in self.blocks for name in block.parameters)
        for field_name, given in (("clip.scales", set(self.scales)), ("clip.blocks", set(held))):
            if given and given != set(names):
                odd = sorted(given ^ set(names))
                raise InvalidInput(field_name, odd[0], "for exactly the trainable parameters of the model")

    def block_of(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The block, as an index into `limits`, of each of these parameters."""
        places = {name: index for index, block in enumerate(self.blocks) for name in block.parameters}
        return tuple(places.get(name, 0) for name in names)

    def reach(self, update: np.ndarray, sizes: Mapping[str, int]) -> float:
        """How far an update reaches: the largest ratio of a block's norm to its limit. Clipped means at most 1.

        Args:
            update: float64 [P].
            sizes: Values of each parameter by name, in the order of the vector.

        Returns:
            The ratio with every rounding error of its computation added, so never too small; nan or inf where a value
            is not finite.
        """
        if not self.scales and not self.blocks:
            return float(np.linalg.norm(update, self.order)) / self.norm * (1 + _slack(len(update)))
        powers = np.square(update) if self.order == 2 else np.abs(update)
        starts = np.concatenate([[0], np.cumsum(list(sizes.values()))[:-1]]).astype(np.int64)
        return self.reach_of_sums(np.add.reduceat(powers, starts), sizes)

    def applied(self, update: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The clip itself, on the host: each block that is longer than its limit is brought to it.

        Args:
            update: float64 [P].
            sizes: Values of each parameter by name, in the order of the vector.

        Returns:
            float32 [P], within every limit (CLIP_MARGIN); all zero where the update is not finite.
        """
        self.require_parameters(sizes)
        clipped = np.array(update, dtype=np.float64)
        parts = np.split(clipped, np.cumsum(list(sizes.values()))[:-1])  # views
        blocks = self.block_of(tuple(sizes))
        for index, limit in enumerate(self.limits):
            own = [one for one in zip(parts, sizes, blocks, strict=True) if one[2] == index]
            with np.errstate(over="ignore", invalid="ignore"):  # what is too large for a norm is not finite
                norms = [float(np.linalg.norm(part, self.order)) / self.scales.get(name, 1.0) for part, name, _ in own]
                norm = float(np.linalg.norm(norms, self.order)) * (1 + CLIP_MARGIN)
            if not math.isfinite(norm):
                return np.zeros(len(clipped), dtype=np.float32)
            if norm > limit:
                for part, _, _ in own:
                    part *= limit / norm
        return clipped.astype(np.float32)

    def reach_of_sums(self, sums: np.ndarray, sizes: Mapping[str, int]) -> float:
        """The same of an update that is elsewhere, on a GPU say.

        Args:
            sums: float64 [parameters], Σ|x|^order over the values x of each, added up in float64 in any order.
            sizes: As for `reach`.
        """
        slack = _slack(sum(sizes.values()))
        if not self.scales and not self.blocks:
            whole = float(sums.sum())
            return (math.sqrt(whole) if self.order == 2 else whole) / self.norm * (1 + slack)
        self.require_parameters(sizes)
        by_parameter = sums / np.array([self.scales.get(name, 1.0) ** self.order for name in sizes])
        by_block = np.bincount(self.block_of(tuple(sizes)), by_parameter, minlength=len(self.limits))
        norms = np.sqrt(by_block) if self.order == 2 else by_block
        return float((norms / np.array(self.limits)).max()) * (1 + slack)

    def extreme(self, sizes: Mapping[str, int]) -> np.ndarray:
        """An update that uses up every limit: the worst case of noise that follows the clip, float64 [P].

        It lies in one coordinate of each block, the first of the parameter with the least scale.
        """
        starts = dict(zip(sizes, np.concatenate([[0], np.cumsum(list(sizes.values()))]).tolist(), strict=False))
        update = np.zeros(sum(sizes.values()))
        for index, limit in enumerate(self.limits):
            names = self.blocks[index].parameters if self.blocks else tuple(sizes)
            least = min(names, key=lambda name: self.scales.get(name, 1.0))
            update[starts[least]] = limit * self.scales.get(least, 1.0)
        return update

    def in_words(self) -> str:
        """The clip as the end of a sentence: "clipped to L2 norm 1"."""
        words = f"L{self.order} norm {self.norm:g}"
        if self.blocks:
            shares = _range([block.share for block in self.blocks])
            words = f"its share ({shares}) of {words}, in each of {len(self.blocks)} blocks of parameters by itself"
        if self.scales:
            words += f", after division by a scale for each parameter ({_range(list(self.scales.values()))})"
        return f"clipped to {words}"

    def to_json(self) -> str:
        """The clip as one line of JSON, for messages."""
        blocks = [[list(block.parameters), block.share] for block in self.blocks]
        return json.dumps({"norm": self.norm, "order": self.order, "scales": dict(self.scales), "blocks": blocks})

    @classmethod
    def from_json(cls, text: str) -> "Clip":
        """The clip that to_json wrote.

        Raises:
            InvalidInput: For a value that no clip may have.
        """
        values = json.loads(text)
        blocks = tuple(ClipBlock(parameters=tuple(names), share=share) for names, share in values["blocks"])
        return cls(norm=values["norm"], order=values["order"], scales=values["scales"], blocks=blocks)

    def _whole_share(self) -> float:
        return float(math.fsum(block.share**self.order for block in self.blocks) ** (1 / self.order))


def _slack(terms: int) -> float:
    """By how much, relatively, a norm of so many terms may be off.

    Adding them in any order takes less than 2^-53 of it a term; a scale, a power and a root take a few more.
    """
    return (terms + 32) * 2.0**-53


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if f"{low:g}" == f"{high:g}" else f"{low:g} to {high:g}"
