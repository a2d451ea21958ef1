"""Rényi accounting of the same run, for comparison: an upper bound that is looser than the tight pair's.

Per step and order α the Rényi divergence D_α(P‖Q) = log E_Q[(dP/dQ)^α] / (α − 1), the larger of both directions. It
adds up over steps, and is turned into ε at δ once, at the best order (Mironov 2017), by dp_accounting's conversion.
The divergences are integrated here: dp_accounting has none for Binomial mixtures, and for the Poisson-subsampled
Gaussian its own agree at whole orders and are larger between them.
"""

import math
from functools import lru_cache

import numpy as np
import scipy
from numpy.typing import NDArray

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import flatten
from fedsim.privacy.bounds import LooseBound
from fedsim.privacy.dominating_pairs import dominating_pair
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.gaussian_pairs import GaussianPair
from fedsim.validation import require_between

ORDERS = np.array([*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 96, 128, 256, 512, 1024], dtype=float)
REACH = 12.0
STEP = 0.25
MOST_NODES = 1 << 14


def renyi_epsilon(
    event: Event, delta: float, *, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER
) -> LooseBound:
    """ε at delta by Rényi accounting: an upper bound up to rounding, which certifies nothing here.

    Args:
        event: What is released.
        delta: 0 < δ < 1.
        adjacency: Which data sets count as neighbours.

    Raises:
        InvalidInput: For a δ outside (0, 1), or an event whose pair is not one of Gaussian mixtures.
    """
    require_between("delta", delta, 0, 1)
    divergences = np.zeros(len(ORDERS))
    for single, count in flatten(event).items():
        divergences += count * renyi_divergences(single, adjacency)
    from dp_accounting.rdp import compute_epsilon  # a second to import, for a comparison that few ask for

    value = float(compute_epsilon(list(ORDERS), list(divergences), delta)[0]) if divergences.any() else 0.0
    return LooseBound(value=value, method="Rényi")


@lru_cache(maxsize=16)
def renyi_divergences(event: Event, adjacency: Adjacency) -> NDArray[np.float64]:
    """Rényi divergences of one release at ORDERS, float64; the larger direction.

    Orders that would need too wide a quadrature are inf, which can only raise ε.

    Raises:
        InvalidInput: For an event whose pair is not one of Gaussian mixtures.
    """
    pair = dominating_pair(event, adjacency)
    if not isinstance(pair, GaussianPair):
        raise InvalidInput("event", event, "a release whose dominating pair is one of Gaussian mixtures")
    least, most = float(pair.below.means.min()), float(pair.above.means.max())
    values = np.full(len(ORDERS), math.inf)
    # (dP/dQ)^α Q leans by at most (α − 1)(most − least) beyond the outermost component.
    reach = [(order - 1) * (most - least) + REACH for order in ORDERS]
    allowed = [place for place, width in enumerate(reach) if most - least + 2 * width <= MOST_NODES * STEP]
    if not allowed:
        return values
    width = reach[allowed[-1]]
    step = min(STEP, 1 / (4 * max(most - least, 1e-9)))
    count = min(int((most - least + 2 * width) / step), MOST_NODES)
    nodes = np.linspace(least - width, most + width, count)
    losses, _ = pair.loss(nodes)
    ratio_below, _ = pair.below.log_ratio(nodes)
    log_below = ratio_below - nodes**2 / 2 - 0.5 * math.log(2 * math.pi) + math.log(nodes[1] - nodes[0])
    for place in allowed:
        order = ORDERS[place]
        forward = scipy.special.logsumexp(order * losses + log_below)
        backward = scipy.special.logsumexp((1 - order) * losses + log_below)
        values[place] = max(forward, backward, 0.0) / (order - 1)
    return values
