"""Sums, noise and steps of four processes that own some coordinates each: the bits of one process."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from peers import CLIP, ROUNDS, Processes, processes, whole_sum

from fedsim.config import OptimizerConfig
from fedsim.engine.collective import PIECE, shares
from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.kept import KeptParameters
from fedsim.engine.shard_messages import PARAMETERS, CommitRequest, Committed, TellRequest
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import UlsPlan
from fedsim.randomness import BLOCK
from fedsim.release import CoordinateNoise, Release

SIZE = 5 * BLOCK + 777
POPULATION = 100
RESOLUTION = resolution_for(CLIP, POPULATION)
PLAN = UlsPlan(
    num_users=POPULATION,
    sampling_probability=0.1,
    group_size=1,
    clip_norm=1.0,
    noise_multiplier=1.3,
    steps=ROUNDS,
    delta=1e-5,
)
OPTIMIZERS = {
    "adam, averaged": OptimizerConfig(name="adam", learning_rate=0.01, average="exponential", schedule="linear"),
    "momentum": OptimizerConfig(name="momentum", learning_rate=0.1),
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.1),
}


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    """Four processes, of which two use two threads."""
    with processes(4, threads=[1, 2, 1, 2]) as started:
        yield started


def release(seed: int | None = 5, exact: bool = True) -> Release:
    return Release(PLAN, {"all": SIZE}, seed, exact=exact)


def initial() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)
    return {PARAMETERS: values, "schedule_round": np.array(0, dtype=np.int64)}


class OneProcess:
    """The way of today: one vector, one optimizer, the noise of the whole sum."""

    def __init__(self, optimizer: OptimizerConfig, exact: bool = True) -> None:
        self.release = release(exact=exact)
        self.optimizer = ServerOptimizer(initial()[PARAMETERS], optimizer, ROUNDS)

    def step(self, units: np.ndarray, round: int) -> np.ndarray:
        total = dequantise(whole_sum(units, round, SIZE, RESOLUTION), RESOLUTION)
        noised = self.release.noised_mean(total, CLIP, round, resolution=RESOLUTION).astype(np.float32)
        self.optimizer.step(noised)
        return noised

    @property
    def state(self) -> dict[str, np.ndarray]:
        return {PARAMETERS: self.optimizer.parameters, **self.optimizer.state()}


def commit_of(
    kept: KeptParameters, parts: tuple[str, ...], round: int, *, exact: bool = True, repeat: int = 0
) -> CommitRequest:
    resolution = RESOLUTION if exact else 0.0
    noise = CoordinateNoise.of(release(exact=exact), CLIP, round, 0, repeat, resolution)
    return CommitRequest(kept=kept, parts=parts, dtype="int64" if exact else "float32", noise=noise.to_values())


def after(kept: KeptParameters) -> KeptParameters:
    return dataclasses.replace(kept, version=kept.version + 1)


def committed(answers: list[object]) -> list[Committed]:
    found = [answer for answer in answers if isinstance(answer, Committed)]
    assert len(found) == len(answers), answers
    assert len({one.checksum for one in found}) == 1
    assert all(one.finite for one in found)
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("size", [1, BLOCK, 3 * BLOCK + 5, SIZE, 40 * PIECE])
@pytest.mark.parametrize("owners", [1, 2, 4, 7])
def test_each_coordinate_has_one_owner_and_cuts_lie_between_blocks(size: int, owners: int) -> None:
    parts = shares(size, owners)
    assert len(parts) == owners
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == size
    assert all(part.start % BLOCK == 0 or part.start == size for part in parts)
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 2 * BLOCK


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_processes_give_the_bits_of_one_after_several_rounds(four: Processes, name: str) -> None:
    one = OneProcess(OPTIMIZERS[name])
    kept = four.take(range(4), initial(), OPTIMIZERS[name])
    for round in range(4):
        units = np.arange(11) * 7 + round
        mean = one.step(units, round)
        # Unevenly, one of them with two messages, one with none.
        shared = [(0, units[:2]), (1, units[2:3]), (1, units[3:7]), (3, units[7:])]
        parts = sum((four.train(number, kept, part, round, RESOLUTION) for number, part in shared), ())
        replies = committed(four.ask(range(4), "commit", commit_of(kept, parts, round)))
        assert sorted(part for reply in replies for part in reply.parts) == sorted(parts)
        assert sum(reply.square for reply in replies) == pytest.approx(float(np.square(mean, dtype=np.float64).sum()))
        kept = after(kept)
        assert_same(four.state(range(4), kept), one.state)
        told = four.ask(range(4), "tell", TellRequest(kept=kept, before=True))
        for number in range(4):
            copied = told[(number + 1) % 4].before
            assert_same(copied, {key: told[number].own[key] for key in copied})
            assert {key for key, value in told[number].own.items() if value.ndim} == set(copied)


def test_processes_that_own_no_coordinates_take_part(four: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of fewer blocks than there are workers."""
    monkeypatch.setitem(globals(), "SIZE", 100)
    assert [part.stop - part.start for part in shares(SIZE, 4)] == [0, 0, 0, SIZE]
    config = OPTIMIZERS["adam, averaged"]
    one, kept = OneProcess(config), four.take(range(4), initial(), config)
    for round in range(2):
        units = np.arange(9) + round
        one.step(units, round)
        parts = sum(
            (four.train(n, kept, part, round, RESOLUTION) for n, part in enumerate(np.array_split(units, 4))), ()
        )
        committed(four.ask(range(4), "commit", commit_of(kept, parts, round)))
        kept = after(kept)
        assert_same(four.state(range(4), kept), one.state)


