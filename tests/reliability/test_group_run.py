"""A run whose worker is a group of processes: the same model, bit for bit, also when one of them is killed."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_runs import ROUNDS, trained

from fedsim.config import EngineConfig, RunConfig
from fedsim.models.config import SmallModelConfig
from fedsim.privacy.ledger import MODEL_UPDATE, read_entries
from server.callbacks.callback import Callback

EXACT = EngineConfig(kind="local", workers=1, exact=True, max_tokens=64)
GROUP = dataclasses.replace(EXACT, kind="ray", devices_per_worker=2)
KILLED_AFTER = (2, 5)
"""Rounds after which a member is killed: the next round's message finds its group broken."""
PATIENCE = 60.0
"""Seconds."""


def members() -> list[int]:
    """Processes of groups that are led by this process's Ray workers: a group that is being started is waited for."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        below = _below()
        found = [process for process, (parent, words) in below.items() if parent in below and "spawn_main" in words]
        if len(found) >= GROUP.devices_per_worker:
            return sorted(found)
        time.sleep(0.1)
    raise AssertionError(f"no member of a group is below {os.getpid()}, but {below}")


def _below() -> dict[int, tuple[int, str]]:
    """The processes that this one started, and those that they did: the parent of each, and its command."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[process.pid] = process.ppid(), " ".join(process.cmdline())
    return found


class Kills(Callback):
    """Kills a member after some rounds."""

    killed: list[int] = []  # noqa: RUF012  # of all of them: a run makes its own

    def on_record(self, record: dict[str, Any]) -> None:
        if record["round"] in KILLED_AFTER:
            victim = members()[record["round"] % 2]
            os.kill(victim, signal.SIGKILL)
            self.killed.append(victim)


@pytest.fixture
def two_layers(small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    small = SmallModelConfig(layers=2, width=16, heads=2, context=16, vocabulary_size=300, steps=2, batch_rows=2)

    def of(output: Path, engine: EngineConfig, **changes: Any) -> RunConfig:
        config = small_run(output, engine=engine, **changes)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, small=small))

    return of


def test_a_group_trains_the_same_model_and_survives_its_members(
    tmp_path: Path, two_layers: Callable[..., RunConfig]
) -> None:
    trained(two_layers(tmp_path / "one", EXACT))
    trained(two_layers(tmp_path / "group", GROUP, callbacks=(f"{__name__}:Kills",)))
    assert len(Kills.killed) == len(KILLED_AFTER)
    model = "model/model.safetensors"
    assert (tmp_path / "group" / model).read_bytes() == (tmp_path / "one" / model).read_bytes()
    entries = [one for one in read_entries(tmp_path / "group" / "ledger.jsonl") if one.purpose == MODEL_UPDATE]
    assert [entry.round for entry in entries] == list(range(ROUNDS))
    one, group = (_losses(tmp_path / name) for name in ("one", "group"))
    assert group == pytest.approx(one, rel=1e-5)


def _losses(folder: Path) -> list[float]:
    """Of each evaluation while training."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record.get("loss") is not None]
