"""Noise that a thread draws while workers compute: the bits of noise that is drawn when it is added, or none."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_training import PARAMETERS, mock_clients, sum_of_units, training, uls_plan

from fedsim import randomness
from fedsim.engine.messages import TrainRequest
from fedsim.plan import UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.privacy.mechanisms.banded import filter as banded
from fedsim.privacy.mechanisms.banded.coefficients import on_grid, square_root_coefficients
from fedsim.randomness import StreamNoise
from fedsim.release import Release, release
from fedsim.sampling import Turns
from fedsim.secure_noise import SecureNoise

SIZES = {"h.0.attn.weight": 700, "h.0.attn.bias": 30, "wte.weight": 1270}
TOTAL = sum(SIZES.values())
PIECES = 7
"""Of 300 coordinates or fewer, each of which has a secure key of its own."""
PLAN = uls_plan(steps=6)
BANDS: dict[str, Any] = {"sampling": Turns(), "noise_coefficients": on_grid(square_root_coefficients(3))}
BUFFERS: dict[str, Any] = {"sampling": Turns(), "noise_buffers": ((0.1, 0.5), (0.2, 0.95))}
KINDS = {
    "gaussian": (PLAN, {}),
    "exact": (PLAN, {"exact": True}),
    "scales": (dataclasses.replace(PLAN, mechanism=MECHANISMS.build("matrix-noise")), {}),
    "secure": (PLAN, {"noise_seed": None}),
    "secure scales": (dataclasses.replace(PLAN, mechanism=MECHANISMS.build("matrix-noise")), {"noise_seed": None}),
    "bands": (uls_plan(steps=6, **BANDS), {}),
    "bands of scales": (uls_plan(steps=6, mechanism=MECHANISMS.build("matrix-noise"), **BANDS), {}),
    "secure bands": (uls_plan(steps=6, **BANDS), {"noise_seed": None}),
    "buffers": (uls_plan(steps=6, **BUFFERS), {}),
}


class KnownBits:
    """Words of one stream after the other in place of a cryptographic generator's."""

    keys = 0

    def __init__(self) -> None:
        self._generator = np.random.default_rng(KnownBits.keys)
        KnownBits.keys += 1

    def words(self, count: int) -> np.ndarray:
        return self._generator.integers(0, 2**64, size=count, dtype=np.uint64)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small vectors have many."""
    monkeypatch.setattr(randomness, "BLOCK", 64)
    monkeypatch.setattr(randomness, "PIECE", 256)
    monkeypatch.setattr(banded, "CHUNK", 300)
    monkeypatch.setattr("fedsim.secure_noise.CHUNK", 300)
    monkeypatch.setattr("fedsim.secure_noise.CryptographicBits", KnownBits)
    monkeypatch.setattr(KnownBits, "keys", 0)


def released(plan: UlsPlan, options: dict[str, Any], ahead: bool, rounds: int = 5) -> list[np.ndarray]:
    """The means of some rounds."""
    KnownBits.keys = 0
    made = Release(plan, SIZES, **{"noise_seed": 7, **options})
    means = []
    for number in range(rounds):
        total = np.linspace(-1, 1, TOTAL, dtype=np.float64 if options.get("exact") else np.float32)
        if ahead:
            with made.drawing_ahead(made.clip, number):
                means.append(made.noised_mean(total, made.clip, number))
        else:
            means.append(made.noised_mean(total, made.clip, number))
    return means


@pytest.mark.parametrize("most", [1 << 30, 4000, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_drawn_ahead_is_bit_for_bit_the_noise_that_would_be_drawn(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, or as much as there is memory for."""
    monkeypatch.setattr(release, "AHEAD_BYTES", most)
    np.testing.assert_array_equal(released(*KINDS[kind], True), released(*KINDS[kind], False))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_to_draw_once_the_sum_is_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, options = KINDS[kind]
    made = Release(plan, SIZES, **{"noise_seed": 7, **options})
    total = np.zeros(TOTAL, dtype=np.float64 if options.get("exact") else np.float32)
    with made.drawing_ahead(made.clip, 0) as ahead:
        assert ahead is not None
        ahead.finish()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StreamNoise, "_generator", refuse)
            patch.setattr("fedsim.secure_noise.floor_normal", refuse)
            made.noised_mean(total, made.clip, 0)
    assert np.count_nonzero(total) > 0.99 * TOTAL


def refuse(*arguments: Any) -> Any:
    raise AssertionError("drawn when the sum was there")


