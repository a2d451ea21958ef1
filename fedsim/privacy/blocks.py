"""Blocks of releases: some copies of a measure composed, and put on a coarser grid.

The grid that one of very many releases needs is far finer than their composition needs. Composed in blocks, each on a
grid about as coarse as its block is wide, ten million releases cost two or three short FFTs. All steps take the same
tilt θ, and each errs in a known direction. For a measure above: every place gets its rounding error on top, mass below
the window moves up to its first place, mass above it becomes infinite, and each mass is spread to the neighbouring
points of the coarser grid with its P- and Q-mass kept (connect the dots). For one below: every place loses its error
and all that may have been wrapped around, mass outside is left out, and cells are merged by threes.
"""

import numpy as np

from fedsim.privacy.composition import TiltedMass, convolve
from fedsim.privacy.loss_cells import Floats, GridMeasure, two_points
from fedsim.privacy.tilting import EPS, Atoms, Tilts, infinite_mass, log_moments, moment_rounding, provable

BLOCK_CELLS = 2**16
"""About how many cells a block's window may have."""
OUTSIDE = 40.0
"""Minus the log of the tilted mass that may lie outside a block's window, on either side."""


def coarsened(
    measure: GridMeasure, count: int, plan: Atoms, factor: int, tilt: float, tail: float, *, above: bool
) -> list[tuple[GridMeasure, int]]:
    """Measures on a grid that is coarser by a factor, which together stand for count copies of one.

    Args:
        measure: One release.
        count: Its copies.
        plan: A sketch of it.
        factor: Coarse spacing over fine, a power of two.
        tilt: θ of the composition.
        tail: Probability that all copies together may lose to an infinite loss.
        above: Whether the measure lies above the release's, and the result must, too; or below.
    """
    parts: list[tuple[GridMeasure, int]] = []
    together = 1
    while factor > 1:
        step = _step(plan, together, measure.spacing, factor, tilt)
        size = min(step * step, count)
        blocks, rest = divmod(count, size)
        # What is left over goes all the way to the coarse grid at once.
        if rest:
            parts.append((_block(measure, rest, plan, together, factor, tilt, tail * rest / count, above), 1))
        if blocks == 1:
            step = factor
        measure = _block(measure, size, plan, together, step, tilt, tail / blocks, above)
        together, count, factor = together * size, blocks, factor // step
    return [(measure, count), *parts]


def _step(plan: Atoms, together: int, spacing: float, factor: int, tilt: float) -> int:
    """The largest power of two by which a block's grid may be coarsened so that its window stays small."""
    step = 2
    while step < factor and block_width(plan, together * 4 * step * step, tilt) <= BLOCK_CELLS * spacing:
        step *= 2
    return step


def block_width(plan: Atoms, copies: int, tilt: float) -> float:
    """About how wide the window of a block of so many copies is."""
    low, high = block_window(plan, copies, tilt)
    return high - low


def block_window(plan: Atoms, copies: int, tilt: float) -> tuple[float, float]:
    """About where a block's window begins and ends; what lies below weighs nothing even if moved to its beginning."""
    parts = [(plan, copies)]
    tilts = provable(parts, tilt, OUTSIDE, least=tilt)
    low, base, high = log_moments(parts, tilt + np.array([-tilts.low, 0.0, tilts.high]))
    return float(-(low - base + OUTSIDE) / tilts.low), float((high - base + OUTSIDE) / tilts.high)


def _block(
    measure: GridMeasure,
    copies: int,
    plan: Atoms,
    together: int,
    factor: int,
    tilt: float,
    tail: float,
    above: bool,
) -> GridMeasure:
    """Copies of a measure, composed and put on a grid coarser by a factor."""
    parts = [(measure, copies)]
    tilts = provable([(plan, copies * together)], tilt, OUTSIDE, least=tilt)
    moments = log_moments(parts, tilt + np.array([-tilts.low, 0.0, tilts.high]))
    low = -(moments[0] - moments[1] + OUTSIDE) / tilts.low
    high = (moments[2] - moments[1] + OUTSIDE) / tilts.high
    if above:
        high = max(high, (moments[2] - np.log(tail)) / (tilt + tilts.high))
    tilted = convolve(parts, tilt, low, high, multiple=3 * factor)
    slack = 16 * EPS * (8 + factor + abs(tilted.base) + tilt * float(np.abs(tilted.losses[[0, -1]]).max()))
    if not above:
        return _block_below(tilted, copies * measure.shift, factor, tilts, slack)
    # Moved up to the first place, mass below the window may weigh more, but no more than this: tilts.low ≥ θ.
    rounding = 1e-6 + 2 * moment_rounding(parts, tilt + tilts.high)
    first = float(np.exp(min(moments[0] - moments[1] + tilts.low * tilted.losses[0] + rounding, 0.0)))
    lost = float(np.exp(min(moments[2] - (tilt + tilts.high) * high + rounding, 0.0)))
    infinite = infinite_mass(parts) + lost
    return _block_above(tilted, copies * measure.shift, factor, tilts, slack, first, infinite)


