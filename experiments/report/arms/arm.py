"""What a run left in its folder, finished or not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedsim.errors import InvalidInput
from fedsim.plan import ALL_EXAMPLES
from server.results.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A run, as its folder tells of it.

    Attributes:
        run: The folder.
        settings: The resolved configuration, flat.
        plan: The plan's values.
        lines: Of metrics.jsonl.
        summary: What came out; None of a run that is not finished.
        statement: What is guaranteed, without what an audit of an earlier version put there of the run's own users;
            None of a run that is not finished.
    """

    run: RunFolder
    settings: dict[str, Any]
    plan: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    statement: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What a folder holds.

        Raises:
            InvalidInput: When it is not that of a run.
        """
        run = RunFolder(folder, new=False)
        try:
            written = json.loads(run.config.read_text(encoding="utf-8"))
            settings, plan = dict(written["config"]), dict(written["plan"])
            summary, statement = (_read(path) for path in (run.summary, run.privacy))
            lines = run.read_metrics()
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = f"Reading it said: {error}."
            raise InvalidInput("folder", str(folder), "the folder of a run or of a comparison", hint) from None
        if statement is not None and "audit" in statement:
            statement["audit"] = {key: value for key, value in statement["audit"].items() if key != "black_box"}
        return cls(run=run, settings=settings, plan=plan, lines=lines, summary=summary, statement=statement)

    @property
    def name(self) -> str:
        """What people call it."""
        return label(self.summary or self._so_far())

    @property
    def unfinished(self) -> str:
        """How far a run is that is not finished, in a sentence; empty of one that is."""
        if self.summary is not None and self.statement is not None:
            return ""
        spent = self._so_far()["epsilon"]
        told = (
            f"{self.lines[-1]['round']} of {self.plan['steps']} rounds are told of"
            if self.lines
            else "none is told of"
        )
        budget = "" if not spent else f", for which ε = {spent:.3f} is spent at most"
        return (
            f"The run is not finished: {told}{budget}. Its ledger holds what was charged since, and its privacy "
            "statement is written when training is done."
        )

    def _so_far(self) -> dict[str, Any]:
        """What a summary would call the run."""
        mechanism = self.plan.get("mechanism", "gaussian")
        name = mechanism["name"] if isinstance(mechanism, dict) else mechanism
        quantile = name == "gaussian" and self.plan.get("clip_quantile")
        spent = self.lines[-1]["epsilon"] if self.lines else 0.0
        return {
            "algorithm": self.plan["algorithm"],
            "mechanism": "quantile-clip" if quantile else name,
            "bands": len(self.plan.get("noise_coefficients", [1.0])),
            "epsilon": None if self.plan["noise_multiplier"] == 0 else spent,
        }


def label(summary: dict[str, Any]) -> str:
    """An arm's name as people read it: the algorithm, and what sets it apart from plain Gaussian noise."""
    mechanism = summary.get("mechanism", "gaussian")
    title = str(summary["algorithm"]).upper()
    if summary.get("epsilon", 0.0) is None:
        unbounded = (summary.get("group_size") or 0) >= ALL_EXAMPLES
        return "no privacy" if unbounded else f"{title} without privacy"
    bands = summary.get("bands", 1)
    named = title if mechanism == "gaussian" else f"{title} {mechanism}"
    return named if bands == 1 else f"{named} with {bands} bands"


def arms_in(folder: Path) -> list[Arm]:
    """The run in a folder, or the runs in a comparison's.

    Raises:
        InvalidInput: When it holds none.
    """
    if _is_run(folder):
        return [Arm.read(folder)]
    found = sorted((path.parent for path in folder.glob("*/config.json") if _is_run(path.parent)), reverse=True)
    if not found:
        raise InvalidInput("folder", str(folder), "a folder with a run in it", "No run's config.json was found in it.")
    return [Arm.read(path) for path in found]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's; a comparison's configuration has no plan."""
    try:
        return "plan" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _read(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
