"""One band of noise, and one group of users: bit for bit what independent noise and Poisson sampling release."""

from pathlib import Path

import numpy as np
import pytest
from mock_training import PARAMETERS, training, uls_plan, unit_update

from fedsim.privacy.ledger import read_entries
from fedsim.randomness import StreamNoise, stream
from fedsim.sampling import CyclicPoisson, Poisson
from fedsim.seeds import Seeds


@pytest.mark.parametrize(
    "changes",
    [{}, {"noise_coefficients": (1.0,)}, {"sampling": CyclicPoisson(groups=1), "noise_coefficients": (1.0,)}],
)
@pytest.mark.parametrize("seed", [2, 3])
def test_one_band_releases_what_it_always_did(changes: dict[str, object], seed: int, tmp_path: Path) -> None:
    plan = uls_plan(**changes)
    outcome = training(tmp_path, plan, seeds=Seeds(sampling=1, noise=seed)).run()
    expected = np.zeros(PARAMETERS, dtype=np.float32)
    for t in range(plan.steps):
        generator = stream(1, "cohort", t)
        count = int(generator.binomial(50, 0.2))
        users = np.sort(generator.choice(50, size=count, replace=False, shuffle=False))
        total = np.sum([unit_update(user) for user in users], axis=0, dtype=np.float32)
        noise = np.empty(PARAMETERS, dtype=np.float32)
        StreamNoise(seed, "noise", t).fill(noise)
        total += noise
        expected -= total / np.float32(10.0)
    np.testing.assert_array_equal(outcome.parameters, expected)
    entries = read_entries(tmp_path / "ledger.jsonl")
    assert [entry.event for entry in entries] == [uls_plan(sampling=Poisson()).step_event()] * 3
