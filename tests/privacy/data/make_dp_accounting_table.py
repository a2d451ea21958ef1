"""Write dp_accounting's own ε for a spread of settings: python tests/privacy/data/make_dp_accounting_table.py

Its pessimistic connect-the-dots mode, grid 1e-4, add-or-remove; a setting takes from a second to some minutes.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path

from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import binom

TABLE = Path(__file__).with_name("dp_accounting_table.json")
GRID = 1e-4

# group_size, sampling_probability, noise_multiplier, steps, delta
SETTINGS = [
    (1, 1.0, 1.0, 1, 1e-5),
    (1, 1.0, 50.0, 1, 1e-2),
    (1, 1.0, 50.0, 100, 1e-6),
    (1, 1.0, 10.0, 1000, 1e-8),
    (1, 1.0, 0.3, 1, 1e-5),
    (4, 1.0, 20.0, 10, 1e-6),
    (512, 1.0, 50.0, 1, 1e-6),
    (1, 1e-5, 1.0, 100000, 1e-5),
    (1, 1e-5, 0.5, 100000, 1e-6),
    (1, 1e-5, 0.3, 10000, 1e-7),
    (1, 1e-4, 0.4, 10000, 1e-8),
    (1, 1e-4, 0.7, 100000, 1e-6),
    (1, 1e-3, 0.6, 10000, 1e-6),
    (1, 1e-3, 1.0, 2000, 1e-12),
    (1, 1e-3, 1.0, 100000, 1e-12),
    (1, 1e-3, 5.0, 100000, 1e-9),
    (1, 5.0929e-3, 0.573, 3920, 1e-6),
    (1, 0.01, 0.8, 1, 1e-6),
    (1, 0.01, 1.0, 1000, 1e-2),
    (1, 0.01, 1.0, 10000, 1e-5),
    (1, 0.01, 10.0, 1000, 1e-4),
    (1, 0.05, 2.0, 10000, 1e-10),
    (1, 0.1, 0.5, 10, 1e-6),
    (1, 0.1, 1.0, 1000, 1e-6),
    (1, 0.1, 50.0, 100000, 1e-6),
    (1, 0.5, 1.0, 100, 1e-5),
    (1, 0.5, 20.0, 1, 1e-4),
    (1, 0.9, 3.0, 300, 1e-7),
    (2, 1e-3, 0.5, 1000, 1e-6),
    (2, 0.02, 1.0, 500, 1e-12),
    (4, 1e-5, 0.5, 50000, 1e-6),
    (4, 0.01, 1.5, 2000, 1e-6),
    (8, 1e-4, 0.8, 10000, 1e-8),
    (8, 1e-3, 2.0, 100000, 1e-9),
    (8, 0.3, 30.0, 1000, 1e-5),
    (16, 1e-3, 1.0, 1000, 1e-5),
    (16, 0.02, 6.0, 1500, 1e-5),
    (16, 0.01, 3.0, 1, 1e-6),
    (32, 1e-5, 1.0, 100000, 1e-6),
    (32, 5e-3, 4.0, 2000, 1e-10),
    (64, 1e-3, 2.0, 2000, 1e-5),
    (64, 0.05, 50.0, 1000, 1e-6),
    (128, 1e-4, 1.0, 1000, 1e-6),
    (128, 1e-3, 5.0, 10000, 1e-7),
    (256, 1e-3, 10.0, 5000, 1e-6),
    (256, 0.01, 50.0, 100, 1e-3),
    (512, 1e-5, 1.0, 10000, 1e-8),
    (512, 1e-4, 3.0, 10000, 1e-6),
    (512, 1e-3, 20.0, 1000, 1e-6),
    (512, 0.02, 50.0, 10, 1e-5),
]


def distribution(group_size: int, probability: float, noise: float) -> pld.PrivacyLossDistribution:
    """One step's privacy-loss distribution, by dp_accounting."""
    options = {"value_discretization_interval": GRID, "pessimistic_estimate": True}
    if probability == 1:
        return pld.from_gaussian_mechanism(noise, sensitivity=group_size, **options)
    if group_size == 1:
        return pld.from_gaussian_mechanism(noise, sampling_prob=probability, **options)
    counts = range(group_size + 1)
    weights = binom.pmf(counts, group_size, probability)
    kept = [k for k in counts if weights[k] > 0]
    return pld.from_mixture_gaussian_mechanism(noise, kept, [weights[k] for k in kept], **options)


def main() -> None:
    rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    done = {tuple(row["setting"]) for row in rows}
    for setting in SETTINGS:
        if setting in done:
            continue
        group_size, probability, noise, steps, delta = setting
        start = time.perf_counter()
        epsilon = distribution(group_size, probability, noise).self_compose(steps).get_epsilon_for_delta(delta)
        rows.append({"setting": setting, "epsilon": epsilon, "seconds": round(time.perf_counter() - start, 2)})
        note = f"dp_accounting {version('dp_accounting')}, pessimistic, grid {GRID}"
        fields = ["group_size", "sampling_probability", "noise_multiplier", "steps", "delta"]
        lines = ",\n".join(json.dumps(row) for row in rows)
        TABLE.write_text(f'{{"source": "{note}",\n"fields": {json.dumps(fields)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
