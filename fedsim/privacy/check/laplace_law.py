"""The privacy loss of a release with Laplace noise of a random, revealed inverse scale, as weighted points.

Given the inverse scale s, the worst case is one number moved by K ~ Binomial(G, p) (see the event): with x the
released number, P has density Σ w_k s/2 e^{−s|x−k|} and Q has s/2 e^{−s|x|}. The loss is constant for x ≤ 0 and for
x ≥ G, hence an atom at either end, and smooth between whole numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from fedsim.privacy.check.loss_laws import (
    Direction,
    Floats,
    LossLaw,
    LossPoints,
    NotCheckable,
    binomial_shares,
    loss_law,
    panels,
)
from fedsim.privacy.events import Adjacency
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace

DENSITIES: dict[str, Callable[[float, float], Any]] = {
    "gamma": lambda shape, scale: scipy.stats.gamma(shape, scale=scale),
    "exponential": lambda rate, _: scipy.stats.expon(scale=1 / rate),
    "uniform": lambda low, high: scipy.stats.uniform(low, high - low),
    "truncated-normal": lambda mean, std: scipy.stats.truncnorm(-mean / std, np.inf, loc=mean, scale=std),
}
"""Laws of the inverse scale by their names in events; a point is a constant."""


@loss_law.register
def _laplace(event: RandomisedScaleLaplace, adjacency: Adjacency) -> LossLaw:
    if adjacency is not Adjacency.ADD_OR_REMOVE_ONE_USER:
        raise NotCheckable("adjacency", adjacency.value, Adjacency.ADD_OR_REMOVE_ONE_USER.value)
    if event.group_size > 1 and any(name != "point" for name, *_ in event.law):
        # The mechanism rounds such laws, and its event does not say how.
        raise NotCheckable("law", event.law, "of points where a user may contribute several times")
    return RevealedLaplace(event.law, binomial_shares(event.group_size, event.sampling_probability))


@dataclass(frozen=True)
class RevealedLaplace:
    """Σ w_k Lap(k, 1/S) against Lap(0, 1/S), S revealed.

    Attributes:
        law: Components (family, weight, first, second) of the law of S.
        shares: w_0 … w_G.
    """

    law: tuple[tuple[str, float, float, float], ...]
    shares: Floats

    @property
    def symmetric(self) -> bool:
        """One contribution, always."""
        return len(self.shares) == 2 and self.shares[0] == 0

    def greatest(self, direction: Direction) -> float:
        """What the largest inverse scale reveals at one end."""
        largest = 0.0
        for name, _, first, second in self.law:
            largest = max(largest, {"point": first, "uniform": second}.get(name, np.inf))
        if direction == "remove":
            return float(self._end(largest, 1)) if np.isfinite(largest) else np.inf
        with np.errstate(divide="ignore"):
            return -float(self._end(largest, -1)) if np.isfinite(largest) else -float(np.log(self.shares[0]))

    def points(self, direction: Direction, ahead: float, behind: float, fineness: float) -> LossPoints:
        """Gauss–Legendre panels in x for each inverse scale, and in the inverse scale."""
        pieces: list[tuple[Floats, Floats, Floats]] = []
        atoms: list[tuple[float, float]] = []
        last: list[int] = []
        for name, weight, first, second in self.law:
            if name == "point":
                pieces.append(self._between(first, np.log(weight), fineness))
                atoms += [self._atom(first, side, np.log(weight), direction) for side in (-1, 1)]
                continue
            scales, logs = _inverse_scales(name, first, second, 1 + ahead / 10, fineness)
            for scale, log in zip(scales, logs + np.log(weight), strict=True):
                pieces.append(self._between(scale, log, fineness / 8))
                ends = np.array([self._atom(scale, side, log, direction) for side in (-1, 1)]).T
                sign = 1 if direction == "remove" else -1
                pieces.append((sign * ends[0], ends[1], ends[1]))
            if name != "uniform":
                last.append(sum(len(piece[0]) for piece in pieces) - 1)
        losses, under_p, under_q = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        logs = under_p if direction == "remove" else under_q
        return LossPoints(
            losses if direction == "remove" else -losses,
            logs,
            np.zeros_like(losses),
            tuple(atoms),
            ahead=np.array(last, dtype=int),
            behind=np.empty(0, dtype=int),
        )

    def _between(self, s: float, log: float, fineness: float) -> tuple[Floats, Floats, Floats]:
        """Losses between 0 and G, and their log probabilities under P and Q, times e^log."""
        top = len(self.shares) - 1
        count = int(np.ceil(max(4.0, 8 * s) * fineness))
        x, steps = panels(np.linspace(0, top, top * count + 1))
        losses = self._loss(s, x)
        under_q = np.log(s / 2) - s * x + np.log(steps) + log
        return losses, under_q + losses, under_q

    def _atom(self, s: float, side: int, log: float, direction: Direction) -> tuple[float, float]:
        """The loss at x ≤ 0 (side −1) or x ≥ G (1) and its log probability, times e^log, in one direction."""
        loss = self._end(s, side)
        under_q = -np.log(2) - (s * (len(self.shares) - 1) if side > 0 else 0.0) + log
        return (loss, under_q + loss) if direction == "remove" else (-loss, under_q)

    def _end(self, s: float, side: int) -> float:
        return float(self._loss(s, np.array([0.0 if side < 0 else len(self.shares) - 1.0]))[0])

    def _loss(self, s: float, x: Floats) -> Floats:
        k = np.arange(len(self.shares), dtype=np.float64)[:, None]
        with np.errstate(divide="ignore"):
            loss: Floats = scipy.special.logsumexp(s * (np.abs(x) - np.abs(x - k)), b=self.shares[:, None], axis=0)
        return loss


def _inverse_scales(name: str, first: float, second: float, further: float, fineness: float) -> tuple[Floats, Floats]:
    """Points for one family's law, and their log probabilities."""
    law = DENSITIES[name](first, second)
    if name == "uniform":
        edges = np.linspace(first, second, int(4 * fineness) + 1)
    else:
        last = float(law.isf(1e-20)) * further
        near = np.append(0.0, np.geomspace(last * 2.0**-20, last / 8, int(10 * fineness)))
        edges = np.append(near, np.linspace(last / 8, last, int(8 * fineness) + 1)[1:])
    scales, steps = panels(edges)
    with np.errstate(divide="ignore"):
        return scales, law.logpdf(scales) + np.log(steps)
