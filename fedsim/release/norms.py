"""How much of a release is noise: its length, beside the length that its noise is expected to have.

Both follow from what is released and from public values, so that knowing them costs no privacy.
"""

import math
from typing import Any

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.work import Vector
from fedsim.privacy.recursion import recursion
from fedsim.release.release import Release

RELEASED, NOISE = "released_norm", "noise_norm"


def release_norms(release: Release, mean: Vector, clip: Clip, place: int) -> dict[str, float]:
    """L2 norms of a released mean: its own, and the root mean square of its noise's, where that is Gaussian.

    Args:
        release: What made it.
        mean: The released mean [P].
        clip: The round's clip.
        place: Rounds that its chain of correlated noise had before; 0 where noise is independent.

    Returns:
        By RELEASED and NOISE; nothing of a run without privacy, whose means nothing hides.
    """
    values: Any = mean
    if release.plan.noise_multiplier == 0:
        return {}
    length = float(np.linalg.norm(values)) if isinstance(mean, np.ndarray) else float(values.norm())
    return norms_of_length(release, length, clip, place)


def norms_of_length(release: Release, length: float, clip: Clip, place: int) -> dict[str, float]:
    """The same where only the length of the released mean is known."""
    plan = release.plan
    if plan.noise_multiplier == 0:
        return {}
    norms = {RELEASED: length}
    if normals := release.noise.normals(clip):
        square = math.fsum(size * std**2 for size, std in normals)
        norms[NOISE] = math.sqrt(square) * _strength(release, place) / float(plan.normaliser)
    return norms


def _strength(release: Release, place: int) -> float:
    """How many times as strong the noise of a chain's round is as independent noise."""
    if (correlation := release.plan.correlation) is None:
        return 1.0
    inverse = recursion(correlation.coefficients_of(place + 1), np.eye(1, place + 1)[0])
    return correlation.norm * float(np.linalg.norm(inverse))
