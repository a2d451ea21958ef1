"""What a selection among runs costs by this bound, Rényi accounting and composition, and by which law of their number.

python -m benchmarks.selection
"""

import json

import numpy as np
from scipy.optimize import brentq

from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.calibration import calibrate_noise_multiplier
from fedsim.privacy.events import Gaussian, Repeated
from fedsim.privacy.selection import best_of, gamma_of

DELTA = 1e-5
RUNS = (3, 6, 12, 24, 72)
SHAPES = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
BETTER = 0.2
"""Expected share of settings that would do better than the released one, at which laws are compared."""
MOST = 200_000


def noise_for(epsilon: float) -> float:
    """The noise multiplier of one Gaussian release, which stands for a run."""
    found = calibrate_noise_multiplier(lambda noise: Gaussian(noise_multiplier=noise), epsilon=epsilon, delta=DELTA)
    return found.value


def total(noise: float, runs: float, eta: float = 1.0) -> float:
    return epsilon_bounds(best_of(Gaussian(noise_multiplier=noise), expected_runs=runs, eta=eta), DELTA).upper


def renyi(noise: float, runs: float) -> float:
    """dp_accounting's, for the geometric law."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    event = RepeatAndSelectDpEvent(GaussianDpEvent(noise), runs, 1.0)
    return float(RdpAccountant().compose(event).get_epsilon(DELTA))


def law(runs: float, eta: float) -> np.ndarray:
    """P[K = k] from k = 1."""
    gamma, k = gamma_of(runs, eta), np.arange(1, MOST)
    weights: np.ndarray = np.cumprod(np.append(1.0, (1 - gamma) * (k + eta) / (k + 1)))
    chances: np.ndarray = weights / weights.sum()
    return chances


def better(runs: float, eta: float) -> float:
    """E[1/(K + 1)]: the expected share of settings that do better than the best of K drawn ones."""
    chances = law(runs, eta)
    return float(chances @ (1 / np.arange(2, len(chances) + 2)))


def main() -> None:
    found = []
    for epsilon in (2.0, 8.0):
        noise = noise_for(epsilon)
        for runs in RUNS:
            composed = epsilon_bounds(Repeated(event=Gaussian(noise_multiplier=noise), count=runs), DELTA).upper
            row = {"run": epsilon, "runs": runs, "theorem": total(noise, runs), "renyi": renyi(noise, runs)}
            found.append(row | {"composition": composed})
            print(f"ε {epsilon:g} a run, {runs} runs: " + ", ".join(f"{k} {v:.2f}" for k, v in found[-1].items()))
    laws = []
    for epsilon in (2.0, 8.0):
        noise = noise_for(epsilon)
        for eta in SHAPES:
            if better(3000.0, eta) > BETTER:
                continue  # nearly half of the time there is one run, however many are expected
            needed = float(brentq(lambda runs, eta=eta: better(runs, eta) - BETTER, 1.5, 3000.0, xtol=1e-3))
            share = np.cumsum(law(needed, eta))
            most = int(np.searchsorted(share, 0.99)) + 1
            laws.append({"run": epsilon, "eta": eta, "runs": needed, "total": total(noise, needed, eta), "most": most})
            print(f"ε {epsilon:g} a run, η {eta:g}: {needed:.1f} runs, 99 % below {most}, ε {laws[-1]['total']:.2f}")
    print(json.dumps({"delta": DELTA, "totals": found, "laws": laws, "better": BETTER}, allow_nan=False))


if __name__ == "__main__":
    main()
