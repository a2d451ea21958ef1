"""What a run is, in a table: guarantee, users, data, model, settings; nothing that is computed from private users."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from experiments.report.arms.arm import Arm
from fedsim.plan import ALL_EXAMPLES
from fedsim.privacy.bounds import shown_above, shown_below

SIZES = {"num_users": "users in the training split", "num_examples": "examples kept for training"}
"""What a plan counts, as statements call it."""
DASH = "–"


def at_a_glance(arms: Sequence[Arm]) -> list[list[str]]:
    """A heading, then a row a fact with a cell for each arm; facts that no arm has are left out."""
    rows = [[name, *(told(arm) for arm in arms)] for name, told in FACTS.items()]
    return [["", *(arm.name for arm in arms)], *(row for row in rows if any(cell != DASH for cell in row[1:]))]


def _upper(arm: Arm) -> str:
    if arm.statement is None:
        spent = arm.lines[-1]["epsilon"] if arm.lines else None
        return DASH if spent is None else f"{shown_above(spent)} so far" if spent else "0 so far"
    upper = arm.statement["epsilon"]["upper"]
    return "∞: no privacy" if upper is None else shown_above(upper)


def _lower(arm: Arm) -> str:
    lower = None if arm.statement is None else arm.statement["epsilon"]["lower"]
    return DASH if lower is None else shown_below(lower)


def _delta(arm: Arm) -> str:
    return f"{arm.plan['delta']:g}"


def _adjacency(arm: Arm) -> str:
    return str(arm.plan["adjacency"]).replace("-", " ")


def _sizes(arm: Arm) -> str:
    known = {name: arm.plan[key] for key, name in SIZES.items() if key in arm.plan}
    public = (arm.statement or {}).get("public_sizes", known)
    return "; ".join(f"{count:,} {name}" for name, count in public.items()) or DASH


def _held_out(arm: Arm) -> str:
    if arm.settings.get("data.source") == "store":
        return "as the store has them"
    shares = [(arm.settings.get(f"data.{name}-fraction"), name) for name in ("validation", "test")]
    told = ", ".join(f"{share:.0%} for {name}" for share, name in shares if isinstance(share, (int, float)))
    return told or DASH


def _data(arm: Arm) -> str:
    source, path = arm.settings.get("data.source"), arm.settings.get("data.path")
    packages = _list(arm.settings.get("data.packages")) if source == "docstrings" else []
    where = f" of {', '.join(packages)}" if packages else f": {path}" if path else ""
    length = arm.settings.get("data.sequence-length")
    return f"{source}{where}" + (f", rows of up to {length} tokens" if source != "store" and length else "")


def _model(arm: Arm) -> str:
    path, task = arm.settings.get("model.path"), str(arm.settings.get("model.task", ""))
    if path == "default":
        small = {name: arm.settings.get(f"model.small.{name}") for name in ("layers", "width", "steps")}
        told = (
            f"the small default: {small['layers']} layers of {small['width']}, {small['steps']} steps of pre-training"
        )
    else:
        told = str(path)
    rank = arm.settings.get("model.lora-rank")
    kind = "" if task in ("", "causal-lm") else f", {task}"
    return told + kind + (f", LoRA of rank {rank}" if rank else "")


def _rate(arm: Arm) -> str:
    rate = (arm.summary or {}).get("peak_learning_rate") or arm.settings.get("optimizer.learning-rate")
    schedule = arm.settings.get("optimizer.schedule", "constant")
    return f"{rate:.4g} ({arm.settings.get('optimizer.name')}, {schedule})" if isinstance(rate, (int, float)) else DASH


def _contribution(arm: Arm) -> str:
    """G of the plan, C, in the statement's words where there is one."""
    bound = (arm.statement or {}).get("contribution_bound")
    if isinstance(bound, dict) and "in_words" in bound:
        return str(bound["in_words"])
    if arm.plan["group_size"] >= ALL_EXAMPLES:
        return f"all examples of a user, clipped to norm {arm.plan['clip_norm']:g}"
    return f"at most {arm.plan['group_size']} examples of a user, clipped to norm {arm.plan['clip_norm']:g}"


def _noise(arm: Arm) -> str:
    mechanism = arm.plan.get("mechanism", "gaussian")
    name = mechanism["name"] if isinstance(mechanism, dict) else mechanism
    bands = len(arm.plan.get("noise_coefficients", ()))
    correlated = f", correlated over {bands} rounds" if bands > 1 else ""
    return f"{arm.plan['noise_multiplier']:.4g} ({name}{correlated})"


def _rounds(arm: Arm) -> str:
    done = arm.lines[-1]["round"] if arm.lines else 0
    made = (arm.summary or {}).get("rounds", done)
    a_round = arm.settings.get("plan.gradients-per-round")
    told = f"{made}" if made == arm.plan["steps"] else f"{made} of {arm.plan['steps']}"
    return told + (f", of {a_round:,} gradients expected" if isinstance(a_round, (int, float)) else "")


def _list(value: Any) -> list[str]:
    """A setting that is a list, written as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    return [str(one) for one in found] if isinstance(found, list) else []


FACTS: dict[str, Callable[[Arm], str]] = {
    "ε at most (certified)": _upper,
    "ε at least": _lower,
    "δ": _delta,
    "hidden change": _adjacency,
    "treated as public": _sizes,
    "held-out users, not protected": _held_out,
    "data": _data,
    "model": _model,
    "noise multiplier σ": _noise,
    "a user's contribution": _contribution,
    "rounds": _rounds,
    "learning rate": _rate,
}
