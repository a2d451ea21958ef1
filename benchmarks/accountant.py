"""Speed and tightness of the accountant beside dp_accounting, in one process: python -m benchmarks.accountant

Each setting's ε is computed by both, one after the other; ours is the median of five, uncached. dp_accounting runs at
the grid its own default names, 1e-4. Takes some minutes, nearly all of it dp_accounting's.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import binom

from fedsim.privacy.accountant import bounds_of, epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.calibration import Calibration, calibrate_noise_multiplier
from fedsim.privacy.events import BinomialMixtureGaussian, Repeated

# group_size, sampling_probability, noise_multiplier, steps, delta
SETTINGS = [
    (1, 0.01, 1.0, 1000, 1e-5),
    (1, 0.1, 1.0, 1000, 1e-6),
    (2, 0.001, 0.7, 1000, 1e-6),
    (4, 0.01, 1.5, 2000, 1e-6),
    (8, 0.02, 3.0, 1000, 1e-6),
    (8, 0.002, 2.0, 10000, 1e-7),
    (16, 0.001, 1.0, 1000, 1e-5),
    (16, 0.02, 6.0, 1500, 1e-5),
    (32, 0.005, 4.0, 2000, 1e-8),
    (64, 0.001, 2.0, 2000, 1e-5),
    (128, 0.001, 5.0, 10000, 1e-7),
]
TARGETS = [
    (group, probability, steps, delta, epsilon)
    for group, probability, _, steps, delta in SETTINGS
    for epsilon in (2, 8)
]


def ours(setting: tuple) -> Bounds:
    group_size, probability, noise, steps, delta = setting
    event = BinomialMixtureGaussian(group_size=group_size, sampling_probability=probability, noise_multiplier=noise)
    return epsilon_bounds(Repeated(event=event, count=steps), delta)


def theirs(setting: tuple) -> float:
    group_size, probability, noise, steps, delta = setting
    options = {"value_discretization_interval": 1e-4, "pessimistic_estimate": True}
    if group_size == 1:
        step = pld.from_gaussian_mechanism(noise, sampling_prob=probability, **options)
    else:
        weights = binom.pmf(range(group_size + 1), group_size, probability)
        kept = [k for k in range(group_size + 1) if weights[k] > 0]
        step = pld.from_mixture_gaussian_mechanism(noise, kept, [weights[k] for k in kept], **options)
    return step.self_compose(steps).get_epsilon_for_delta(delta)


def timed(compute: Callable, *arguments: tuple, repeats: int) -> tuple[float, Any]:
    """Median seconds, and the last result; nothing is taken from the cache of answers."""
    seconds = []
    for _ in range(repeats):
        bounds_of.cache_clear()
        start = time.perf_counter()
        result = compute(*arguments)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def calibrated(target: tuple) -> Calibration:
    group_size, probability, steps, delta, epsilon = target

    def event(noise: float) -> Repeated:
        step = BinomialMixtureGaussian(group_size=group_size, sampling_probability=probability, noise_multiplier=noise)
        return Repeated(event=step, count=steps)

    return calibrate_noise_multiplier(event, epsilon=epsilon, delta=delta)


def main() -> None:
    calibrations = []
    for target in TARGETS:
        seconds, found = timed(calibrated, target, repeats=1)
        calibrations.append(seconds)
        print(f"calibrate {target}: {seconds:.2f} s, noise multiplier {found.value:.5g}", flush=True)
    rows = []
    for setting in SETTINGS:
        mine, bounds = timed(ours, setting, repeats=5)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append((setting, mine, bounds))
        print(f"{setting}: [{bounds.lower:.6g}, {bounds.upper:.6g}] in {mine:.3f} s", flush=True)
    speedups = []
    for setting, mine, _ in rows:
        other, value = timed(theirs, setting, repeats=1)
        again, _ = timed(ours, setting, repeats=3)
        speedups.append(other / statistics.median([mine, again]))
        print(f"{setting}: dp_accounting {value:.6g} in {other:.1f} s, {speedups[-1]:.0f} times ours", flush=True)
    summary = {
        "median_speedup": round(statistics.median(speedups), 1),
        "median_calibration_seconds": round(statistics.median(calibrations), 3),
        "max_gap": max(bounds.gap for _, _, bounds in rows),
        # Before dp_accounting runs: the resident set of this process so far.
        "peak_memory_mb": round(peak, 1),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
