"""How a composition is computed: the tilt, how fine each release's grid is, and which are composed in blocks first.

A sketch of each loss says where the answer lies, by a Chernoff bound that certifies by itself. From it follow the
tilt, the window, and the grids: one of spacing h raises the log-moment at θ of T releases by about θ(1 + θ)·T·h²/12
above and lowers it by about three times that below, where h is small; where losses are so large that h is not, each
release is rounded by up to h.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsim.privacy.blocks import BLOCK_CELLS, block_width, block_window, coarsened
from fedsim.privacy.composition import Parts
from fedsim.privacy.dominating_pairs import LossPair
from fedsim.privacy.loss_cells import GridMeasure, LossSketch
from fedsim.privacy.loss_grid import grid_measures, sketch
from fedsim.privacy.tilting import Tilts, best_tilt, find_window, log_kernel, tilted_deviation

Pairs = Sequence[tuple[LossPair, int]]
MOST_CELLS = 2**20
"""Cells of one release's grid: some 0.3 GB at most."""
MOST_WINDOW = 2**21
"""Cells of the composed window."""
SHORT_WINDOW = 2**17
"""Releases are composed in blocks where their window would have more cells than this."""
BLOCKED_WINDOW = 2**15
"""Cells of the window of blocks."""
FEWEST_CELLS = 256
ATTEMPTS = 8
"""How often the ends of a release's grid are moved out after a better guess of δ; each lies far below the last."""


@dataclass(frozen=True)
class Plan:
    """What is known of a composition before a grid is laid.

    Attributes:
        pairs: What is composed, and how often.
        swapped: Whether the loss is that of Q against P.
        tail: Probability that may lie beyond either end of one release's grid.
        ranges: Losses of P against Q beyond which so little lies, for each release.
        sketches: A sketch of each loss, and how often it is taken.
        tilt: The tilt of the best Chernoff bound.
        bound: That bound, of ε or of log δ.
        most_cells: Cells that one release's grid may have.
    """

    pairs: Pairs
    swapped: bool
    tail: float
    ranges: list[tuple[float, float]]
    sketches: list[tuple[LossSketch, int]]
    tilt: float
    bound: float
    most_cells: int = MOST_CELLS

    def aimed(self, *, epsilon: float | None = None, delta: float | None = None) -> "Plan":
        """The plan for another point of the same curve, whose δ is no smaller."""
        tilt, bound = best_tilt(self.sketches, epsilon=epsilon, delta=delta)
        return replace(self, tilt=tilt, bound=bound)

    def guess(self, *, of_delta: bool) -> float:
        """About log δ, or ε, where the plan's bound is of it: a saddle-point estimate."""
        deviation = tilted_deviation(self.sketches, self.tilt)
        prefactor = -np.log(self.tilt * (1 + self.tilt) * np.sqrt(2 * np.pi) * max(deviation, 1e-300))
        better = min(float(prefactor) - log_kernel(self.tilt), 0.0)
        return self.bound + (better if of_delta else better / self.tilt)

    def layout(self, room: float, tilts: Tilts, epsilon: float, *, blocks: bool) -> "Layout":
        """One grid for the composition, and how much finer each release's own is.

        Where the composed window would have too many cells on the finest grid, releases are composed in blocks first.

        Args:
            room: How far ε may be off for the grids' sake.
            tilts: The tilts of the composition.
            epsilon: About ε.
            blocks: Whether blocks are worth while; else they are left to windows that would not fit without.
        """
        ends = self._ends(tilts)
        reach = max(high - low for low, high in ends)
        width = find_window(self.sketches, tilts, epsilon).width
        spacings = [
            self._spacing(room, count, high - low) for (_, count), (low, high) in zip(self.pairs, ends, strict=True)
        ]
        finest = min(spacings)
        if width <= SHORT_WINDOW * finest and reach <= self.most_cells * finest:
            return Layout(min(finest, width / FEWEST_CELLS), [1] * len(spacings), ends, tilts.middle)
        coarsest = max(finest, 1.02 * reach / self.most_cells)
        longest = min(MOST_WINDOW, 8 * self.most_cells)
        for cells in (BLOCKED_WINDOW, longest) if blocks else (longest,):
            common = max(width / cells, coarsest)
            factors = [self._factor(common, place, spacing, tilts.middle) for place, spacing in enumerate(spacings)]
            if 0 not in factors:
                break
        return Layout(common, [factor or 1 for factor in factors], ends, tilts.middle)

    def measures(self, layout: "Layout") -> tuple[Parts, Parts]:
        """Measures above and below every loss, on the layout's grid."""
        above: list[tuple[GridMeasure, int]] = []
        below: list[tuple[GridMeasure, int]] = []
        for (pair, count), (sketched, _), factor, ends in zip(
            self.pairs, self.sketches, layout.factors, layout.ends, strict=True
        ):
            upper, lower = grid_measures(pair, layout.spacing / factor, ends, swapped=self.swapped)
            given = count, sketched, factor, layout.tilt, self.tail * count
            above += coarsened(upper, *given, above=True)
            below += coarsened(lower, *given, above=False)
        return above, below

    def _ends(self, tilts: Tilts) -> list[tuple[float, float]]:
        """Which losses each release's grid must reach, so that what lies beyond is nothing under the tilt."""
        found = []
        for (sketched, _), (low, high) in zip(self.sketches, self.ranges, strict=True):
            least = block_window(sketched, 1, tilts.middle)[0]
            found.append(
                (low, min(high, max(-least, low + 1e-9))) if self.swapped else (max(low, min(least, high)), high)
            )
        return found

    def _factor(self, common: float, place: int, spacing: float, tilt: float) -> int:
        """How much finer than the common grid a release's own is, a power of two; 0 if its blocks were too long."""
        sketched, count = self.sketches[place]
        factor = 1 << max(int(np.ceil(np.log2(common / spacing))), 0)
        if factor == 1 or block_width(sketched, min(count, 64), tilt) <= 4 * BLOCK_CELLS * common / factor:
            return factor
        return 0

    def _spacing(self, room: float, count: int, reach: float) -> float:
        """How fine a release's grid must be for its copies to put ε off by no more than their share of the room."""
        room /= len(self.pairs)
        fine = float(np.sqrt(2 * room / ((1 + self.tilt) * count)))
        return max(min(fine, 0.25), room / (1.5 * count), 1.02 * reach / self.most_cells)


