"""Deliberately broken pieces, each a mistake that has been made somewhere. They live here and nowhere else."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.audit.rounds import Build, Clipped, clipped_total, released_mean
from fedsim.plan import Plan
from fedsim.privacy.mechanisms.scalar_laplace import sample_noise
from fedsim.randomness import stream
from server.release import Release

SCALES = np.array([0.25, 1.2, 1.2, 1.2])
"""Noise scales of an allocation: least on the first block."""


def _no_clip(plan: Plan, release: Release, updates: Sequence[np.ndarray]) -> Clipped:
    return Clipped(total=np.sum([rows.mean(axis=0) for rows in updates], axis=0, dtype=np.float32))


def _rows_clipped_alone(plan: Plan, release: Release, updates: Sequence[np.ndarray]) -> Clipped:
    return clipped_total(plan, release, [rows[index : index + 1] for rows in updates for index in range(len(rows))])


def _l2_clip(plan: Plan, release: Release, updates: Sequence[np.ndarray]) -> Clipped:
    return clipped_total(dataclasses.replace(plan, mechanism="gaussian"), release, updates)


def _half_noise(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    quiet = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / 2)
    return released_mean(quiet, Release(quiet, {"all": len(clipped.total)}, 2), clipped, units, round)


def _no_noise(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    return clipped.total / plan.normaliser


def _realised_mean(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    return released_mean(plan, release, clipped, units, round) * plan.normaliser / max(units, 1)


def _same_noise(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    return released_mean(plan, release, clipped, units, round // 1_000_000)


def _unwhitened(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    noise = stream(2, "noise", round).standard_normal(len(clipped.total))
    return (clipped.total + SCALES * plan.noise_std * noise) / plan.normaliser


def _scalar_laplace(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    noise = sample_noise(plan.law, len(clipped.total), stream(2, "noise", round))
    return (clipped.total + plan.clip_norm * noise) / plan.normaliser


def _always_sampled(plan: Plan, round: int, seed: int) -> np.ndarray:
    return np.union1d(plan.sample(round, seed), [plan.population - 1])


BROKEN = {
    "no clipping": Build(clip=_no_clip),
    "noise at half the claimed σ": Build(release=_half_noise),
    "noise left out": Build(release=_no_noise),
    "examples clipped, accounted as users": Build(clip=_rows_clipped_alone),
    "division by the realised cohort": Build(release=_realised_mean),
    "sampling that is not the one accounted": Build(sample=_always_sampled),
    "noise reused for two sums": Build(release=_same_noise),
    "un-whitened allocation": Build(release=_unwhitened),
    "scalar Laplace claim on an L2 clip": Build(clip=_l2_clip, release=_scalar_laplace),
}
