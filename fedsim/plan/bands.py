"""Over how many rounds to correlate noise: what each number of bands costs, and how much noise it leaves."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fedsim.errors import InvalidInput
from fedsim.plan.plan import Plan
from fedsim.privacy.calibration import PRECISION, calibrate_noise_multiplier
from fedsim.privacy.events import Adjacency, Composed, Event
from fedsim.privacy.ledger import NOTHING
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients
from fedsim.privacy.mechanisms.banded.workload import Workload, release_noise
from fedsim.sampling import CyclicPoisson, Poisson

AUTO: Literal["auto"] = "auto"
MOST_BANDS = 128
"""More are not looked for: the noise of so many rounds must be kept, and hardly anything is gained."""
LEAST_GAIN = 0.01
"""More bands must promise at least so much less noise, as a share."""


@dataclass(frozen=True, kw_only=True)
class BandsForecast:
    """What correlating noise over so many rounds promises, at one target.

    Attributes:
        bands: Rounds.
        coefficients: c, the best for the workload.
        noise_multiplier: σ that meets the target.
        error: σ times the noise that the workload makes of ‖c‖₂·x: root mean square over rounds of the standard
            deviation on one coordinate of the parameters, for a clip norm, a divisor and a learning rate of 1.
        ratio: That over the same for independent noise at the same target.
        release_ratio: Noise of a single release over that of independent noise: above 1 the more, the more cancels.
    """

    bands: int
    coefficients: tuple[float, ...]
    noise_multiplier: float
    error: float
    ratio: float
    release_ratio: float


def forecasts(
    make_event: Callable[[int, float], Event],
    candidates: Sequence[int],
    workload: Workload,
    *,
    epsilon: float,
    delta: float,
    adjacency: Adjacency,
    tolerance: float,
    precision: float = PRECISION,
    near: float | None = None,
) -> list[BandsForecast]:
    """What some numbers of bands promise, calibrated to the same target.

    Args:
        make_event: What the whole run releases, from bands and noise multiplier.
        candidates: Numbers of bands, ascending; 1 is added where it is not among them.
        workload: What the optimizer makes of the releases.
        epsilon, delta, adjacency: The target.
        tolerance: Relative tolerance of the calibration.
        precision: Relative precision of the noise multipliers.
        near: Where that of independent noise is expected.
    """
    wanted = sorted({1, *candidates})
    fitted = {bands: optimal_coefficients(bands, workload) for bands in wanted}
    found: list[BandsForecast] = []
    for bands in wanted:
        noise = calibrate_noise_multiplier(
            lambda value, bands=bands: make_event(bands, value),  # type: ignore[misc]
            epsilon=epsilon,
            delta=delta,
            adjacency=adjacency,
            tolerance=tolerance,
            precision=precision,
            near=found[-1].noise_multiplier if found else near,
        ).value
        error = noise * workload.error(fitted[bands])
        single = noise * release_noise(fitted[bands], workload.rounds)
        found.append(
            BandsForecast(
                bands=bands,
                coefficients=fitted[bands],
                noise_multiplier=noise,
                error=error,
                ratio=error / found[0].error if found else 1.0,
                release_ratio=single / found[0].noise_multiplier if found else 1.0,
            )
        )
    return found


def best(found: Sequence[BandsForecast]) -> BandsForecast:
    """The fewest bands that promise nearly the least noise."""
    least = min(forecast.error for forecast in found)
    return next(forecast for forecast in found if forecast.error <= least * (1 + LEAST_GAIN))


def in_words(found: Sequence[BandsForecast], used: int, optimizer: str, rounds: int) -> str:
    """What was expected of correlating noise, and so why it is done over so many rounds; empty where none was asked.

    Args:
        found: Forecasts, that of independent noise among them.
        used: Bands that the plan has.
        optimizer: The optimizer's name.
        rounds: T.
    """
    if not found:
        return ""
    others = ", ".join(f"{one.bands}: {one.ratio:.2f}" for one in found)
    each = f"Noise in what {optimizer} makes of {rounds} rounds' releases, predicted at the same ε by bands ({others})"
    if used == 1:
        return f"{each}: noise is independent from round to round, for more bands promise hardly less, or more."
    chosen = next(one for one in found if one.bands == used)
    words = f"{each}: noise is correlated over {used} rounds, which promises {chosen.ratio:.2f} times as much."
    if optimizer == "adam":
        words += (
            f" A single release carries {chosen.release_ratio:.2f} times as much, and Adam divides by that: its "
            "learning rate is multiplied by as much, so that its steps keep their size."
        )
    return words


def candidates_for(probability: float, rounds: int) -> list[int]:
    """Numbers of bands to look at: powers of two, as far as users suffice for so many groups.

    Args:
        probability: Of a unit to join a round, on average.
        rounds: T.
    """
    most = min(MOST_BANDS, rounds, math.floor(1 / probability * (1 + 1e-12)))
    return [1 << power for power in range(most.bit_length())]


def candidates_within(separation: int, rounds: int) -> list[int]:
    """The same where rounds of one user are so far apart anyway: up to that many, bands cost nothing."""
    most = min(MOST_BANDS, rounds, separation)
    return [*(bands for bands in candidates_for(1 / separation, rounds) if bands < most), most]


def wanted_bands(given: str | None, *, by_default: str) -> int | Literal["auto"]:
    """A number of bands, or AUTO, from an option's text.

    Raises:
        InvalidInput: For anything else.
    """
    text = by_default if given is None else given
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInput("plan.bands", text, "auto, or a number of rounds from 1")
    return int(text)


def with_bands(plan: Plan, bands: int, coefficients: tuple[float, ...]) -> Plan:
    """The plan with noise correlated over so many rounds; users of a Poisson plan take turns as that needs."""
    sampling = plan.sampling
    if bands > plan.scheme.separation and isinstance(sampling, Poisson | CyclicPoisson):
        sampling = CyclicPoisson(groups=bands)
    return dataclasses.replace(plan, sampling=sampling, noise_coefficients=coefficients)


@lru_cache(maxsize=64)
def forecasts_for(
    plan: Plan,
    bands: int | Literal["auto"],
    workload: Workload,
    *,
    epsilon: float,
    tolerance: float = 1e-3,
    precision: float = PRECISION,
    near: float | None = None,
    before: Event = NOTHING,
) -> tuple[BandsForecast, ...]:
    """What a plan may expect of so many bands, or of each number that is worth a look, beside independent noise.

    Args:
        plan: With independent noise; what it samples by, if not in turns long enough, is replaced by turns.
        bands: Their number, or AUTO.
        workload: What the optimizer makes of the plan's releases.
        epsilon: The target, at the plan's δ and adjacency.
        tolerance: Relative tolerance of the calibration.
        precision: Relative precision of the noise multipliers.
        near: Where that of independent noise is expected.
        before: What the target is to hold together with.
    """
    if bands == AUTO:
        fits = candidates_for(plan.sampling_probability, plan.steps)
        if plan.adjacency is Adjacency.REPLACE_ONE_USER or not plan.shares_its_noise():
            fits = [1]
        elif not isinstance(plan.sampling, Poisson):
            fits = candidates_within(plan.scheme.separation, plan.steps)
    else:
        fits = [bands]
    plain = (1.0,)

    def event(count: int, noise: float) -> Event:
        stand_in = plain + (0.0,) * (count - 1)  # what c is has no say in what is accounted
        with_noise = dataclasses.replace(with_bands(plan, count, stand_in), noise_multiplier=noise)
        return Composed(events=(before, with_noise.event()))

    target = {"epsilon": epsilon, "delta": plan.delta, "tolerance": tolerance, "precision": precision}
    return tuple(forecasts(event, fits, workload, **target, adjacency=plan.adjacency, near=near))