@dataclass(frozen=True)
class Layout:
    """Grids for a composition.

    Attributes:
        spacing: Distance of neighbouring losses of what is composed at last.
        factors: How much finer each release's own grid is, a power of two.
        ends: Losses of P against Q that each release's grid must reach.
        tilt: The tilt of the composition.
    """

    spacing: float
    factors: list[int]
    ends: list[tuple[float, float]]
    tilt: float

    @property
    def finest(self) -> float:
        """The spacing of the finest grid."""
        return self.spacing / max(self.factors)


def make_plan(
    pairs: Pairs, *, epsilon: float | None = None, delta: float | None = None, swapped: bool = False
) -> Plan:
    """The plan for ε at a δ, or δ at an ε."""
    turns = sum(count for _, count in pairs)
    log_delta = float(np.log(delta or 1e-12))
    for _ in range(ATTEMPTS):
        tail = max(1e-7 * float(np.exp(log_delta)) / turns, 1e-290)
        ranges = [pair.loss_range(tail) for pair, _ in pairs]
        sketches = [
            (sketch(pair, ends, swapped=swapped), count) for (pair, count), ends in zip(pairs, ranges, strict=True)
        ]
        tilt, bound = best_tilt(sketches, epsilon=epsilon, delta=delta)
        # How far the grid must reach for the δ at an ε is known only now.
        if delta is not None or bound > log_delta - 7 or tail <= 1e-290:
            return Plan(pairs, swapped, tail, ranges, sketches, tilt, bound)
        log_delta = bound - 5
    return Plan(pairs, swapped, tail, ranges, sketches, tilt, bound)
