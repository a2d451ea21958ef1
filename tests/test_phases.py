"""Seconds by phase: they add up to the wall clock, nested, ended or not, and whoever measured them."""

import pytest

from fedsim import phases
from fedsim.phases import PHASES, Phases, Times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, to be moved on by tests."""
    now = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    return now


def test_phases_within_others_add_up_to_the_whole(clock: list[float]) -> None:
    times = Phases()
    with times.of("other"):
        clock[0] += 1
        with times.of("transport"):
            clock[0] += 2
            with times.of("noise"):
                clock[0] += 4
            clock[0] += 8
            assert times.so_far().seconds == {"transport": 10, "noise": 4, "other": 1}
        clock[0] += 16
        with pytest.raises(KeyError):
            fail(times, clock)
        assert times.so_far().whole == 63
    assert times.so_far().seconds == {"transport": 10, "noise": 36, "other": 17}
    assert times.so_far().whole == clock[0] - 100


def fail(times: Phases, clock: list[float]) -> None:
    with times.of("noise"):
        clock[0] += 32
        raise KeyError


@pytest.mark.parametrize(("measured", "shares"), [(4.0, (1, 3, 6)), (20.0, (2.5, 7.5, 0))])
def test_what_others_measured_is_taken_out_of_the_phase_it_was_in(
    clock: list[float], measured: float, shares: tuple[float, float, float]
) -> None:
    """Also where their clocks ran faster: a phase never has less than no time."""
    times = Phases()
    with times.of("transport"):
        clock[0] += 10
    times.divide("transport", 10.0, {"load": measured / 4, "compute": 3 * measured / 4})
    load, compute, transport = shares
    assert times.so_far().seconds == {"load": load, "compute": compute, "transport": transport}


def test_times_are_told_by_round_and_survive_a_file() -> None:
    one = Times(seconds={"compute": 8.0, "noise": 1.9, "other": 0.1, "evaluation": 5.0}, beside=3.0, rounds=4)
    assert Times.from_json(one.to_json()) == one
    words = "A round took 2.5 s: compute 80 %, noise 19 %, other 1 %; beside it noise was drawn for 750 ms"
    assert one.in_words() == f"{words}; evaluations took 5 s in all."
    both = one.added(Times(seconds={"load": 2.0}, rounds=1))
    assert both.rounds == 5
    assert both.whole == 17.0
    assert both.since(one) == Times(seconds={p: 2.0 * (p == "load") for p in PHASES if p in both.seconds}, rounds=1)
    assert Times(seconds={}).in_words() == "No round was run."


def test_a_phase_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="noise"), Phases().of("nois"):
        pass
