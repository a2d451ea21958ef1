"""Monte Carlo: what the scalar guarantee of randomised-scale Laplace noise is worth for vectors.

    python -m benchmarks.laplace_dimension

Every coordinate gets noise with an inverse scale of its own, as published. Printed: the exact δ(ε) for one number, and
δ(ε) found by Monte Carlo for a user who moves the sum by 1 in L2 (the flat direction) or in L1 (one coordinate, and
flat), with five standard errors.
"""

import math

import numpy as np

from fedsim.privacy.mechanisms.laplace.scalar import privacy_loss, pure_epsilon, sample_noise, scalar_delta

LAWS = {
    "gamma(3, 0.1)": (("gamma", 1.0, 3.0, 0.1),),
    "99.4 % uniform(0.24, 0.36), 0.6 % uniform(48, 72)": (
        ("uniform", 0.994, 0.24, 0.36),
        ("uniform", 0.006, 48.0, 72.0),
    ),
}
DIMENSIONS = (1, 100, 10_000)
VALUES = 4_000_000
"""Noise values drawn for each line: draws × dimension, within 400 to 20,000 draws."""


def monte_carlo_delta(law: tuple, shift: np.ndarray, epsilon: float, draws: int, seed: int) -> tuple[float, float]:
    """δ(ε) of independent noise on each coordinate, and five standard errors of it."""
    generator = np.random.default_rng(seed)
    gains = []
    for _ in range(0, draws, 50):
        losses = privacy_loss(law, sample_noise(law, (50, len(shift)), generator), shift).sum(axis=1)
        gains.append(np.maximum(0.0, 1 - np.exp(epsilon - losses)))
    values = np.concatenate(gains)
    return float(values.mean()), 5 * float(values.std()) / math.sqrt(len(values))


def main() -> None:
    for name, law in LAWS.items():
        epsilon = 0.3 if pure_epsilon(law) < 0.5 else 1.1
        print(f"{name}: one number of sensitivity 1, δ({epsilon:g}) = {scalar_delta(law, epsilon):.2g}, exactly")
        for dimension in DIMENSIONS:
            draws = int(np.clip(VALUES / dimension, 400, 20_000))
            one = np.zeros(dimension)
            one[0] = 1.0
            shifts = {
                "L2, flat": np.full(dimension, 1 / math.sqrt(dimension)),
                "L1, one coordinate": one,
                "L1, flat": np.full(dimension, 1 / dimension),
            }
            for kind, shift in shifts.items():
                found, error = monte_carlo_delta(law, shift, epsilon, draws, seed=dimension)
                print(f"  d = {dimension:>6,}  {kind:<18}  δ = {found:.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
