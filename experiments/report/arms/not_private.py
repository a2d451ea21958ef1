"""What a run's folder holds that was computed from private users without noise, apart from all else."""

import json
from typing import Any

from experiments.report.arms.arm import Arm
from server.alarms import NOT_PRIVATE


def not_private(arm: Arm) -> list[str]:
    """A sentence each; none of a run in release mode, which writes nothing of the kind."""
    statistics: dict[str, Any] = next(
        (line["not_private"] for line in reversed(arm.lines) if line.get("not_private")), {}
    )
    # Phases have a table; what is no single number stands in metrics.jsonl.
    numbers = {key: value for key, value in statistics.items() if isinstance(value, (int, float))}
    shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
    sentences = [f"last round: {shown}"] if shown else []
    if (seconds := (arm.summary or {}).get("training_seconds")) is not None:
        sentences.append(f"training took {seconds:,.1f} seconds")
    sentences += [f"alarm: {words}" for words in alarms(arm, private=True)]
    for path, holder in ((arm.run.audit_not_private, None), (arm.run.privacy, "audit")):
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = (values if holder is None else values.get(holder, {})).get("black_box", ())
        sentences += [f"audit ({path.name}): {finding['in_words']}" for finding in found]
    return sentences


def alarms(arm: Arm, *, private: bool) -> list[str]:
    """The run's alarms, either those that training users' statistics sounded or the others."""
    found: list[dict[str, Any]] = (arm.summary or {}).get("alarms", [])
    return [alarm["in_words"] for alarm in found if (NOT_PRIVATE in alarm["in_words"]) == private]
