"""What a plan may not ask for: more units than there are, or noise correlated between rounds that a user can be in."""

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.privacy.events import Adjacency
from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.sampling import Sampling, Turns
from fedsim.validation import require_probability

ALL_EXAMPLES = 10**9
"""A group size that bounds nothing: more examples than any user owns."""
PLAIN = "Only plain Gaussian noise can be correlated."


def require_compute(probability: float, population: int, what: str) -> None:
    """Refuse a plan that would need more units a round than there are.

    Raises:
        InvalidInput: Names the compute.
    """
    if probability > 1:
        raise InvalidInput(
            "plan.gradients-per-round",
            f"{probability * population:g} units a round",
            f"at most the {population} {what}s",
            "Lower --plan.gradients-per-round, or change --plan.group-size.",
        )
    require_probability("sampling_probability", probability)


def require_adjacency(adjacency: Adjacency, known: tuple[Adjacency, ...]) -> None:
    """Refuse a change of the data set under which a plan's events are not known to hold.

    Raises:
        InvalidInput: Names the adjacency.
    """
    if adjacency not in known:
        allowed = " or ".join(one.value for one in known)
        raise InvalidInput("plan.adjacency", adjacency.value, f"{allowed} with this plan")


def require_separation(
    sampling: Sampling,
    noise_coefficients: tuple[float, ...],
    noise_buffers: tuple[tuple[float, float], ...],
    adjacency: Adjacency,
    *,
    plain: bool,
    mechanism: str,
) -> None:
    """Refuse correlated noise where a user can be in two rounds that it is correlated over, and that is not charged.

    Args:
        sampling: How units join a round.
        noise_coefficients: c_0 = 1, c_1, …, as a plan has them.
        noise_buffers: (weight, decay) of each buffer, as a plan has them.
        adjacency: The change of the data set that stays hidden.
        plain: Whether the mechanism's noise is plain Gaussian, accounted as such.
        mechanism: Its name.

    Raises:
        InvalidInput: Names the bands or buffers, or the adjacency that groups of users do not permit.
    """
    bands = len(noise_coefficients)
    if noise_coefficients[:1] != (1.0,) or not np.isfinite(noise_coefficients).all():
        raise InvalidInput("noise_coefficients", noise_coefficients, "finite numbers, the first of them 1")
    if bands > 1 and not plain:
        raise InvalidInput("plan.bands", bands, f"1 with {mechanism}", PLAIN)
    apart = sampling.separation
    if bands > apart:
        allowed = f"at most {apart} with {sampling.name}, where rounds of one user can be {apart} apart"
        raise InvalidInput("plan.bands", bands, allowed, "Users who take turns are farther apart: cyclic-poisson.")
    if noise_buffers:
        require_turns(sampling, len(noise_buffers), bands, plain=plain, mechanism=mechanism)
        BufferedToeplitz.of_pairs(noise_buffers)
    if apart > 1 and adjacency is Adjacency.REPLACE_ONE_USER:
        raise InvalidInput(
            "plan.adjacency",
            adjacency.value,
            f"{Adjacency.ADD_OR_REMOVE_ONE_USER.value} with {sampling.name}",
            "Who takes a user's place may be of another group: no bound for both is known here.",
        )


def require_turns(sampling: Sampling, buffers: int, bands: int, *, plain: bool, mechanism: str) -> None:
    """Refuse buffers of noise, which is correlated over all rounds, but where users take turns without sampling.

    What each turn is charged as holds together with the turns before it, and has a proof for no other pattern.

    Args:
        sampling: How units join a round.
        buffers: Of the noise.
        bands: Of the noise.
        plain: Whether the mechanism's noise is plain Gaussian, accounted as such.
        mechanism: Its name.

    Raises:
        InvalidInput: Names the buffers.
    """
    if not isinstance(sampling, Turns):
        hint = "Sampling amplifies where rounds of one user share no noise; with buffers all rounds share it."
        raise InvalidInput("plan.buffers", buffers, f"0 with {sampling.name}; --plan.sampling none permits them", hint)
    if bands > 1:
        raise InvalidInput("plan.buffers", buffers, f"0 with {bands} bands", "Choose one of both.")
    if not plain:
        raise InvalidInput("plan.buffers", buffers, f"0 with {mechanism}", PLAIN)


def require_delta_for(delta: float, num_users: int) -> None:
    """Refuse a δ of one over the number of training users or more; of no users, which others refuse, nothing is said.

    Raises:
        InvalidInput: Says below what it must be.
    """
    if num_users and delta >= 1 / num_users:
        raise InvalidInput(
            "plan.delta",
            delta,
            f"below one over the number of training users, {1 / num_users:.3g}",
            "A larger δ permits publishing one user's data outright.",
        )
