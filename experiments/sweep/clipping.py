"""Clip norms that would do what another did: a sweep leaves such points out.

Adam divides by the size of what it is given. Where every unit is clipped, sum and noise are both proportional to the
clip norm, so that a smaller one changes nothing but the floor of 1e-8 that Adam adds to what it divides by.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from experiments.sweep.points import Point
from fedsim.config import RunConfig
from server.results.run_folder import RunFolder

REASON = "under Adam a clip norm at which everything is clipped does as any smaller one"
LOOKED = "results decided which clip norms were left out, and so what was released"
PROPORTIONAL = {"gaussian", "banded"}
"""Mechanisms whose noise is proportional to the clip norm, and whose clip is by one L2 norm."""


def may_leave_out(points: Iterable[Point], common: RunConfig) -> bool:
    """Whether what training users' units showed may decide that a clip norm need not be tried.

    Only under Adam, with a clip norm that stays, and where statistics of training users are written.
    """
    plan = common.plan
    alike = common.optimizer.name == "adam" and plan.clip_quantile == 0 and plan.mechanism in PROPORTIONAL
    return alike and common.writes_training_metrics and len({p.clip_norm for p in points if _private(p)}) > 1


def waves_of(points: list[Point]) -> Iterator[list[Point]]:
    """Points by falling clip norm; those without privacy are among the first."""
    norms = sorted({point.clip_norm for point in points if _private(point)}, reverse=True)
    for norm in norms:
        first = norm == norms[0]
        yield [point for point in points if (point.clip_norm == norm if _private(point) else first)]


def needless(point: Point, ran: Iterable[Point], folder: Path) -> bool:
    """Whether all seeds of this setting at a larger clip norm are finished, and clipped all units of all rounds."""
    setting = _but_clip(point)
    larger = [other for other in ran if _but_clip(other) == setting and other.clip_norm > point.clip_norm]
    norms = {other.clip_norm for other in larger}
    return any(
        all(clipped_everything(folder / other.name) for other in larger if other.clip_norm == norm) for norm in norms
    )


def clipped_everything(folder: Path) -> bool:
    """Whether a finished point clipped each unit of each round; False where its metrics do not tell."""
    if not (folder / "summary.json").exists():
        return False
    rounds = [line for line in RunFolder(folder).read_metrics() if line.get("round", 0) > 0]
    if [line["round"] for line in rounds] != list(range(1, len(rounds) + 1)):
        return False  # only some rounds were written: nothing is known of the others
    told = [line.get("not_private") for line in rounds]
    if not all(told):
        return False
    shares = [values["clipped_fraction"] for values in told if values and "clipped_fraction" in values]
    return bool(shares) and all(share == 1 for share in shares)


def in_words(left_out: Iterable[str]) -> str:
    """Which points were left out, and why; empty where none were."""
    names = list(left_out)
    if not names:
        return ""
    return (
        f"Left out, because {REASON}: {', '.join(names)}. That all units were clipped is not private: it was seen at "
        "training users without noise. --training-metrics off tries all."
    )


def decided(claim: Path) -> bool:
    """Whether, by a sweep's claim, clipping of training users ever decided what was run in its folder."""
    return claim.exists() and bool(json.loads(claim.read_text(encoding="utf-8")).get("leaves_out"))


def _private(point: Point) -> bool:
    return point.arm != "nonprivate"


def _but_clip(point: Point) -> Point:
    return replace(point, clip_norm=1.0, seed=0)
