"""What sampling is worth: the ε that Flower's own strategies can claim, and the one that holds."""

import pytest
from flwr.supercore.privacy_accounting import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from fedsim.plan.nodes import NodePlan
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Gaussian, PoissonSubsampledGaussian, Repeated

USERS, COHORT, ROUNDS, DELTA = 340_000, 1_000, 2_000, 1e-6


def test_epsilon_is_1235_where_sampling_is_not_counted_and_0_80_where_it_is() -> None:
    config = PrivacyConfig(
        target_delta=DELTA,
        population_size=USERS,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )
    theirs = RdpAccountant(config)
    event = GaussianPrivacyEvent(noise_multiplier=1.0, sample_size=COHORT, population_size=USERS)
    theirs.compose(event, ROUNDS)
    assert theirs.get_epsilon(DELTA) == pytest.approx(1235, abs=0.5)
    unamplified = epsilon_bounds(Repeated(event=Gaussian(noise_multiplier=1.0), count=ROUNDS), DELTA)
    assert 1211 < unamplified.lower <= unamplified.upper < 1212
    step = PoissonSubsampledGaussian(sampling_probability=COHORT / USERS, noise_multiplier=1.0)
    amplified = epsilon_bounds(Repeated(event=step, count=ROUNDS), DELTA)
    assert 0.795 < amplified.lower <= amplified.upper < 0.805
    plan = NodePlan(
        num_users=USERS, group_size=1, sampling_probability=COHORT / USERS,
        clip_norm=1.0, noise_multiplier=1.0, steps=ROUNDS, delta=DELTA,
    )  # fmt: skip
    assert plan.epsilon() == amplified
    assert plan.normaliser == pytest.approx(COHORT)
