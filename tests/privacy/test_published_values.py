"""Values that other projects publish, where the shared data folder is at hand."""

import json
from functools import cache
from pathlib import Path

import pytest

from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.events import BinomialMixtureGaussian, Repeated

VALUES = Path(__file__).resolve().parents[3] / "shared" / "data" / "accounting_reference" / "accounting_reference.json"
pytestmark = pytest.mark.skipif(not VALUES.exists(), reason="the shared accounting_reference data is absent")


@cache
def rows(table: str) -> list[dict]:
    return json.loads(VALUES.read_text())["tables"][table]["rows"]


def bounds(row: dict, tolerance: float = 1e-3) -> Bounds:
    event = BinomialMixtureGaussian(
        group_size=row.get("examples_per_user", 1),
        sampling_probability=row["sampling_prob"],
        noise_multiplier=row["noise_multiplier"],
    )
    return epsilon_bounds(Repeated(event=event, count=row["steps"]), row["delta"], tolerance=tolerance)


def test_poisson_sampling_against_opacus_prv_and_pld() -> None:
    """PRV values carry their error margin of about 0.01; recomputed PLD values are upper bounds at grid 1e-4."""
    for row in rows("opacus_prv_poisson_gaussian"):
        found = bounds(row, tolerance=1e-4)
        assert found.gap <= 1e-4
        assert 0.005 < row["epsilon"] - found.upper < 0.015
        assert found.lower <= row["dp_accounting_pld"] * (1 + 1e-6)
        assert found.upper <= row["dp_accounting_pld"] * 1.001


def test_example_level_sampling_at_user_level() -> None:
    """Computed with dp_accounting's mixture mechanism, rounded to six decimals, on grids of up to 1e-3."""
    for row in rows("generated_els_user_level_mog"):
        found = bounds(row)
        assert found.gap <= 1e-3
        assert found.lower <= row["epsilon"] + 1e-6
        assert found.upper <= row["epsilon"] * 1.001
