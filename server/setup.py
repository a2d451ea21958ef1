"""From a configuration and the training users to a plan."""

import dataclasses
from typing import Any

import numpy as np

from fedsim.config import PlanConfig
from fedsim.errors import InvalidInput
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.events import Adjacency
from fedsim.privacy.mechanisms.laplace_search import read_noise_file


def make_plan(config: PlanConfig, train: Any, sampling_seed: int) -> Plan:
    """The plan of a run on a training split, with its noise calibrated.

    Args:
        config: Algorithm, compute, group size and privacy target.
        train: The training split of a UserStore.
        sampling_seed: Seed that decides which examples ELS keeps.

    Raises:
        InvalidInput: When the compute does not fit the data, or no noise reaches the target.
    """
    if train.num_users == 0 or train.num_rows == 0:
        raise InvalidInput("data", f"{train.num_users} training users", "at least one user with enough text")
    if config.delta >= 1 / train.num_users:
        raise InvalidInput(
            "plan.delta",
            config.delta,
            f"below one over the number of training users, {1 / train.num_users:.3g}",
            "A larger δ permits publishing one user's data outright.",
        )
    noise = config.noise_multiplier
    common: dict[str, Any] = {
        "group_size": config.examples_per_user,
        "clip_norm": config.clip_norm,
        "noise_multiplier": 1.0 if noise is None else noise,
        "steps": config.rounds,
        "delta": config.delta,
        "adjacency": Adjacency(config.adjacency),
        "selection": config.selection,
        "weighting": config.weighting,
        "mechanism": config.mechanism,
        "law": () if config.noise_file is None else read_noise_file(config.noise_file).law,
        "clip_quantile": config.clip_quantile,
        "clip_learning_rate": config.clip_learning_rate,
    }
    plan: Plan
    if config.algorithm == "uls":
        plan = UlsPlan(
            num_users=train.num_users,
            sampling_probability=config.gradients_per_round / (config.examples_per_user * train.num_users),
            local_steps=config.local_steps,
            local_learning_rate=config.local_learning_rate,
            **common,
        )
    else:
        kept = int(np.minimum(np.diff(train.user_offsets), config.examples_per_user).sum())
        plan = ElsPlan(num_examples=kept, sampling_probability=config.gradients_per_round / kept, **common)
    calibrated: Plan = plan if noise is not None else plan.calibrate(config.epsilon)
    if not config.clip_quantile:
        return calibrated
    # The event is that of σ, whatever share of σ the count takes; so the count's noise is chosen after calibration.
    count_std = config.clip_count_std or max(plan.normaliser / 20, calibrated.noise_multiplier)
    return dataclasses.replace(calibrated, clip_count_std=count_std)
