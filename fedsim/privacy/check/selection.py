"""δ of the best of a secret number of runs from that of one, by the theorem of `fedsim.privacy.selection`.

E[K] follows here from the slope of the generating function, f′(x) ∝ (1 − (1 − γ)x)^−(η+1), and from f(1) − f(0) = 1,
by quadrature; ε̂ is a root.
"""

import math
from collections import Counter
from collections.abc import Callable

from scipy.integrate import quad
from scipy.optimize import brentq

from fedsim.privacy.best_of import BestOf
from fedsim.privacy.check.contour import CheckedDelta
from fedsim.privacy.events import Event


def selection_of(case: Counter[Event]) -> BestOf | None:
    """The selection that is all of a case; None where the case holds none, or something else beside it."""
    if len(case) != 1:
        return None
    ((event, count),) = case.items()
    return event if isinstance(event, BestOf) and count == 1 else None


def expected_runs(eta: float, gamma: float) -> float:
    """E[K]: f′(1) over the integral of f′ from 0 to 1, in which u stands for −log(1 − (1 − γ)x)."""
    high = -math.log(gamma)
    area, _ = quad(lambda u: math.exp(eta * (u - high)), 0.0, high, epsabs=0.0, epsrel=1e-12, limit=200)
    return float(math.exp(high) * (1 - gamma) / area)


def best_of_delta(event: BestOf, epsilon: float, of_run: Callable[[float], CheckedDelta]) -> CheckedDelta:
    """δ of the release at ε, as the theorem bounds it.

    Args:
        event: The selection.
        epsilon: ε.
        of_run: δ of one run at an ε, the worst of what it may release.
    """
    runs, odds = expected_runs(event.eta, event.gamma), event.gamma / (1 - event.gamma)

    def excess(at: float) -> float:
        return of_run(at).value - odds * math.expm1(at)

    high = -math.log(event.gamma)
    apart = brentq(excess, 0.0, high, xtol=1e-12) if excess(0.0) > 0 and excess(high) < 0 else 0.0
    if excess(high) >= 0:
        apart = high
    once = of_run(max(epsilon - (event.eta + 1) * apart, 0.0))
    return CheckedDelta(min(1.0, runs * once.value), runs * once.error)