@pytest.mark.parametrize("kind", ["gaussian", "secure", "bands", "secure bands", "buffers"])
def test_noise_that_was_drawn_for_a_lost_sum_leaves_no_trace(kind: str) -> None:
    """The next attempt is what it would have been, and no thread is left behind."""
    plan, options = KINDS[kind]
    KnownBits.keys = 0
    made = Release(plan, SIZES, **{"noise_seed": 7, **options})
    expected = released(plan, options, False)
    for number in range(3):
        with pytest.raises(ConnectionError), made.drawing_ahead(made.clip, number):
            raise ConnectionError
        assert "noise" not in {thread.name for thread in threading.enumerate()}
        KnownBits.keys = PIECES * number
        total = np.linspace(-1, 1, TOTAL, dtype=np.float32)
        np.testing.assert_array_equal(made.noised_mean(total, made.clip, number), expected[number])


@pytest.mark.parametrize("kind", ["gaussian", "secure"])
def test_noise_drawn_for_one_release_is_never_used_for_another(kind: str) -> None:
    plan, options = KINDS[kind]
    made = Release(plan, SIZES, **{"noise_seed": 7, **options})
    larger = dataclasses.replace(made.clip, norm=2.0)
    with made.drawing_ahead(made.clip, 0):
        other = made.noised_mean(np.zeros(TOTAL, dtype=np.float32), made.clip, 1)
        assert made.noised_mean(np.zeros(TOTAL, dtype=np.float32), larger, 0).std() > 1.8 * other.std()
    with made.drawing_ahead(made.clip, 0):
        first = made.noised_mean(np.zeros(TOTAL, dtype=np.float32), made.clip, 0)
        again = made.noised_mean(np.zeros(TOTAL, dtype=np.float32), made.clip, 0)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1
    assert np.array_equal(first, again) == (kind == "gaussian")  # which any draw of the round is


def test_secure_noise_drawn_for_another_deviation_is_drawn_anew() -> None:
    source, total = SecureNoise(), np.zeros(20_000)
    for _ in source.draw_ahead([(len(total), 1.0)], np.float64, 1 << 30):
        pass
    source.add_normal(total, 0.7)
    assert total.std() == pytest.approx(0.7, rel=0.03)


def test_threads_that_draw_secure_noise_draw_different_noise() -> None:
    """Each piece under a key of its own, and every coordinate once."""
    source, total = SecureNoise(threads=3), np.zeros(3000)
    for _ in source.draw_ahead([(2000, 1.0), (1000, 2.0)], np.float64, 1 << 30):
        pass
    source.add_normal(total[:2000], 1.0)
    source.add_normal(total[2000:], 2.0)
    assert KnownBits.keys == 11  # of 300 coordinates each, the last of a call fewer
    pieces = np.array([total[:300], total[300:600], total[600:900], total[2000:2300] / 2])
    assert np.abs(np.corrcoef(pieces) - np.eye(4)).max() < 0.3
    assert 0.9 < total[:2000].std() < 1.1
    assert 1.8 < total[2000:].std() < 2.2


def failing_from(piece: int) -> Any:
    """StreamNoise.draw_ahead that fails at a piece."""
    draw_ahead = StreamNoise.draw_ahead

    def failing(self: StreamNoise, *arguments: Any) -> Iterator[None]:
        for number, _ in enumerate(draw_ahead(self, *arguments)):
            if number == piece:
                raise MemoryError("no room for noise")
            yield

    return failing


@pytest.mark.parametrize(("piece", "charges"), [(0, 0), (3, 1)])
def test_what_goes_wrong_in_the_background_ends_the_round_and_loses_nothing(
    piece: int, charges: int, tmp_path: Path
) -> None:
    """From the start it is known before anything is charged; later the sum is not released."""
    run = training(tmp_path / "failing", uls_plan(steps=1))
    before = run.job.round.state()
    before = {name: array.copy() for name, array in before.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamNoise, "draw_ahead", failing_from(piece))
        with pytest.raises(MemoryError, match="no room for noise"):
            run.job.round.run(0, run.job.gather)
    assert len(run.budget.ledger) == charges
    after = run.job.round.state()
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_round_draws_while_its_workers_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before they are asked, and not when they have answered."""
    asked, seen, draw_ahead = threading.Event(), [], StreamNoise.draw_ahead

    def total(request: TrainRequest) -> np.ndarray:
        asked.set()
        (drawing,) = (thread for thread in threading.enumerate() if thread.name == "noise")
        drawing.join(10)
        seen.append("sum")
        return sum_of_units(request)

    def waiting(self: StreamNoise, *arguments: Any) -> Iterator[None]:
        steps = draw_ahead(self, *arguments)
        yield next(steps)
        assert asked.wait(10)
        yield from steps
        seen.append(threading.current_thread().name)
        asked.clear()

    plan = uls_plan(steps=2)
    expected = training(tmp_path / "other", plan).run().parameters
    monkeypatch.setattr(StreamNoise, "draw_ahead", waiting)
    run = training(tmp_path / "run", plan, clients=mock_clients(total), workers=1)
    np.testing.assert_array_equal(run.run().parameters, expected)
    assert seen == ["noise", "sum", "noise", "sum"]
    assert len(expected) == PARAMETERS
    assert run.phases.so_far().beside > 0
