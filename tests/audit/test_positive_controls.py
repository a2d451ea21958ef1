"""The audit drives the project's own sampling, clip and release, passes them, and catches every broken variant."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from broken import BROKEN, SCALES

from experiments.audit.one_run import one_run_scores
from experiments.audit.rounds import (
    Audited,
    Build,
    Canary,
    one_coordinate_canary,
    worst_case_canary,
)
from fedsim.plan import ElsPlan, Plan, UlsPlan
from fedsim.privacy.audit.claim import Claim, epsilon_free
from fedsim.privacy.audit.one_run import guess, one_run_epsilon, one_run_gaussian_epsilon
from fedsim.privacy.audit.rates import attack_rates
from fedsim.privacy.events import Repeated
from fedsim.privacy.mechanisms.scalar_laplace import privacy_loss, pure_epsilon

TRIALS = 150
CONFIDENCE = 0.99
NOISE_SHARP_AT_ZERO = (("uniform", 0.994, 0.24, 0.36), ("uniform", 0.006, 48.0, 72.0))
"""A law whose noise hides one number well and 1,000 small ones badly."""


def uls(**changes: Any) -> UlsPlan:
    values: dict[str, Any] = {
        "num_users": 4,
        "sampling_probability": 1.0,
        "group_size": 4,
        "clip_norm": 0.5,
        "noise_multiplier": 1.0813,
        "steps": 1,
        "delta": 1e-5,
    }
    return UlsPlan(**values | changes)


def els(**changes: Any) -> ElsPlan:
    values = {item.name: getattr(uls(), item.name) for item in dataclasses.fields(uls())}
    for name in ("num_users", "local_steps", "local_learning_rate"):
        values.pop(name)
    return ElsPlan(**values | {"num_examples": 12, "sampling_probability": 0.5, "noise_multiplier": 3.0} | changes)


def claim_of(plan: Plan, rounds: int = 1) -> Claim:
    return Claim(
        make_event=lambda noise: Repeated(
            event=dataclasses.replace(plan, noise_multiplier=noise).step_event(), count=rounds
        ),
        noise_multiplier=plan.noise_multiplier,
        delta=plan.delta,
    )


def contradicted(audited: Audited, trials: int = TRIALS) -> bool:
    rates = attack_rates(*audited.scores(trials), confidence=CONFIDENCE)
    return claim_of(audited.plan).contradicted_by(rates)


def against_the_crowd(plan: Plan) -> Canary:
    """Everybody else points one way, the canary the other."""
    axis = np.array([1.0, 0.0, 0.0, 0.0])
    rows = np.repeat(-100 * plan.clip_norm * axis[None], plan.group_size, axis=0).astype(np.float32)
    return Canary(rows=rows, others=(100 * plan.clip_norm * axis).astype(np.float32), direction=-axis)


def orthogonal_rows(plan: Plan) -> Canary:
    """Rows that share no direction: their clipped sum is longer than their clipped mean."""
    rows = (100 * plan.clip_norm * np.eye(4)).astype(np.float32)
    return Canary(rows=rows, others=np.zeros(4, dtype=np.float32), direction=np.ones(4) / 2)


def least_noise_block(plan: Plan) -> Canary:
    return one_coordinate_canary(plan, len(SCALES))


def flat_update(plan: Plan, size: int = 1000) -> Canary:
    """The flat direction, scored by the likelihood ratio of independent scalar noise."""
    rows = np.full((plan.group_size, size), 100.0, dtype=np.float32)
    shift = 1 / np.sqrt(size)

    def score(left: np.ndarray) -> float:
        return float(privacy_loss(plan.law, shift - left / plan.clip_norm, shift).sum())

    return Canary(rows=rows, others=np.zeros(size, dtype=np.float32), direction=np.ones(size), score=score)


CONTROLS: dict[str, tuple[Plan, Any]] = {
    "no clipping": (uls(), worst_case_canary),
    "noise at half the claimed σ": (uls(), worst_case_canary),
    "noise left out": (uls(), worst_case_canary),
    "examples clipped, accounted as users": (uls(), orthogonal_rows),
    "division by the realised cohort": (uls(num_users=12), against_the_crowd),
    "sampling that is not the one accounted": (
        uls(sampling_probability=0.1, noise_multiplier=0.66),
        worst_case_canary,
    ),
    "un-whitened allocation": (uls(), least_noise_block),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_one_round_controls_are_caught(name: str) -> None:
    plan, canary = CONTROLS[name]
    trials = 400 if name in ("noise at half the claimed σ", "division by the realised cohort") else TRIALS
    assert contradicted(Audited(plan=plan, canary=canary(plan), build=BROKEN[name]), trials)


@pytest.mark.parametrize("name", sorted(set(CONTROLS) - {"no clipping", "noise left out"}))
@pytest.mark.parametrize("seed", [1, 2])
def test_the_correct_build_passes_the_same_attacks(name: str, seed: int) -> None:
    plan, canary = CONTROLS[name]
    assert not contradicted(Audited(plan=plan, canary=canary(plan), sampling_seed=seed, noise_seed=seed))


@pytest.mark.parametrize(
    "plan",
    [
        els(),
        uls(mechanism="randomised-laplace"),
        els(mechanism="randomised-laplace"),
        uls(mechanism="matrix-noise"),
        uls(clip_quantile=0.5, clip_count_std=2.0),
    ],
)
def test_other_plans_pass_their_worst_case(plan: Plan) -> None:
    audited = Audited(plan=plan, canary=one_coordinate_canary(plan, 4))
    assert not contradicted(audited)


@pytest.mark.parametrize("name", ["noise at half the claimed σ", "noise left out", "no clipping"])
def test_els_controls_are_caught(name: str) -> None:
    plan = els(noise_multiplier=2.0)
    assert contradicted(Audited(plan=plan, canary=worst_case_canary(plan), build=BROKEN[name]), 400)


def scores_of_two_rounds(build: Build, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """|first − second| released sum: zero without the canary if both carry the same noise."""
    plan = uls(sampling_probability=0.5, noise_multiplier=3.0)
    audited = Audited(plan=plan, canary=worst_case_canary(plan), build=build)
    gaps = {True: [], False: []}  # type: ignore[var-annotated]
    for trial in range(trials):
        for present in (True, False):
            place = 1_000_000 * (2 * trial + present)
            first, second = (audited.round(place + turn, present=present) for turn in range(2))
            gaps[present].append(float(np.linalg.norm(first - second)))
    return np.array(gaps[True]), np.array(gaps[False])


@pytest.mark.parametrize(("name", "caught"), [("noise reused for two sums", True), (None, False)])
def test_noise_reused_for_two_sums_is_caught(name: str | None, caught: bool) -> None:
    build = BROKEN[name] if name else Build()
    rates = attack_rates(*scores_of_two_rounds(build, TRIALS), confidence=CONFIDENCE)
    plan = uls(sampling_probability=0.5, noise_multiplier=3.0)
    assert claim_of(plan, rounds=2).contradicted_by(rates) is caught


def test_the_scalar_laplace_claim_on_an_l2_clip_is_caught() -> None:
    plan = uls(mechanism="randomised-laplace", law=NOISE_SHARP_AT_ZERO, group_size=1)
    build = BROKEN["scalar Laplace claim on an L2 clip"]
    audited = Audited(plan=plan, canary=flat_update(plan), build=build)
    rates = attack_rates(*audited.scores(400), confidence=CONFIDENCE)
    claimed = pure_epsilon(plan.law)
    assert claimed < 1.1
    assert epsilon_free(rates, 0.0) > claimed


def test_a_worst_case_canary_reaches_sixty_percent_of_epsilon_four() -> None:
    plan = uls(group_size=1)
    claim = claim_of(plan)
    rates = attack_rates(*Audited(plan=plan, canary=worst_case_canary(plan)).scores(700), confidence=0.95)
    assert not claim.contradicted_by(rates)
    assert 0.6 * claim.epsilon <= claim.epsilon_from(rates) <= claim.epsilon


@pytest.mark.parametrize(("name", "caught"), [(None, False), ("noise left out", True)])
def test_one_run_with_many_canaries(name: str | None, caught: bool) -> None:
    plan = uls(num_users=200, sampling_probability=0.2, steps=8, noise_multiplier=4.0)
    coins = np.random.default_rng(3).random(200) < 0.5
    scores = one_run_scores(plan, coins, build=BROKEN[name] if name else None)
    guesses = guess(scores, coins, 60)
    certified = plan.epsilon().upper
    assert (one_run_epsilon(guesses, 1e-5) > certified) is caught
    assert (one_run_gaussian_epsilon(guesses, 1e-5) > certified) is caught
