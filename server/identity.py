"""What makes a resumed run the same run: its settings, plan, data, tokenizer and model."""

import json
from typing import Any

from fedsim.config import RunConfig, from_flat, to_flat
from fedsim.errors import InvalidInput
from fedsim.models.fingerprint import tokenizer_fingerprint
from fedsim.plan import Plan
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.resources import Resources
from server.results.run_folder import DATA

MAY_CHANGE = (
    *("data.", "model.", "engine.", "evaluation.", "checkpoint.", "output", "resume", "noise.lost-releases"),
    *("trackers", "callbacks"),
)
"""Settings that may differ: where and how fast it runs, what is measured, who is told. Data and model are compared by
content."""
YET_FIXED = (
    "engine.exact",
    "model.alpha-pattern",
    "model.lora-alpha",
    "model.lora-init",
    "model.trainable",
    "model.use-dora",
    "model.use-rslora",
)
"""Of these, what a model is trained by that its frozen and its first weights do not tell."""
FIXED_WITH_A_SEED = ("engine.devices-per-worker", "engine.precision", "engine.compile", "model.checkpointing")
"""What must stay where a given noise seed has rounds repeat themselves: other sums under the same noise would show
their difference without any."""
LATER = {"engine.devices-per-worker": 1, "engine.sums": "auto"}
"""Of these, what came later, and the value with which a run is what it was without: it goes on as one of then."""
FIXED_WITH_FLOAT_SUMS = ("engine.sums",)
"""What decides where such rounds do not repeat themselves after all (`server.sharded.round`)."""
FIXED_WITH_EXACT_SUMS = ("engine.max-tokens", "engine.cpus-per-worker")
"""What decides the last bits of an exact sum, and so must stay beside them."""
FIXED_WITH_PRIVATE_EVALUATION = tuple(
    f"evaluation.{name}" for name in ("private", "private-epsilon", "private-clip", "every", "max-rows")
)
"""What decides who is measured, how often, and with how much noise: known before the run, and charged as it was."""
PRIVATE_EVALUATION = "private_evaluation"


def identity_of(
    config: RunConfig, plan: Plan, resources: Resources, evaluation: PrivateEvaluation | None = None
) -> dict[str, Any]:
    """Everything that must be the same when a run goes on, as JSON values."""
    of_evaluation = {} if evaluation is None else {PRIVATE_EVALUATION: evaluation.to_values()}
    return {
        "settings": settings_of(config),
        "plan": plan.to_values(),
        DATA: resources.store.fingerprint,
        "tokenizer": tokenizer_fingerprint(resources.loaded.tokenizer),
        "model": resources.weights,
    } | of_evaluation


def evaluation_in(identity: dict[str, Any]) -> PrivateEvaluation | None:
    """The private evaluations of a run, of its identity: those that it began with, not calibrated again."""
    values = identity.get(PRIVATE_EVALUATION)
    return None if values is None else PrivateEvaluation(**values)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that must not change, as JSON values."""
    fixed: tuple[str, ...] = YET_FIXED
    if config.noise_seed is not None:
        fixed += FIXED_WITH_A_SEED + (FIXED_WITH_EXACT_SUMS if config.engine.exact else FIXED_WITH_FLOAT_SUMS)
    fixed += FIXED_WITH_PRIVATE_EVALUATION * config.evaluation.private
    return {
        name: _plain(value)
        for name, value in sorted(to_flat(config).items())
        if (not name.startswith(MAY_CHANGE) or name in fixed) and not (name in LATER and value == LATER[name])
    }


def require_same(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on with another plan, data, tokenizer or model.

    Raises:
        InvalidInput: Names everything that differs.
    """
    before, now = _leaves(stored), _leaves(current)
    differing = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if differing:
        first, *others = differing
        also = f"Others differ too: {', '.join(map(_shown, others))}. " if others else ""
        raise InvalidInput(
            _shown(first),
            now.get(first),
            f"{before.get(first)!r}, as in the run that goes on",
            f"{also}Resume with the same, or start a new run.",
        )


def stored_config(kind: type, written: Any, folder: str) -> Any:
    """The configuration in a run's config.json.

    Raises:
        InvalidInput: When it is not what was written there.
    """
    flat = written.get("config") if isinstance(written, dict) else None
    if not isinstance(flat, dict):
        raise InvalidInput("resume", folder, "a folder with a run's config.json")
    return from_flat(kind, _of_version_0_1(flat))


def _shown(name: str) -> str:
    return name.removeprefix("settings.")


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        leaf: item for key, part in value.items() for leaf, item in _leaves(part, f"{name}.{key}".strip(".")).items()
    }


def _plain(value: Any) -> Any:
    """Infinity is not JSON."""
    return repr(value) if value in (float("inf"), float("-inf")) else value


def _of_version_0_1(flat: dict[str, Any]) -> dict[str, Any]:
    """What that version called by another name."""
    if (noise_file := flat.get("plan.noise-file")) is None:
        return flat
    renamed = {"plan.mechanism-options": json.dumps([f"noise-file={noise_file}"])}
    return {name: value for name, value in flat.items() if name != "plan.noise-file"} | renamed