def test_float_sums_agree_up_to_rounding(four: Processes) -> None:
    config = OPTIMIZERS["sgd"]
    kept = four.take(range(4), initial(), config)
    units = np.arange(9)
    parts = sum((four.train(n, kept, part, 0, 0.0) for n, part in enumerate(np.array_split(units, 4))), ())
    committed(four.ask(range(4), "commit", commit_of(kept, parts, 0, exact=False)))
    one = ServerOptimizer(initial()[PARAMETERS], config, ROUNDS)
    one.step(release(exact=False).noised_mean(whole_sum(units, 0, SIZE, 0.0), CLIP, 0))
    found = four.state(range(4), after(kept))[PARAMETERS]
    assert np.allclose(found, one.parameters, rtol=0, atol=1e-6)
    assert not np.array_equal(found, initial()[PARAMETERS])


def test_a_round_of_nobody_is_noise_alone(four: Processes) -> None:
    one = OneProcess(OPTIMIZERS["sgd"])
    one.step(np.arange(0), 0)
    kept = four.take(range(4), initial(), OPTIMIZERS["sgd"])
    committed(four.ask(range(4), "commit", commit_of(kept, (), 0)))
    assert_same(four.state(range(4), after(kept)), one.state)


def test_a_part_that_nobody_holds_ends_the_commit_before_any_noise(four: Processes) -> None:
    kept = four.take(range(4), initial(), OPTIMIZERS["sgd"])
    parts = four.train(0, kept, np.arange(3), 0, RESOLUTION)
    answers = four.ask(range(4), "commit", commit_of(kept, (*parts, "lost"), 0))
    assert all("of 2 parts of the sum the workers hold 1" in str(answer) for answer in answers)
    assert all(
        "holds version 0" in str(answer) for answer in four.ask(range(4), "tell", TellRequest(kept=after(kept)))
    )
    # What they held they still hold, and can commit.
    committed(four.ask(range(4), "commit", commit_of(kept, parts, 0)))


def test_what_a_commit_made_stands_only_if_the_next_message_says_so(four: Processes) -> None:
    config = OPTIMIZERS["adam, averaged"]
    kept = four.take(range(4), initial(), config)
    parts = four.train(2, kept, np.arange(5), 0, RESOLUTION)
    first = committed(four.ask(range(4), "commit", commit_of(kept, parts, 0)))
    # The server lost an answer, say: it names the version before, and the same commit gives the same.
    assert_same(four.state(range(4), kept), initial())
    assert committed(four.ask(range(4), "commit", commit_of(kept, parts, 0)))[0].checksum == first[0].checksum
    one = OneProcess(config)
    one.step(np.arange(5), 0)
    assert_same(four.state(range(4), after(kept)), one.state)
    assert "holds version 1" in str(four.ask([0], "tell", TellRequest(kept=kept))[0])
    # The step took the sum in: it cannot be committed twice.
    again = four.ask(range(4), "commit", commit_of(after(kept), parts, 1))
    assert all("of 1 parts of the sum the workers hold 0" in str(answer) for answer in again)


def test_a_repeated_sum_of_floats_is_given_other_noise() -> None:
    made = release(exact=False)
    keys = {made.noise_key(round, attempt, repeat) for round in (0, 1) for attempt in (0, 1) for repeat in (0, 1, 2)}
    assert len(keys) == 12
    assert release(seed=None).noise_key(0, 0) == b""


@pytest.mark.parametrize("moment", ["before", "sum_of", "reduce_scatter", "all_gather", "passed_on"])
def test_one_that_dies_takes_nothing_with_it(moment: str) -> None:
    """Its units are computed by others, its coordinates' state is in its neighbour's hands: the bits are the same."""
    config, victim = OPTIMIZERS["adam, averaged"], 3
    one = OneProcess(config)
    with processes(4) as four:
        kept = four.take(range(4), initial(), config)
        for round in range(2):
            parts = sum((four.train(n, kept, np.arange(n, 9, 4), round, RESOLUTION) for n in range(4)), ())
            committed(four.ask(range(4), "commit", commit_of(kept, parts, round)))
            one.step(np.arange(9), round)
            kept = after(kept)
        names = [four.train(n, kept, np.arange(n, 9, 4), 2, RESOLUTION) for n in range(4)]
        if moment == "before":
            four.processes[victim].kill()
            four.processes[victim].join()
        else:
            four.begin(victim, "die in", moment)
        answers = four.ask(range(4), "commit", commit_of(kept, sum(names, ()), 2))
        assert answers[victim] is None
        assert any(isinstance(answer, str) for answer in answers)
        left = [number for number in range(4) if number != victim]
        told = {n: four.ask([n], "tell", TellRequest(kept=kept, before=True))[0] for n in left}
        own = {number: told[number].own for number in left} | {victim: told[(victim + 1) % 4].before}
        state = {
            name: np.concatenate([own[n][name] for n in range(4)]) if value.ndim else value
            for name, value in told[left[0]].own.items()
        }
        assert_same(state, one.state)
        survived = tuple(part for number in left for part in names[number])
        kept = four.take(left, state, config, version=2, parts=survived)
        again = four.train(left[0], kept, np.arange(victim, 9, 4), 2, RESOLUTION)
        committed(four.ask(left, "commit", commit_of(kept, (*survived, *again), 2)))
        one.step(np.arange(9), 2)
        assert_same(four.state(left, after(kept)), one.state)
