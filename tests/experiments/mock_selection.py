"""A private selection whose runs train in no time."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from small_flags import TINY

from experiments.selection.budget import SelectionBudget
from experiments.selection.command import Selection
from experiments.selection.options import SelectionConfig
from experiments.selection.runs import settings_of
from experiments.sweep.points import SweepConfig
from fedsim.config import EngineConfig, PlanConfig, RunConfig
from fedsim.plan import UserSizes
from fedsim.privacy.ledger import Ledger
from fedsim.privacy.splits import HELD_OUT, TRAINING, OfSplit
from fedsim.seeds import Seeds
from fedsim.statement.splits_words import METRICS_NOT_COVERED
from server.results.run_folder import write_json

SIZES = UserSizes.of_quantiles(4_000, {0.5: 4})
SWEEP = SweepConfig(algorithms=("uls",), uls_group_sizes=(1, 2), learning_rates=(1e-3, 1e-2))
COMMON = RunConfig(plan=PlanConfig(rounds=3, delta=1e-4), engine=EngineConfig(kind="local"))
SMALL = [*TINY, "--plan.gradients-per-round", "16", "--engine.kind", "local"]


class Trained:
    """Stands in for server.app.train: what a run leaves, with the least private loss for one setting."""

    def __init__(self) -> None:
        self.seeds: list[tuple[int | None, int | None]] = []
        self.begun: dict[str, list[Seeds]] = {}
        self.changes: dict[str, float] = {}
        self.failing: set[str] = set()
        self.interrupted: set[str] = set()
        self.charged_twice = False

    def __call__(self, grid: Any, config: RunConfig, seeds: Seeds) -> dict[str, Any]:
        folder = Path(str(config.output))
        name = folder.name.removesuffix(".partial")
        self.begun.setdefault(name, []).append(seeds)
        if name in self.interrupted:
            raise KeyboardInterrupt
        if name in self.failing:
            raise ValueError("loss is not finite")
        self.seeds.append((config.sampling_seed, config.noise_seed))
        plan, evaluation = config.plan_for(SIZES), config.private_evaluation(500)
        assert evaluation is not None
        assert evaluation.count == 1
        with Ledger.open(folder / "ledger.jsonl") as ledger:
            for number in range(plan.steps * (1 + self.charged_twice)):
                ledger.charge(OfSplit(event=plan.charge(number % plan.steps), split=TRAINING), round=number)
            ledger.charge(OfSplit(event=evaluation.release_event, split=HELD_OUT), round=plan.steps)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"privacy_ledger": "of the run", "of": name}))
        statement = {
            "delta": plan.delta,
            "adjacency": plan.adjacency.value,
            "private": True,
            "not_covered": ["Something.", METRICS_NOT_COVERED],
            "sampling": {"in_words": "sampled"},
            "contribution_bound": {"in_words": "clipped"},
            "mechanism": "noise",
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.steps,
        }
        write_json(folder / "privacy.json", statement)
        (folder / "metrics.jsonl").write_text('{"loss": 3.125}\n')
        summary = {
            "private_change": self.changes.get(name, 0.5),
            "private_change_std": evaluation.standard_deviation,
            "private_change_clip": evaluation.clip_norm,
            "test_loss_after": 2.0625,
        }
        write_json(folder / "summary.json", summary)
        return summary


class Vocabulary:
    """A tokenizer, as far as it is looked at."""

    def __init__(self, word: str) -> None:
        self.word = word

    def get_vocab(self) -> dict[str, int]:
        return {self.word: 0}


def opened(data: str = "d", tokenizer: str = "t", weights: str = "w") -> Any:
    """Data and model, as far as a selection is known by them."""
    store, loaded = SimpleNamespace(fingerprint=data), SimpleNamespace(tokenizer=Vocabulary(tokenizer))
    return SimpleNamespace(store=store, loaded=loaded, weights=weights)


def select(folder: Path, budget: SelectionBudget, common: RunConfig = COMMON, resources: Any = None) -> Any:
    selection = Selection(common, SWEEP, SelectionConfig(expected_runs=3.0))
    return selection._select(settings_of(SWEEP, common), budget, folder, resources)
