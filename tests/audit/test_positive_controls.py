"""The audit drives the project's own round, passes it, and catches every broken variant, for the right reason."""

import json
from pathlib import Path

import broken_chains  # noqa: F401 - its builds register themselves
import broken_contributions  # noqa: F401
import broken_releases  # noqa: F401
import pytest
from builds import BANDS, BROKEN, BUFFERS, ELS, QUANTILE, TURNS, mechanism

import experiments.audit.attacks
import experiments.audit.command
import experiments.audit.promises
from experiments.run import main

SMALL = (
    "--num-users", "40", "--plan.gradients-per-round", "20", "--plan.group-size", "2", "--plan.rounds", "3",
    "--plan.epsilon", "4", "--trials", "32", "--canaries", "16", "--confidence", "0.99",
)  # fmt: skip


def audited(output: Path, seed: int, options: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of the command, and all that it found wrong, a line each."""
    code = main(["audit", *SMALL, *options, "--seed", str(seed), "--output", str(output)])
    report = json.loads(output.read_text(encoding="utf-8"))
    faults = [fault for promise in report["promises"] for fault in promise["broken"]]
    contradicted = [finding["attack"] for finding in report["white_box"] if finding["contradicts"]]
    return code, "\n".join(faults + contradicted)


EXTREME = ("an update that is not finite counts",)
"""What the look at users with unusual updates is for; it takes time, and says nothing more of other builds."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_build_is_caught_for_what_it_breaks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BROKEN[name].break_it(monkeypatch)
    if name not in EXTREME:
        monkeypatch.setattr(experiments.audit.promises, "extremes", lambda *_: [])
    if not BROKEN[name].attacked:
        monkeypatch.setattr(experiments.audit.attacks, "attacks", lambda *_, **__: [])
    code, found = audited(tmp_path / "audit.json", 1, BROKEN[name].options)
    assert (code, BROKEN[name].found in found) == (1, True), found


# Plans that differ by their mechanism alone are looked at in test_mechanism_properties.py.
CORRECT = [
    (options, 1)
    for options in sorted({broken.options for broken in BROKEN.values()})
    if options[:1] != mechanism("")[:1] or len(options) > 2
]
OTHERS = [
    ((), 2),
    ((), 3),
    ((*ELS, *QUANTILE), 4),
    ((*BANDS, *QUANTILE, *mechanism("layer-noise")), 5),
    ((*ELS, *BANDS, *QUANTILE), 6),
    ((*TURNS, *ELS, "--plan.bands", "2"), 7),
    ((*BUFFERS, *ELS, *QUANTILE), 8),
]


@pytest.mark.parametrize(("options", "seed"), [*CORRECT, *OTHERS])
def test_the_correct_build_passes(options: tuple[str, ...], seed: int, tmp_path: Path) -> None:
    assert audited(tmp_path / "audit.json", seed, options) == (0, "")
