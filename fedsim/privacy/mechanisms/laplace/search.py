"""Offline search for the law of the inverse scale that makes Laplace noise most useful at a target (ε, δ).

The search sees no data: it runs before training, and its result is a small JSON file that can be shared. A reader does
not have to trust it: `read_noise_file` proves the guarantee again from the law alone.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import scipy

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace
from fedsim.privacy.mechanisms.laplace.inverse_scale import Law, check_law, log_mgf, rescaled
from fedsim.privacy.mechanisms.laplace.scalar import rdp_delta, scalar_delta
from fedsim.privacy.mechanisms.laplace.vector import laplace_curve
from fedsim.validation import require_at_least, require_between, require_positive

FORMAT = "fedsim-laplace-noise"
VERSION = 1
SLACK = 1e-9
"""Relative slack in δ when a file is checked, for rounding on another machine."""


@dataclass(frozen=True, kw_only=True)
class NoiseTarget:
    """What the noise must guarantee, and what it should be good at.

    Attributes:
        epsilon: ε of all releases together.
        delta: δ of all releases together.
        releases: How many releases are composed, without sampling.
        query: "number": one number of sensitivity 1. "l1-vector": a vector of L1 sensitivity 1.
        within: γ; usefulness is the probability that the noise on one coordinate stays within ±γ.
    """

    epsilon: float
    delta: float
    releases: int = 1
    query: Literal["number", "l1-vector"] = "number"
    within: float = 1.0

    def __post_init__(self) -> None:
        require_positive("epsilon", self.epsilon)
        require_between("delta", self.delta, 0, 1)
        require_at_least("releases", self.releases, 1)
        require_positive("within", self.within)
        if self.query not in ("number", "l1-vector"):
            raise InvalidInput("query", self.query, "number or l1-vector")

    def certified_delta(self, law: Law) -> float:
        """An upper bound on δ at epsilon: exact for one release, by Rényi composition for several."""
        if self.releases > 1:
            return rdp_delta(law, self.epsilon, self.releases)
        if self.query == "number":
            return scalar_delta(law, self.epsilon)
        return float(laplace_curve(RandomisedScaleLaplace(law=law), self.epsilon, remove=True))


@dataclass(frozen=True, kw_only=True)
class FoundNoise:
    """A law that meets a target.

    Attributes:
        target: The target.
        law: The law of the inverse scale, for sensitivity 1.
        delta: Certified δ at the target's ε; at most the target's.
        usefulness: Probability that the noise stays within ±target.within.
        laplace_usefulness: The same for plain Laplace noise at the same target.
        gaussian_usefulness: The same for Gaussian noise at the same target.
    """

    target: NoiseTarget
    law: Law
    delta: float
    usefulness: float
    laplace_usefulness: float
    gaussian_usefulness: float

    def write(self, path: str | Path) -> None:
        """Write the file."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=2)
        Path(path).write_text(text + "\n")


def usefulness(law: Law, within: float) -> float:
    """Pr[|X| ≤ within] = 1 − M(−within)."""
    return float(-np.expm1(log_mgf(law, -within)))


def search_noise(target: NoiseTarget, *, seed: int = 0, generations: int = 40) -> FoundNoise:
    """The most useful mixture of gamma, exponential, uniform and truncated normal inverse scales for a target.

    Every candidate is scaled to meet the target exactly, so the search compares usefulness alone. A plain Laplace law
    is among the candidates: the result is never worse.

    Args:
        target: Guarantee and objective.
        seed: Seed of the search.
        generations: Generations of differential evolution (Storn and Price 1997).

    Raises:
        InvalidInput: When no scale of any candidate meets the target.
    """

    def cost(vector: np.ndarray) -> float:
        fitted = _fit(_candidate(vector), target, precision=1e-4)
        return 1.0 if fitted is None else -usefulness(fitted, target.within)

    found = scipy.optimize.differential_evolution(
        cost, _BOUNDS, maxiter=generations, popsize=6, seed=seed, polish=False, tol=1e-6, init="sobol"
    )
    plain = _fit((("point", 1.0, 1.0, 0.0),), target)
    mixed = _fit(_pruned(_candidate(found.x)), target)
    laws = [law for law in (mixed, plain) if law is not None]
    if not laws:
        raise InvalidInput(
            "epsilon", target.epsilon, "reachable by some noise", "Raise ε or δ, or release less often."
        )
    best = max(laws, key=lambda law: usefulness(law, target.within))
    return FoundNoise(
        target=target,
        law=best,
        delta=target.certified_delta(best),
        usefulness=usefulness(best, target.within),
        laplace_usefulness=0.0 if plain is None else usefulness(plain, target.within),
        gaussian_usefulness=_gaussian_usefulness(target),
    )


