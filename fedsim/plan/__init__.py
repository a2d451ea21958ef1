"""Plans: the one place where an algorithm is defined. See `fedsim.plan.plan` first."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from fedsim.errors import InvalidInput
from fedsim.plan.els import ElsPlan
from fedsim.plan.fixed_graph import FixedGraphPlan
from fedsim.plan.limits import ALL_EXAMPLES
from fedsim.plan.plan import Plan, Selection, Weighting
from fedsim.plan.sizes import UserSizes
from fedsim.plan.uls import UlsPlan
from fedsim.privacy.events import Adjacency
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.sampling import SAMPLINGS

__all__ = [
    "ALGORITHMS",
    "ALL_EXAMPLES",
    "Algorithm",
    "ElsPlan",
    "Plan",
    "Selection",
    "UlsPlan",
    "UserSizes",
    "Weighting",
    "plan_from_json",
    "plan_from_values",
    "plan_kind",
]

Algorithm = Literal["uls", "els"]
ALGORITHMS: dict[str, type[UlsPlan] | type[ElsPlan]] = {kind.name: kind for kind in (UlsPlan, ElsPlan)}
"""The algorithms by name."""


def plan_kind(algorithm: str, adjacency: Adjacency) -> type[UlsPlan] | type[ElsPlan]:
    """The kind of plan that an algorithm is under an adjacency.

    Raises:
        InvalidInput: For users that are sampled, where examples have several owners.
    """
    kind = ALGORITHMS[algorithm]
    if adjacency is not Adjacency.FIXED_GRAPH:
        return kind
    if not issubclass(FixedGraphPlan, kind):
        hint = "An example of several users would be in the update of each: sample examples (--plan.algorithm els)."
        raise InvalidInput("plan.algorithm", algorithm, f"{FixedGraphPlan.name} with {adjacency.value}", hint)
    return FixedGraphPlan


def plan_from_json(text: str) -> Plan:
    """The plan that to_json wrote.

    Raises:
        InvalidInput: For an unknown algorithm, mechanism or sampling scheme, or a value out of range.
    """
    return plan_from_values(json.loads(text))


def plan_from_values(values: Mapping[str, Any]) -> Plan:
    """The plan that to_values described, or that version 0.1 wrote into config.json.

    Raises:
        InvalidInput: For an unknown algorithm, mechanism or sampling scheme, or a value out of range.
    """
    given = dict(values)
    algorithm = given.pop("algorithm", None)
    if algorithm not in ALGORITHMS:
        raise InvalidInput("algorithm", algorithm, "one of " + ", ".join(ALGORITHMS))
    if not {"mechanism", "adjacency"} <= set(given):
        raise InvalidInput("plan", sorted(given), "a plan with a mechanism and an adjacency")
    if isinstance(given["mechanism"], str):
        given = _of_version_0_1(given)
    given["sampling"] = SAMPLINGS.from_values(given["sampling"])
    given["mechanism"] = MECHANISMS.from_values(given["mechanism"])
    given["adjacency"] = Adjacency(given["adjacency"])
    given.setdefault("noise_coefficients", (1.0,))  # before noise could be correlated, plans named none
    given.setdefault("noise_buffers", ())
    if algorithm == ElsPlan.name:
        given.setdefault("by_slots", False)  # before there were slots, kept examples were listed
    kind = plan_kind(algorithm, given["adjacency"])
    unknown = set(given) ^ {item.name for item in fields(kind)}
    if unknown:
        raise InvalidInput("plan", sorted(unknown), f"exactly the fields of {kind.__name__}")
    return kind(**given)


def _of_version_0_1(values: dict[str, Any]) -> dict[str, Any]:
    """Its mechanism was a name with a law beside, its sampling always Poisson, and two derived numbers stood there."""
    derived = ("law", "normaliser", "noise_std")
    law = {"law": values["law"]} if values.get("law") else {}
    kept = {name: value for name, value in values.items() if name not in derived}
    return kept | {"mechanism": {"name": values["mechanism"], **law}, "sampling": {"name": "poisson"}}
