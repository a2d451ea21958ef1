"""How many runs a private selection is among, as options."""

from dataclasses import dataclass

from fedsim.privacy.selection import GEOMETRIC, gamma_of

USUAL_RUNS = 6.0


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """The law of how many runs there are, of which the best is released."""

    expected_runs: float | None = None
    """Runs in expectation, above 1; how many there are is drawn, and stays secret. 6 in a private sweep by default."""
    eta: float = GEOMETRIC
    """Shape of the law of that number, above −1: 1 is geometric, 0 logarithmic (docs/selection.md)."""

    def __post_init__(self) -> None:
        gamma_of(self.runs, self.eta)

    @property
    def runs(self) -> float:
        """Runs in expectation, of a selection that is asked for."""
        return USUAL_RUNS if self.expected_runs is None else self.expected_runs
