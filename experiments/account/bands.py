"""`account --bands`: what noise correlated over rounds costs, and how much of it is left in sums of releases."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fedsim.errors import InvalidInput
from fedsim.plan.bands import AUTO, BandsForecast, best, forecasts
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.mechanisms.banded.workload import Workload

ROUGH = 0.01
"""Relative tolerance on ε where numbers of bands are compared."""


def most_bands(probability: float) -> int:
    """As many groups of users as suffice for rounds that take a unit with this probability on average."""
    return math.floor(1 / probability * (1 + 1e-12))


def bands_from(text: str, most: int, steps: int) -> int | Literal["auto"]:
    """A number of bands, or AUTO.

    Args:
        text: What was asked for.
        most: Groups of users that take turns, or that there are users for.
        steps: T.

    Raises:
        InvalidInput: For anything else, or more bands than there are steps or groups for.
    """
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInput("bands", text, "auto, or a number of rounds from 1")
    bands = int(text)
    if bands > steps:
        raise InvalidInput("bands", bands, f"at most the {steps} steps there are")
    if bands > most:
        allowed = f"at most {most}: one over the sampling probability, or --groups with --sampling none"
        raise InvalidInput("bands", bands, allowed, "A round takes users of one group.")
    return bands


def least_noise(
    make_event: Callable[[int, float], Event],
    candidates: Sequence[int],
    steps: int,
    *,
    epsilon: float,
    delta: float,
) -> BandsForecast:
    """The number of bands that leaves the least noise in prefix sums, at a target.

    Args:
        make_event: What all steps release, from bands and noise multiplier.
        candidates: Numbers of bands to look at.
        steps: T.
        epsilon, delta: The target.
    """
    return best(
        forecasts(
            make_event,
            candidates,
            Workload.prefix_sums(steps),
            epsilon=epsilon,
            delta=delta,
            adjacency=Adjacency.ADD_OR_REMOVE_ONE_USER,
            tolerance=ROUGH,
        )
    )


def noise_left(
    make_event: Callable[[int, float], Event],
    bands: int,
    steps: int,
    *,
    epsilon: float,
    delta: float,
    tolerance: float,
) -> dict[str, Any]:
    """What is printed of correlated noise, as JSON values; the ratio is null where ε is not finite.

    Args:
        make_event: As for least_noise.
        bands: Rounds that the noise is correlated over.
        steps: T.
        epsilon: ε that both kinds of noise are calibrated to.
        delta: Its δ.
        tolerance: Relative tolerance of the calibration.
    """
    found: dict[str, Any] = {"bands": bands, "prefix_sum_noise_ratio": None}
    if not 0 < epsilon < math.inf or not steps:
        return found
    forecast = forecasts(
        make_event,
        [bands],
        Workload.prefix_sums(steps),
        epsilon=epsilon,
        delta=delta,
        adjacency=Adjacency.ADD_OR_REMOVE_ONE_USER,
        tolerance=tolerance,
    )
    of_bands = next(one for one in forecast if one.bands == bands)
    return found | {
        "prefix_sum_noise_ratio": of_bands.ratio,
        "independent_noise_multiplier": forecast[0].noise_multiplier,
        "noise_coefficients": list(of_bands.coefficients),
    }


def in_words(result: dict[str, Any]) -> list[str]:
    """Lines about correlated noise; none where nothing was said about it."""
    if result.get("bands") is None:
        return []
    ratio = result["prefix_sum_noise_ratio"]
    if ratio is None:
        return [f"noise correlated over {result['bands']} rounds"]
    return [
        f"noise correlated over {result['bands']} rounds: in prefix sums of the releases it is {ratio:.3f} times that "
        f"of independent noise at the same ε (noise multiplier {result['independent_noise_multiplier']:.4g})"
    ]
