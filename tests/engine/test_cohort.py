"""Replies put together: sums, peaks, and quantiles that do not depend on who computed what."""

import numpy as np
import pytest

from fedsim.engine.cohort import Cohort
from fedsim.engine.messages import TrainReply
from fedsim.memory import peak_resident_bytes


def reply(norms: np.ndarray, memory: float) -> TrainReply:
    statistics = {"loss_sum": 0.5, "memory_bytes": memory}
    nothing = np.zeros(1, np.float32)
    return TrainReply(round=0, units=np.arange(len(norms)), total=nothing, statistics=statistics, norms=norms)


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_quantiles_are_of_all_norms_whoever_sent_them(parts: int) -> None:
    norms = np.random.default_rng(3).lognormal(sigma=3, size=10_001).astype(np.float32)
    cohort = Cohort()
    for number, part in enumerate(np.array_split(norms, parts)):
        cohort.add(reply(part, memory=100.0 - number))
    told = cohort.statistics
    assert told.pop("loss_sum") == 0.5 * parts
    assert told.pop("memory_bytes") == 100.0
    ranks = {"0.1": 1_000, "0.25": 2_500, "0.5": 5_000, "0.75": 7_500, "0.9": 9_000}
    assert told == {f"norm_quantile_{name}": float(np.sort(norms)[rank]) for name, rank in ranks.items()}


def test_without_norms_there_are_no_quantiles() -> None:
    cohort = Cohort()
    assert cohort.statistics == {}
    cohort.add(reply(np.empty(0, np.float32), memory=1.0))
    assert cohort.statistics == {"loss_sum": 0.5, "memory_bytes": 1.0}


def test_norms_of_a_large_cohort_take_less_room_than_its_units() -> None:
    sent = reply(np.ones(10_000, np.float32), memory=1.0)
    got = TrainReply.from_record(sent.to_record())
    np.testing.assert_array_equal(got.norms, sent.norms)
    assert sent.to_record()["units"]["norms"].nbytes == 40_000


def test_the_peak_sees_what_is_held_and_remembers_it() -> None:
    before = peak_resident_bytes()
    held = np.ones((before + 50_000_000) // 8)  # more than ever before
    most = held.nbytes
    assert peak_resident_bytes() > most
    del held
    assert peak_resident_bytes() > most