def _block_above(
    tilted: TiltedMass, shift: float, factor: int, tilts: Tilts, slack: float, first: float, infinite: float
) -> GridMeasure:
    spacing = float(tilted.losses[1] - tilted.losses[0])
    masses = np.maximum(tilted.masses, 0.0) + tilted.doubt
    masses[0] += first
    rows = masses.reshape(-1, factor)
    within = spacing * np.arange(factor)
    share = np.expm1(-within) / np.expm1(-factor * spacing)
    coarse = np.zeros(len(rows) + 1)
    coarse[:-1] += rows @ ((1 - share) * np.exp(-tilts.middle * within))
    coarse[1:] += rows @ (share * np.exp(tilts.middle * (factor * spacing - within)))
    return _untilted(
        coarse * (1 + slack), tilted, float(tilted.losses[0]), factor * spacing, tilts, infinite, shift, 1
    )


def _block_below(tilted: TiltedMass, shift: float, factor: int, tilts: Tilts, slack: float) -> GridMeasure:
    spacing = float(tilted.losses[1] - tilted.losses[0])
    wrapped = 2 * np.exp(-tilts.outside + 1e-3)
    masses = np.pad(np.maximum(tilted.masses - tilted.doubt - wrapped, 0.0) * (1 - slack), 3 * factor)
    # Three cells of `factor` places each, the last place of a cell on its upper edge. The most likely place comes to
    # lie on an inner edge: a single place with much mass is no spread that could cover anything, and would move down.
    peak = int(np.argmax(masses))
    begin = (peak - factor + 1) % (3 * factor)
    usable = (len(masses) - begin) // (3 * factor) * (3 * factor)
    rows = masses[begin : begin + usable].reshape(-1, 3, factor)
    place = spacing * (np.arange(3 * factor).reshape(3, factor) - (factor - 1))
    untilted = rows * np.exp(-tilts.middle * place)
    p, z = untilted.sum(axis=2), (untilted * np.exp(-np.maximum(place, -300.0))).sum(axis=2)
    total = p.sum(axis=1)
    doubt = 32 * factor * EPS * total
    upper, good = two_points(p, z, doubt, 4 * doubt, float(np.exp(-factor * spacing)))
    good &= factor * spacing < 300
    coarse = np.zeros(3 * len(rows) + 1)
    inner = 1 + 3 * np.arange(len(rows))
    coarse[inner[good]] += (total - doubt - upper)[good]
    coarse[inner[good] + 1] += (upper * np.exp(tilts.middle * factor * spacing))[good]
    bad = ~good
    for cell in range(3):
        at_edge, within = untilted[bad, cell, -1], untilted[bad, cell, :-1].sum(axis=1)
        # A place on an edge stays there; the others of the cell go down to the lower one.
        coarse[inner[bad] + cell] += at_edge * np.exp(tilts.middle * spacing * factor * cell)
        coarse[inner[bad] + cell - 1] += within * np.exp(tilts.middle * spacing * factor * (cell - 1))
    origin = float(tilted.losses[0] + spacing * (begin - 1 - 3 * factor))
    return _untilted(np.maximum(coarse, 0) * (1 - slack), tilted, origin, factor * spacing, tilts, 0.0, shift, -1)


def _untilted(
    coarse: Floats,
    tilted: TiltedMass,
    origin: float,
    spacing: float,
    tilts: Tilts,
    infinite: float,
    shift: float,
    sign: int,
) -> GridMeasure:
    losses = origin + spacing * np.arange(len(coarse))
    with np.errstate(divide="ignore"):
        log_masses = np.log(coarse) + tilted.base - tilts.middle * losses
    moved = sign * 8 * EPS * float(np.abs(losses[[0, -1]]).max())
    return GridMeasure(origin, spacing, log_masses, infinite, shift + moved)
