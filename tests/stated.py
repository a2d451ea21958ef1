"""Plans and their statements, for tests."""

from typing import Any

from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.events import (
    Event,
)
from fedsim.statement import PrivacyStatement, privacy_statement

COMMON: dict[str, Any] = {
    "group_size": 4,
    "clip_norm": 2.0,
    "sampling_probability": 0.1,
    "noise_multiplier": 1.5,
    "steps": 3,
    "delta": 1e-5,
}
ULS = UlsPlan(num_users=3931, **COMMON)
ELS = ElsPlan(num_examples=3931, **COMMON)
SIZES = {"blocks.0.weight": 500, "blocks.1.weight": 3500}


def stated(plan: Plan, charged: Event | None = None, steps: int = 3, **more: Any) -> PrivacyStatement:
    event = plan.event() if charged is None else charged
    return privacy_statement(plan, event, sizes=SIZES, steps=steps, versions={"fedsim": "x"}, **more)
