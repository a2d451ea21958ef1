"""Runs that crash at a known place, and what is seen of them."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from small_runs import trained

from fedsim.config import RunConfig
from fedsim.privacy.ledger import MODEL_UPDATE, read_entries
from server.round import Gather, Round


class Crash(Exception):
    """Stands for a kill at a known place."""


def crash_after(monkeypatch: pytest.MonkeyPatch, rounds: int, *, stop: int = 0) -> None:
    """The next run crashes in a round that is charged already; or is asked to stop there by a signal."""
    original, done = Round.run, []

    def once(self: Round, number: int, gather: Gather) -> dict[str, float]:
        done.append(number)
        if len(done) == rounds + 1:
            monkeypatch.setattr(Round, "run", original)
            if not stop:
                self.budget.charge(number)
                raise Crash
            os.kill(os.getpid(), stop)
        return original(self, number, gather)

    monkeypatch.setattr(Round, "run", once)


def crashed(config: RunConfig, monkeypatch: pytest.MonkeyPatch, rounds: int = 5) -> RunConfig:
    """Run until a crash in round 5 (its charge written, checkpoints after 2 and 4); returns how to go on."""
    crash_after(monkeypatch, rounds)
    with pytest.raises(Crash):
        trained(config)
    return dataclasses.replace(config, resume=config.output)


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def releases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Every round's cohort and noised mean, as they are made."""
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    step = Round.run

    def noted(self: Round, number: int, gather: Gather) -> dict[str, float]:
        before, cohort = self.parameters.copy(), self.units(number)
        statistics = step(self, number, gather)
        seen.append((number, cohort, self.parameters - before))
        return statistics

    monkeypatch.setattr(Round, "run", noted)
    return seen


def charges(ledger: Path) -> list[int]:
    """The rounds that a ledger was charged for, in order; notes at no charge are left out."""
    return [entry.round for entry in read_entries(ledger) if entry.purpose == MODEL_UPDATE]