def read_noise_file(path: str | Path) -> FoundNoise:
    """Read a file and prove its guarantee again.

    Raises:
        InvalidInput: When it is no such file, or its law does not meet the target it names.
    """
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput("noise file", str(path), f"a readable JSON file ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise InvalidInput("noise file", str(path), f"a {FORMAT} file of version {VERSION}")
    try:
        target = NoiseTarget(**values["target"])
        law = check_law(tuple(tuple(component) for component in values["law"]))
    except (KeyError, TypeError) as error:
        raise InvalidInput("noise file", str(path), f"complete: {error}") from None
    delta = target.certified_delta(law)
    if not delta <= target.delta * (1 + SLACK):
        raise InvalidInput(
            "noise file", str(path), "true to its target", f"Its law has δ({target.epsilon:g}) = {delta:.3g}."
        )
    measures = {name: float(values[name]) for name in ("laplace_usefulness", "gaussian_usefulness") if name in values}
    return FoundNoise(
        target=target,
        law=law,
        delta=delta,
        usefulness=usefulness(law, target.within),
        laplace_usefulness=measures.get("laplace_usefulness", math.nan),
        gaussian_usefulness=_gaussian_usefulness(target),
    )


_BOUNDS = [(0.0, 5.0), (-4.0, 2.0), (-3.0, 3.0), (-4.0, 2.0), (-4.0, 2.0), (-3.0, 2.0), (-4.0, 1.0)] + [
    (-6.0, 6.0)
] * 3
"""log of gamma shape and scale, exponential rate, uniform low and width, normal mean and std; three log weights."""


def _candidate(vector: np.ndarray) -> Law:
    sizes = np.exp(vector[:7])
    weights = np.exp(np.append(vector[7:], 0.0))
    weights /= weights.sum()
    shape, scale, rate, low, width, mean, std = map(float, sizes)
    return (
        ("gamma", float(weights[0]), shape, scale),
        ("exponential", float(weights[1]), rate, 0.0),
        ("uniform", float(weights[2]), low, low + width),
        ("truncated-normal", float(weights[3]), mean, std),
    )


def _pruned(law: Law) -> Law:
    """Without components of a weight below one in a thousand, and rounded to what a person can read."""
    kept = [component for component in law if component[1] >= 1e-3]
    total = sum(component[1] for component in kept)
    rounded = [(name, round(weight / total, 4), float(f"{a:.5g}"), float(f"{b:.5g}")) for name, weight, a, b in kept]
    first = 1.0 - sum(weight for _, weight, _, _ in rounded[1:])
    return ((rounded[0][0], first, *rounded[0][2:]), *rounded[1:])


def _fit(law: Law, target: NoiseTarget, precision: float = 1e-7) -> Law | None:
    """The law scaled to the least noise that meets the target; None where no scale does."""

    def excess(log_factor: float) -> float:
        delta = target.certified_delta(rescaled(law, math.exp(log_factor)))
        return math.log(max(delta, 1e-300)) - math.log(target.delta)

    low, high = -12.0, 4.0
    if excess(low) > 0 or excess(high) < 0:
        return None
    root = float(scipy.optimize.brentq(excess, low, high, xtol=precision))
    while excess(root) > 0:
        root -= precision
    return rescaled(law, math.exp(root))


def _gaussian_usefulness(target: NoiseTarget) -> float:
    """Pr[|N(0, σ²)| ≤ within] with the least σ that meets the target exactly (Balle and Wang 2018)."""

    def excess(log_mu: float) -> float:
        mu, epsilon = math.exp(log_mu), target.epsilon
        log_lost = epsilon + scipy.stats.norm.logcdf(-epsilon / mu - mu / 2)
        return float(scipy.stats.norm.cdf(-epsilon / mu + mu / 2) - np.exp(log_lost)) - target.delta

    mu = math.exp(float(scipy.optimize.brentq(excess, -12.0, 5.0)))
    sigma = math.sqrt(target.releases) / mu
    return float(1 - 2 * scipy.stats.norm.sf(target.within / sigma))
