"""A sweep whose points train in no time."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from experiments.sweep.command import Sweep
from experiments.sweep.points import Point, SweepConfig
from fedsim.config import EngineConfig, RunConfig, to_flat
from fedsim.plan import UserSizes
from fedsim.privacy.events import PoissonSubsampledGaussian
from fedsim.privacy.ledger import Ledger
from server.results.run_folder import write_json


def point(**changes: Any) -> Point:
    values: dict[str, Any] = {
        "arm": "uls",
        "epsilon": 8.0,
        "gradients_per_round": 64,
        "group_size": 2,
        "learning_rate": 0.001,
        "clip_norm": 1.0,
        "seed": 0,
    }
    return Point(**(values | changes))


def row(
    arm: str,
    group: int,
    seed: int,
    validation: float,
    test: float,
    bands: str = "1",
    average: str = "none",
    epsilon: float = 8.0,
    noise: float = 0.01,
) -> dict[str, Any]:
    """A finished point as `collect` reads it."""
    return {
        "arm": arm,
        "epsilon": epsilon,
        "gradients_per_round": 64,
        "group_size": group,
        "learning_rate": 0.001,
        "clip_norm": 1.0,
        "bands": bands,
        "bands_used": 8 if bands == "auto" else int(bands),
        "predicted_noise_ratio": 1.0 if bands == "1" else 0.6,
        "noise": noise,
        "average": average,
        "seed": seed,
        "validation_loss": validation,
        "test_loss": test,
    }


class FakeTraining:
    """Stands in for server.app.train: leaves a run folder in no time, and fails or is interrupted where told."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.failing: set[str] = set()
        self.interrupted: set[str] = set()

    def __call__(self, grid: Any, config: RunConfig, **_: Any) -> dict[str, Any]:
        folder = Path(str(config.output))
        name = folder.name.removesuffix(".partial")
        assert not (folder / "leftover").exists()
        if name in self.interrupted:
            (folder / "leftover").touch()
            raise KeyboardInterrupt
        if name in self.failing:
            raise ValueError("no luck")
        self.trained.append(name)
        seed = json.loads((folder / "point.json").read_text())["seed"]
        loss = 3.0 + 0.1 * (config.plan.algorithm == "els") + 0.01 * seed
        plan = config.plan.draft(UserSizes.of_quantiles(10_000, {0.5: 4}))
        if config.plan.noise_multiplier == 0:
            plan = dataclasses.replace(plan, noise_multiplier=0.0)
        write_json(folder / "config.json", {"config": to_flat(config), "plan": plan.to_values()})
        (folder / "metrics.jsonl").write_text(json.dumps({"loss": loss + 0.001 * config.plan.group_size}) + "\n")
        with Ledger.open(folder / "ledger.jsonl") as ledger:
            if plan.noise_multiplier > 0:
                ledger.charge(PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=2.0), round=0)
        summary = {
            "test_loss_before": 4.0,
            "test_loss_after": loss,
            "test_accuracy_after": 0.2,
            "epsilon": config.plan.epsilon if config.plan.epsilon < math.inf else None,
            "noise_multiplier": 1.0,
            "units_per_round": 64.0,
            "seconds": 0.1,
        }
        write_json(folder / "summary.json", summary)
        return summary


def small_sweep(output: Path, **changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "sweep": SweepConfig(epsilons=(2.0, 8.0), uls_group_sizes=(1, 2), els_group_sizes=(4,), seeds=2),
        "engine": EngineConfig(kind="local"),
        "output": str(output),
    }
    return Sweep(**(values | changes))
