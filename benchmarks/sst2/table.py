"""The rows as markdown: what was measured, what each ε is worth, and what the papers print."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.sst2.papers import PRINTED
from benchmarks.sst2.rows import METHODS
from fedsim.privacy.bounds import shown_above

NAMES = {
    "non-private": "no privacy",
    "gaussian": "Gaussian",
    "ew-tune": "EW-Tune: Gaussian, σ by the Edgeworth estimate",
    "anadp": "ANADP, whitened",
    "lmo-dp": "LMO-DP: Laplace on sums clipped in L1",
}


def markdown(found: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]]) -> str:
    """Three tables: the rows, LMO-DP's claim for vectors clipped in L2, and the papers."""
    return "\n".join([*_measured(found), "", *_controls(controls), "", *_papers()]) + "\n"


def _measured(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| method | target ε | σ | ε of this run | which is | the paper's way to count | accuracy (95 %) | by seed |"
    yield "|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault((one["epsilon_target"] or math.inf, one["method"]), []).append(one)
    for (target, method), seeds in sorted(groups.items(), key=lambda one: (-one[0][0], METHODS.index(one[0][1]))):
        first = seeds[0]
        accuracies = [one["accuracy"] for one in seeds]
        low, high = wilson(sum(accuracies) / len(accuracies), first["dev_rows"])
        worst = max(math.inf if one["epsilon"] is None else one["epsilon"] for one in seeds)
        cells = (
            NAMES[method],
            "∞" if math.isinf(target) else f"{target:g}",
            f"{first['noise_multiplier']:.3f}",
            "∞" if math.isinf(worst) else shown_above(worst),
            f"a {first['worth']}" if first["worth"] == "guarantee" else first["worth"],
            _claim(seeds),
            f"{sum(accuracies) / len(accuracies):.1%} ({low:.1%} to {high:.1%})",
            ", ".join(f"{one:.1%}" for one in accuracies),
        )
        yield f"| {' | '.join(cells)} |"


def _claim(seeds: Sequence[dict[str, Any]]) -> str:
    first = seeds[0]
    if "epsilon_without_whitening" in first:
        worst = max(one["epsilon_without_whitening"] for one in seeds)
        return f"says {first['claimed_epsilon']:g}, {first['claim_is']}: without whitening it is {worst:.1f}"
    if "claimed_epsilon" in first:
        return f"says {first['claimed_epsilon']:g}, an {first['claim_is']}"
    return "the same" if first["method"] == "gaussian" else "–"


def _controls(controls: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| one release of LMO-DP's noise | claimed δ | δ found (± five standard errors) | the claim is |"
    yield "|---|---|---|---|"
    for one in controls:
        what = f"ε = {one['epsilon']:g}, d = {one['dimension']:,}, clipped in L2"
        yield f"| {what} | {one['claimed_delta']:g} | {one['delta']:.3f} ± {one['error']:.3f} | {one['worth']} |"


def _papers() -> Iterator[str]:
    yield "| method | paper | model | ε, δ | accuracy on SST-2 | that ε is |"
    yield "|---|---|---|---|---|---|"
    for one in PRINTED:
        yield f"| {one.method} | {one.paper} | {one.model} | {one.privacy} | {one.accuracy} | {one.worth} |"


def wilson(share: float, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """The score interval of a share among so many independent rows (Wilson 1927)."""
    square = deviations**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = deviations / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
