"""The results of a sweep: rows of finished points, the best setting of each cell, and what tuning cost in privacy."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from experiments.sweep.clipping import LOOKED
from experiments.sweep.points import ARM_TITLES, Point
from experiments.together import FinishedRun, Together
from server.results.run_folder import RunFolder

ARM = ("arm", "gradients_per_round", "epsilon", "bands", "average")
"""What is compared; all else is tuned for each."""
SETTING = ("group_size", "learning_rate", "clip_norm", "bands", "average")


def collect(folder: Path) -> list[dict[str, Any]]:
    """One row a finished point: the point, its validation loss, and its summary."""
    rows = []
    for path in sorted(folder.glob("*/summary.json")):
        if path.parent.suffix == ".partial" or not (path.parent / "point.json").exists():
            continue
        point = Point.from_json(json.loads((path.parent / "point.json").read_text(encoding="utf-8")))
        summary = json.loads(path.read_text(encoding="utf-8"))
        metrics = RunFolder(path.parent).read_metrics()
        rows.append(
            {
                "point": point.name,
                "arm": point.arm,
                "epsilon": point.epsilon,
                "gradients_per_round": point.gradients_per_round,
                "group_size": None if point.arm == "nonprivate" else point.group_size,
                "learning_rate": point.learning_rate,
                "clip_norm": point.clip_norm,
                "bands": point.bands,
                "bands_used": summary.get("bands", 1),
                "predicted_noise_ratio": summary.get("predicted_noise_ratio", 1.0),
                "average": point.average,
                "seed": point.seed,
                "validation_loss": metrics[-1]["loss"],
                "test_loss": summary["test_loss_after"],
                "test_loss_before": summary["test_loss_before"],
                "test_accuracy": summary["test_accuracy_after"],
                "epsilon_spent": summary["epsilon"],
                "noise_multiplier": summary["noise_multiplier"],
                "noise": summary["noise_multiplier"] * point.clip_norm / summary["units_per_round"],
                "seconds": summary["seconds"],
            }
        )
    return rows


def cells_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each algorithm, ε and compute: the settings tried, and the best.

    The best has the least mean validation loss; what is reported of it is its loss on test users, who took no part in
    the choice. Settings with fewer seeds than others of the cell are not chosen.
    """
    rows = list(rows)
    arms = list(ARM_TITLES)
    keys = {(row["arm"], row["gradients_per_round"], row["epsilon"]) for row in rows}
    cells = []
    for key in sorted(keys, key=lambda key: (arms.index(key[0]), *key[1:])):
        here = [row for row in rows if (row["arm"], row["gradients_per_round"], row["epsilon"]) == key]
        settings = [
            setting_of([row for row in here if tuple(row[name] for name in SETTING) == setting])
            for setting in sorted({tuple(row[name] for name in SETTING) for row in here})
        ]
        cells.append(
            {
                "arm": key[0],
                "gradients_per_round": key[1],
                "epsilon": key[2],
                "best": _best(settings),
                "settings": settings,
            }
        )
    return cells


