"""Where sampling and noise come from: nothing is drawn twice that should be independent."""

import numpy as np

from experiments.audit.canaries import CanaryUsers
from experiments.audit.rig import Rig
from fedsim.config import NoiseConfig, RunConfig
from fedsim.engine.exact import resolution_for
from fedsim.engine.work import Gathered, Work
from fedsim.plan import UlsPlan
from fedsim.seeds import Seeds


def test_a_run_that_goes_on_from_another_draws_anew_though_it_is_given_the_same_seeds() -> None:
    config = RunConfig(noise_seed=3, sampling_seed=4)
    drawn = [Seeds.drawn(config, earlier) for earlier in ("", "one", "another")]
    assert drawn == [Seeds.drawn(config, earlier) for earlier in ("", "one", "another")]
    assert (drawn[0].sampling, drawn[0].noise) == (4, 3)
    assert len({seeds.sampling for seeds in drawn}) == len({seeds.noise for seeds in drawn}) == 3


def test_seeds_that_are_not_given_are_secret_and_secure_noise_has_none() -> None:
    first, second = Seeds.drawn(RunConfig()), Seeds.drawn(RunConfig())
    assert len({first.sampling, second.sampling, first.noise, second.noise}) == 4
    assert not first.repeats
    assert Seeds.drawn(RunConfig(noise=NoiseConfig(secure=True))).noise is None


def test_the_grid_of_exact_sums_tells_nothing_of_who_was_sampled() -> None:
    plan = UlsPlan(
        num_users=40, group_size=1, sampling_probability=0.2, clip_norm=0.5, noise_multiplier=1.0, steps=8, delta=1e-5
    )
    users = CanaryUsers(np.ones(40, dtype=np.int64), np.zeros(40))
    nothing = np.zeros((1, 4), dtype=np.float32)
    rig = Rig(plan, users, nothing, sampling_seed=1, noise_seed=2, exact=True, workers=1)
    round, gather, seen = rig.round(), rig.gather, set()

    def noted(request: Work, costs: np.ndarray, **announced: np.ndarray) -> Gathered:
        seen.add((request.resolution, len(request.units)))
        return gather(request, costs, **announced)

    for number in range(plan.steps):
        round.run(number, noted)
    assert len({units for _, units in seen}) > 2
    assert {resolution for resolution, _ in seen} == {resolution_for(round.release.clip, 40)}
