"""Whose turn is when, where users take turns: what the auditor knows of the sampling, from what it draws."""

import dataclasses
import math

import numpy as np

from experiments.audit.canaries import CanaryUsers
from fedsim.plan import Plan


def in_every_turn(plan: Plan) -> float:
    """The sampling probability with which every unit is in each round of its turn; 1 where nobody waits for a turn."""
    apart = plan.scheme.separation
    probability = 1 / apart
    return probability if apart * probability >= 1 else math.nextafter(probability, 1.0)


def owners(plan: Plan, users: CanaryUsers, units: np.ndarray) -> np.ndarray:
    """The user of each unit, by who owns its rows, whatever the plan says of its population."""
    return units if plan.redraws else np.searchsorted(users.user_offsets, units, side="right") - 1


def turns(plan: Plan, users: CanaryUsers, seed: int) -> np.ndarray:
    """The first round in which each user may take part, int64 [users]; 0 where nobody waits for a turn.

    Args:
        plan: The plan.
        users: The users that make up its population.
        seed: Seed of the sampling, which decides who has which turn.
    """
    found = np.zeros(users.num_users, dtype=np.int64)
    if plan.scheme.separation == 1:
        return found
    everybody = dataclasses.replace(plan, sampling_probability=in_every_turn(plan))
    population, unit_ids = plan.population_of(users, seed), plan.unit_ids(users, seed)
    for number in range(plan.scheme.separation):
        found[owners(plan, users, unit_ids(everybody.sample(number, seed, population=population)))] = number
    return found
