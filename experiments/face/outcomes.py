"""What came out: runs, comparisons and sweeps, read from the folders that they left."""

import copy
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsim.errors import Failure
from fedsim.privacy.bounds import shown_above
from server.results.run_folder import RunFolder

FOLDER_MARK = "fedsim_folder"
"""Attribute of a model in memory: where it was read from, and where its ledger lies."""


@dataclass(frozen=True)
class FineTuned:
    """A finished run.

    Attributes:
        folder: What the run left: model, ledger, statement, metrics, report.
    """

    folder: Path

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """A record for each round, oldest first: round, epsilon (spent so far), learning_rate, clip_norm, and where
        the model was evaluated loss (nats a label, of held-out users), perplexity and accuracy. What no noise protects
        is under not_private."""
        return [record for record in self._records if record["round"] > 0]

    @cached_property
    def before(self) -> dict[str, Any]:
        """The record of the model before its first round."""
        return next((record for record in self._records if record["round"] == 0), {})

    @cached_property
    def statement(self) -> dict[str, Any]:
        """What privacy.json holds: the guarantee, in numbers and words."""
        return _json(self._run.privacy)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What came out, as summary.json holds it: test users' losses before and after, ε, σ, rounds."""
        return _json(self._run.summary)

    @property
    def epsilon(self) -> float:
        """Certified upper bound on the model's user-level ε, at `statement["delta"]`; infinite without privacy."""
        upper = self.statement["epsilon"]["upper"]
        return float("inf") if upper is None else float(upper)

    @property
    def model(self) -> Any:
        """The fine-tuned model: of transformers, or a copy of the module that was given; in evaluation mode, on the
        GPU where there is one."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    def report(self) -> Path:
        """Write report.html, and say where it is."""
        return _report(self.folder)

    @cached_property
    def _loaded(self) -> Any:
        from experiments.loading import loaded_for_use
        from fedsim.config import RunConfig
        from fedsim.models.given import DESCRIPTION, Given, load_own, say_of
        from fedsim.models.load import load_model
        from fedsim.privacy.earlier import MARK, digest_of
        from fedsim.resources import computing_device
        from server.identity import stored_config

        config: RunConfig = stored_config(RunConfig, self._run.read_config(), str(self.folder))
        if Given.read(config.model.path).module is not None:
            loaded = load_model(config.model, device=computing_device())
            load_own(loaded.model, self._run.model)
            for name, value in _json(self._run.model / DESCRIPTION).items():
                say_of(loaded.model, name, value)
        else:
            loaded = loaded_for_use(str(self.folder))
            say_of(loaded.model, MARK, digest_of(self._run.ledger))
        setattr(loaded.model, FOLDER_MARK, str(self._run.model.resolve()))
        return loaded

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        return self._run.read_metrics()

    @property
    def _run(self) -> RunFolder:
        return RunFolder(self.folder, new=False)

    def __str__(self) -> str:
        summary = self.summary
        before, after = (summary[f"test_loss_{when}"] for when in ("before", "after"))
        if before is None:
            change, std = summary["private_change"], summary["private_change_std"]
            told = "nothing told of it" if change is None else f"{change:+.4f} ± {std:.4f} (released with noise)"
            guarantee = f"ε ≤ {shown_above(self.epsilon)} at δ = {self.statement['delta']:g}"
            return f"held-out loss {told}, {guarantee}, in {self.folder}"
        private = "without privacy" if summary["epsilon"] is None else f"ε ≤ {shown_above(self.epsilon)}"
        at = f" at δ = {self.statement['delta']:g}" if summary["epsilon"] is not None else ""
        return f"test loss {before:.4f} → {after:.4f}, {private}{at}, in {self.folder}"


@dataclass(frozen=True)
class Compared:
    """A finished comparison.

    Attributes:
        folder: The comparison's, with a folder for each arm and report.html.
        arms: The runs by name ("uls", "els", or with the mechanism's name behind).
        prediction: What the planner expected before training, sentences.
        cost: What releasing the models of all arms costs, in words; nothing of a single one.
    """

    folder: Path
    arms: dict[str, FineTuned]
    prediction: list[str] = field(default_factory=list)
    cost: list[str] = field(default_factory=list)

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """The outcome of each arm, a record each: what a DataFrame can be made of."""
        return [copy.deepcopy(arm.summary) for arm in self.arms.values()]

    @property
    def best(self) -> FineTuned:
        """The arm with the least loss on test users; where none is told, the one whose released change of the loss on
        validation users is best. To choose by either costs privacy that no ε here counts.

        Raises:
            Failure: Some arm tells neither.
        """
        for told in ("test_loss_after", "private_change"):
            if all(arm.summary.get(told) is not None for arm in self.arms.values()):
                return min(self.arms.values(), key=lambda arm: arm.summary[told])
        raise Failure("Some arm tells nothing of held-out users: there is nothing to compare the arms by.")

    def report(self) -> Path:
        """Write report.html, and say where it is."""
        return _report(self.folder)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {arm}" for name, arm in self.arms.items())


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        folder: The sweep's, with a folder for each point, results.json and report.html.
        points: A record for each finished point: its settings and what came out.
        report: The page with figures and tables.
        failures: What failed, by the point's name.
    """

    folder: Path
    points: list[dict[str, Any]]
    report: Path
    failures: dict[str, str] = field(default_factory=dict)


def _report(folder: Path) -> Path:
    from experiments.report.run import write_report

    return write_report(folder)


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
