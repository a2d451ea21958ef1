"""Laws of a random inverse scale: sampler, moment generating function and tails, all of one definition.

A law is plain data, so that it can stand in an event, a file or a test: a tuple of components
(family, weight, first parameter, second parameter), whose weights sum to 1.

    ("gamma", w, shape, scale)              density ∝ s^(shape − 1) e^(−s/scale)
    ("exponential", w, rate, 0)             density ∝ e^(−rate · s)
    ("uniform", w, low, high)               0 ≤ low < high
    ("truncated-normal", w, mean, std)      N(mean, std²) given that it is positive
    ("point", w, value, 0)                  the constant value: plain Laplace noise
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from fedsim.errors import InvalidInput

Component = tuple[str, float, float, float]
Law = tuple[Component, ...]


@dataclass(frozen=True)
class _Family:
    """One family, by its tilted law: e^{tS} of a member, conditioned on S > x, is known in closed form.

    Attributes:
        tilted_tail: (first, second, t, x) → log E[e^{tS}; S > x], arrays t and x broadcast; +inf at or past a pole.
        tilted_mean: (first, second, t) → E[S e^{tS}] / E[e^{tS}] for t below the pole.
        distribution: (first, second) → frozen scipy distribution, which samples and gives quantiles.
        rescale: (first, second, factor) → parameters of factor · S.
        allowed: (first, second) → whether they are.
    """

    tilted_tail: Callable[..., np.ndarray]
    tilted_mean: Callable[..., np.ndarray]
    distribution: Callable[[float, float], Any]
    rescale: Callable[[float, float, float], tuple[float, float]]
    allowed: Callable[[float, float], bool]
    what: str


def check_law(law: Law) -> Law:
    """The law with plain numbers.

    Raises:
        InvalidInput: For an unknown family, a parameter out of range, or weights that do not sum to 1.
    """
    checked = []
    for component in law:
        if len(component) != 4 or component[0] not in FAMILIES:
            raise InvalidInput("law", component, "(family, weight, first, second) of " + ", ".join(FAMILIES))
        name, weight, first, second = component[0], *(float(value) for value in component[1:])
        family = FAMILIES[name]
        if not (weight > 0 and math.isfinite(first) and math.isfinite(second) and family.allowed(first, second)):
            raise InvalidInput("law", component, f"a {name} component with a weight above 0 and {family.what}")
        checked.append((name, weight, first, second))
    if not checked or abs(sum(component[1] for component in checked) - 1) > 1e-9:
        raise InvalidInput("law", law, "components whose weights sum to 1")
    return tuple(checked)


def log_mgf(law: Law, t: np.ndarray | float) -> np.ndarray:
    """log E[e^{tS}], float64 of t's shape; +inf at or past the first pole."""
    return log_tail(law, t, 0.0)


def log_tail(law: Law, t: np.ndarray | float, x: np.ndarray | float) -> np.ndarray:
    """log E[e^{tS}; S > x] for x ≥ 0, of the broadcast shape of t and x; −inf where S never exceeds x."""
    t, x = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(x, dtype=np.float64))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        parts = [math.log(w) + FAMILIES[name].tilted_tail(a, b, t, x) for name, w, a, b in law]
        logs: np.ndarray = np.logaddexp.reduce(np.stack(parts), axis=0)
        return logs


def log_mgf_slope(law: Law, t: np.ndarray | float) -> np.ndarray:
    """log E[S e^{tS}] for t ≤ 0: the logarithm of the moment generating function's derivative."""
    t = np.asarray(t, dtype=np.float64)
    parts = []
    for name, weight, first, second in law:
        family = FAMILIES[name]
        mean = family.tilted_mean(first, second, t)
        parts.append(math.log(weight) + family.tilted_tail(first, second, t, np.zeros_like(t)) + np.log(mean))
    logs: np.ndarray = np.logaddexp.reduce(np.stack(parts), axis=0)
    return logs


