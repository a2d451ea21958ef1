"""`compare`: ULS and ELS side by side at the same compute and (ε, δ)."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments.prediction import predict
from experiments.report import PREDICTION, print_table, read_prediction, write_report
from fedsim.config import RunConfig
from fedsim.resources import open_resources
from server.app import new_output_folder, train
from server.run_folder import RunFolder, write_json


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """What is tuned for one algorithm; unset fields are taken from the common settings."""

    group_size: int | None = None
    """Examples of one user, each round (uls) or in the whole run (els)."""
    clip_norm: float | None = None
    """L2 bound on one user's update (uls) or one example's gradient (els)."""
    learning_rate: float | None = None
    """The server's learning rate."""


@dataclass(frozen=True, kw_only=True)
class Compare(RunConfig):
    """Fine-tune by user-level sampling (ULS) and by the centralized example-level baseline (ELS).

    Both get the same gradient evaluations a round, rounds, ε, δ and model; group size, clip norm and learning rate
    are each algorithm's own.
    """

    algorithms: tuple[Literal["uls", "els"], ...] = ("uls", "els")
    """The arms, in order."""
    uls: ArmConfig = field(default_factory=lambda: ArmConfig(group_size=2))
    """What is tuned for user-level sampling."""
    els: ArmConfig = field(default_factory=lambda: ArmConfig(group_size=4))
    """What is tuned for example-level sampling."""

    def arm(self, algorithm: Literal["uls", "els"], output: Path) -> RunConfig:
        """The configuration of one arm, writing to its own folder inside output."""
        tuned: ArmConfig = getattr(self, algorithm)
        plan = dataclasses.replace(
            self.plan,
            algorithm=algorithm,
            group_size=tuned.group_size or self.plan.group_size,
            clip_norm=tuned.clip_norm or self.plan.clip_norm,
        )
        optimizer = dataclasses.replace(
            self.optimizer, learning_rate=tuned.learning_rate or self.optimizer.learning_rate
        )
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(RunConfig)}
        return RunConfig(**{**common, "plan": plan, "optimizer": optimizer, "output": str(output / algorithm)})

    def run(self) -> int:
        """Run the arms, write comparison.json and the report, print the table."""
        from experiments.simulation import simulated_clients

        folder = RunFolder(self.output or new_output_folder("compare")).path
        arms = [self.arm(algorithm, folder) for algorithm in self.algorithms]
        with simulated_clients(arms[0]) as grid:
            self._predict(arms, folder)
            summaries = [train(grid, arm) for arm in arms]
        write_json(folder / "comparison.json", summaries)
        report = write_report(folder)
        print_table(summaries)
        for sentence in read_prediction(folder):
            print(sentence)
        print(f"report: {report}")
        return 0

    def _predict(self, arms: list[RunConfig], folder: Path) -> None:
        """Ask the planner before anything is trained, where both algorithms run with a finite ε."""
        group_sizes = {arm.plan.algorithm: arm.plan.group_size for arm in arms}
        if math.isfinite(self.plan.epsilon) and set(group_sizes) == {"uls", "els"}:
            train_split = open_resources(arms[0]).store.split("train")
            write_json(folder / PREDICTION, predict(arms[0], train_split, group_sizes).to_json())
