"""The privacy statement of a run, from its plan and its ledger."""

import math
from typing import Any

from fedsim.config import RunConfig
from fedsim.plan import ElsPlan, Plan
from fedsim.privacy.ledger import Ledger
from fedsim.privacy.statement import NoiseSource, PrivacyStatement


def privacy_statement(
    config: RunConfig, plan: Plan, ledger: Ledger, rounds: int, versions: dict[str, str]
) -> dict[str, Any]:
    """What privacy.json holds.

    Args:
        config: The run's configuration.
        plan: The plan that was carried out.
        ledger: What was charged; ε is computed from it alone.
        rounds: Noised sums that left the server.
        versions: Of the software.
    """
    sizes = (
        {"examples kept for training": plan.num_examples}
        if isinstance(plan, ElsPlan)
        else {"users in the training split": plan.num_users}
    )
    source: NoiseSource = "statistical"
    if config.noise.secure:
        source = "secure-exact" if config.engine.exact else "secure"
    seeds = {"sampling": config.sampling_seed, "noise": config.noise_seed}
    statement = PrivacyStatement.of(
        ledger.event(),
        algorithm="els" if isinstance(plan, ElsPlan) else "uls",
        group_size=plan.group_size,
        clip_norm=plan.clip_norm,
        sampling_probability=plan.sampling_probability,
        noise_multiplier=plan.noise_multiplier,
        steps=rounds,
        delta=plan.delta,
        adjacency=plan.adjacency,
        public_sizes=sizes,
        seeds_given=tuple(name for name, seed in seeds.items() if seed is not None),
        noise_source=source,
        versions=versions,
        ledger=ledger.path.name,
    )
    return without_infinities(statement.to_json())


def without_infinities(value: Any) -> Any:
    """The same values with null for what JSON cannot hold: an infinite ε."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
