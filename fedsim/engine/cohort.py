"""What workers' replies tell of a round's cohort, put together. All of it is private unless noised."""

import numpy as np

from fedsim.engine.kept import KeptPart
from fedsim.engine.work import PEAKS, Done

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the norms of units' updates before the clip."""
NORM_QUANTILE = "norm_quantile_"
"""How the statistic of a quantile is called, before its number."""


class Cohort:
    """The statistics of replies, taken in one after the other."""

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}
        self._norms: list[np.ndarray] = []

    def add(self, reply: Done | KeptPart) -> None:
        """Take in a reply: its numbers are added up, of PEAKS the largest stays."""
        for name, value in reply.statistics.items():
            known = self._numbers.get(name, 0.0)
            self._numbers[name] = max(known, value) if name in PEAKS else known + value
        self._norms.append(reply.norms)

    @property
    def statistics(self) -> dict[str, float]:
        """The numbers, and the norms' quantiles where any norm is known: interpolated between the nearest two."""
        norms = np.concatenate(self._norms) if self._norms else np.empty(0)
        if not len(norms):
            return dict(self._numbers)
        found = np.quantile(norms.astype(np.float64), QUANTILES)
        named = {
            f"{NORM_QUANTILE}{quantile:g}": float(value) for quantile, value in zip(QUANTILES, found, strict=True)
        }
        return self._numbers | named