def sample_inverse_scales(law: Law, size: int | tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Independent draws of S, float64 of the given size."""
    choice = generator.choice(len(law), size=size, p=[component[1] for component in law])
    drawn = np.empty(choice.shape)
    for index, (name, _, first, second) in enumerate(law):
        chosen = choice == index
        drawn[chosen] = FAMILIES[name].distribution(first, second).rvs(size=int(chosen.sum()), random_state=generator)
    return drawn


def rescaled(law: Law, factor: float) -> Law:
    """The law of factor · S: noise divided by factor."""
    return tuple((name, weight, *FAMILIES[name].rescale(a, b, factor)) for name, weight, a, b in law)


def support(law: Law, outside: float) -> tuple[float, float]:
    """An interval outside which S lies with probability at most 2·outside."""
    frozen = [FAMILIES[name].distribution(a, b) for name, _, a, b in law]
    return (
        min(float(item.ppf(outside)) for item in frozen),
        max(float(item.isf(outside)) for item in frozen),
    )


class _Point:
    """The constant as a scipy distribution, as far as this file uses one."""

    def __init__(self, value: float) -> None:
        self._value = value

    def rvs(self, size: int, random_state: np.random.Generator) -> np.ndarray:
        return np.full(size, self._value)

    def ppf(self, _: float) -> float:
        return self._value

    isf = ppf

    def sf(self, x: np.ndarray) -> np.ndarray:
        return (self._value > np.asarray(x)).astype(np.float64)


def _gamma_tail(shape: float, scale: float, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    left = 1 - scale * t
    log_mgf = np.where(left > 0, -shape * np.log(np.where(left > 0, left, 1.0)), np.inf)
    inside = scipy.special.gammaincc(shape, np.where(left > 0, left, 1.0) * x / scale)
    return np.where(left > 0, log_mgf + np.log(inside), np.inf)


def _uniform_tail(low: float, high: float, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    start = np.clip(x, low, high)
    z = t * (high - start)
    # E[e^{tS}; S > x] = e^{end·t} · (high − start)/(high − low) · (1 − e^{−|z|})/|z|, end being the larger exponent's.
    size = np.abs(z)
    safe = np.where(size < 1e-8, 1.0, size)
    integral = np.where(size < 1e-8, 1 - size / 2, -np.expm1(-safe) / safe)
    result: np.ndarray = np.log((high - start) / (high - low)) + np.where(z < 0, start, high) * t + np.log(integral)
    return result


def _uniform_mean(low: float, high: float, t: np.ndarray) -> np.ndarray:
    # Mean of a truncated exponential on [low, high] with rate −t ≥ 0.
    z = -t * (high - low)
    small = np.abs(z) < 1e-4
    safe = np.where(small, 1.0, z)
    share = np.where(small, 0.5 - z / 12, 1 / safe - 1 / np.expm1(np.minimum(safe, 700.0)))
    return low + (high - low) * share


def _normal_tail(mean: float, std: float, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    z = mean / std + std * t
    w = z - np.maximum(x, 0) / std
    # E[e^{tS}; S > x] = e^{z²/2 − (mean/std)²/2} Φ(w)/Φ(mean/std); to the left e^{w²/2} Φ(w) = erfcx(−w/√2)/2 avoids
    # the difference of two large exponents.
    left = np.minimum(w, 0)
    far = (z - w) * (z + w) / 2 + np.log(scipy.special.erfcx(-left / math.sqrt(2)) / 2)
    near = mean * t + (std * t) ** 2 / 2 + scipy.special.log_ndtr(np.maximum(w, 0)) + (mean / std) ** 2 / 2
    result: np.ndarray = np.where(w < 0, far, near) - (mean / std) ** 2 / 2 - scipy.special.log_ndtr(mean / std)
    return result


def _normal_mean(mean: float, std: float, t: np.ndarray) -> np.ndarray:
    z = (mean + std**2 * t) / std
    # z + φ(z)/Φ(z), positive; far to the left its expansion −1/z + 2/z³ avoids the cancellation.
    far = z < -1e3
    near = np.where(far, 0.0, z)
    mills = np.exp(-(near**2) / 2 - math.log(2 * math.pi) / 2 - scipy.special.log_ndtr(near))
    left = np.where(far, z, -1.0)
    return std * np.where(far, -1 / left + 2 / left**3, near + mills)


def _point_tail(value: float, _: float, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.where(value > x, value * t, -np.inf)


FAMILIES = {
    "gamma": _Family(
        tilted_tail=_gamma_tail,
        tilted_mean=lambda shape, scale, t: shape * scale / (1 - scale * t),
        distribution=lambda shape, scale: scipy.stats.gamma(shape, scale=scale),
        rescale=lambda shape, scale, factor: (shape, scale * factor),
        allowed=lambda shape, scale: shape > 0 and scale > 0,
        what="shape and scale above 0",
    ),
    "exponential": _Family(
        tilted_tail=lambda rate, _, t, x: _gamma_tail(1.0, 1 / rate, t, x),
        tilted_mean=lambda rate, _, t: 1 / (rate - t),
        distribution=lambda rate, _: scipy.stats.gamma(1.0, scale=1 / rate),
        rescale=lambda rate, _, factor: (rate / factor, 0.0),
        allowed=lambda rate, _: rate > 0,
        what="a rate above 0",
    ),
    "uniform": _Family(
        tilted_tail=_uniform_tail,
        tilted_mean=_uniform_mean,
        distribution=lambda low, high: scipy.stats.uniform(low, high - low),
        rescale=lambda low, high, factor: (low * factor, high * factor),
        allowed=lambda low, high: 0 <= low < high,
        what="0 ≤ low < high",
    ),
    "truncated-normal": _Family(
        tilted_tail=_normal_tail,
        tilted_mean=_normal_mean,
        distribution=lambda mean, std: scipy.stats.truncnorm(-mean / std, np.inf, loc=mean, scale=std),
        rescale=lambda mean, std, factor: (mean * factor, std * factor),
        allowed=lambda mean, std: std > 0,
        what="a standard deviation above 0",
    ),
    "point": _Family(
        tilted_tail=_point_tail,
        tilted_mean=lambda value, _, t: np.full_like(t, value),
        distribution=lambda value, _: _Point(value),
        rescale=lambda value, _, factor: (value * factor, 0.0),
        allowed=lambda value, _: value > 0,
        what="a value above 0",
    ),
}
"""Families by name."""