def worth_repeating(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Of each ARM the point of least validation loss, by name; none of an arm of which no point has a finite one."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ARM)
        if not math.isfinite(row["validation_loss"]):
            continue
        if key not in best or row["validation_loss"] < best[key]["validation_loss"]:
            best[key] = row
    return {row["point"] for row in best.values()}


def setting_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seeds of one setting together: mean test loss and the half-width of its 95 % interval (Student's t)."""
    losses = np.array([row["test_loss"] for row in rows])
    return {
        **{name: rows[0][name] for name in (*SETTING, "bands_used", "predicted_noise_ratio", "noise")},
        "seeds": len(rows),
        "validation_loss": float(np.mean([row["validation_loss"] for row in rows])),
        "loss": float(losses.mean()),
        "half_width": half_width(losses),
        "losses": {row["seed"]: row["test_loss"] for row in rows},
    }


def gains_of_bands(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What correlating noise over rounds gained: each number of bands at its best other settings, beside one band.

    By cell, in nats of test loss, with the half-width of its 95 % interval (None for single seeds); the noise that was
    predicted relative to that of independent noise, and the gain that follows from it and from `loss_per_noise`, which
    correlated noise had no part in (None where one ε alone was run). Nothing of cells that lack one band, or others.
    """
    cells = list(cells)
    independent = [(cell, setting) for cell in cells if (setting := _best_of_bands(cell, "1"))]
    gains = []
    for cell, reference in independent:
        alike = [setting for other, setting in independent if _place(other) == _place(cell)]
        slope = loss_per_noise(alike)
        for bands in _bands_of(cell):
            setting = _best_of_bands(cell, bands)
            if bands == "1" or setting is None:
                continue
            difference, half = lead(setting, reference)
            ratio = setting["predicted_noise_ratio"]
            gains.append(
                {name: cell[name] for name in ("arm", "epsilon", "gradients_per_round")}
                | {
                    "bands": bands,
                    "bands_used": setting["bands_used"],
                    "predicted_noise_ratio": ratio,
                    "predicted_gain": None if slope is None else -slope * math.log(ratio),
                    "loss_saved_by_half_the_noise": None if slope is None else slope * math.log(2),
                    "loss": setting["loss"],
                    "loss_of_independent_noise": reference["loss"],
                    "gain": difference,
                    "half_width": half,
                }
            )
    return gains


def loss_per_noise(settings: Iterable[dict[str, Any]]) -> float | None:
    """By how much loss grows as the logarithm of the noise does, by least squares; None for noise of one size alone.

    Args:
        settings: The best of independent noise at several ε, each tuned for itself. Where this is small, it is not
            noise that limits training, and less of it gains little.
    """
    points = [(math.log(setting["noise"]), setting["loss"]) for setting in settings if setting["noise"] > 0]
    if len({noise for noise, _ in points}) < 2:
        return None
    noises, losses = np.array(points).T
    return float(np.cov(noises, losses)[0, 1] / noises.var(ddof=1))


def _place(cell: dict[str, Any]) -> tuple[str, int]:
    return cell["arm"], cell["gradients_per_round"]


def _best_of_bands(cell: dict[str, Any], bands: str) -> dict[str, Any] | None:
    tried = [setting for setting in cell["settings"] if setting["bands"] == bands]
    return _best(tried) if tried else None


def _bands_of(cell: dict[str, Any]) -> list[str]:
    return sorted({setting["bands"] for setting in cell["settings"]})


def _best(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting of least validation loss, of those with most seeds."""
    most = max(setting["seeds"] for setting in settings)
    return min((s for s in settings if s["seeds"] == most), key=lambda setting: setting["validation_loss"])


def half_width(values: np.ndarray) -> float | None:
    """Half of Student's 95 % interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def lead(uls: dict[str, Any], els: dict[str, Any]) -> tuple[float, float | None]:
    """Mean ELS loss minus mean ULS loss over the seeds of each, and the half-width of its 95 % interval.

    Seeds of equal number share nothing but that (`Point.config`), so the interval treats the two as independent
    (Welch).
    """
    first, second = (np.array(list(setting["losses"].values())) for setting in (uls, els))
    return contrast([second, first], [1, -1])


def contrast(samples: Sequence[np.ndarray], weights: Sequence[float]) -> tuple[float, float | None]:
    """The weighted sum of means of independent samples, and half of its 95 % interval (Welch's degrees of freedom).

    Args:
        samples: Each float64 [values].
        weights: One a sample; 1 and −1 give a difference of means.

    Returns:
        The sum, and the half-width; None where a sample is a single value.
    """
    total = float(sum(weight * sample.mean() for weight, sample in zip(weights, samples, strict=True)))
    if min(map(len, samples)) < 2:
        return total, None
    parts = [w**2 * sample.var(ddof=1) / len(sample) for w, sample in zip(weights, samples, strict=True)]
    variance = sum(parts)
    if variance == 0:
        return total, 0.0
    degrees = variance**2 / sum(part**2 / (len(one) - 1) for part, one in zip(parts, samples, strict=True))
    return total, float(scipy.stats.t.ppf(0.975, degrees) * math.sqrt(variance))


def cost_of_sweep(
    folder: Path, rows: list[dict[str, Any]], chosen: bool = False, *, looked: bool = False
) -> Together | None:
    """What the models of all private points of a sweep cost together; None where there is no private point.

    Args:
        folder: The sweep's folder.
        rows: Its finished points.
        chosen: Whether some were trained because of what others gave. What that costs is the composition of what ran
            only if whatever might have been chosen releases the same: composition is of mechanisms fixed beforehand.
        looked: Whether what was clipped of training users decided which points ran, whether or not any was left out.

    Raises:
        InvalidInput: When a point's folder lacks its configuration or its ledger.
        LedgerDamaged: When a ledger is not what was written.
    """
    private = [row for row in rows if row["arm"] != "nonprivate"]
    if not private:
        return None
    groups: dict[tuple[Any, ...], set[int]] = {}
    for row in private:
        groups.setdefault(tuple(row[name] for name in ARM), set()).add(row["group_size"])
    unclaimed = LOOKED if looked else ""
    if chosen and any(len(sizes) > 1 for sizes in groups.values()):
        unclaimed = "results decided which of several group sizes were trained again, and so what was released"
    runs = (FinishedRun.read(row["point"], folder / row["point"]) for row in private)
    return Together.of(runs, tolerance=0.01, unclaimed=unclaimed)
