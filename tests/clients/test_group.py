"""A worker that is a group of processes: it answers as one process does, and outlives what happens to its members."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from clients.group import Group
from clients.worker import Worker
from fedsim.clip import Clip
from fedsim.config import EngineConfig, PlanConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.engine.evaluation_messages import EvaluateRequest
from fedsim.engine.exact import resolution_for
from fedsim.engine.messages import TrainRequest
from fedsim.engine.same_inputs import Inputs, InputsDiffer
from fedsim.errors import Failure, InvalidInput
from fedsim.gradient_paths import GradientPaths
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.plan import Plan, UlsPlan

TINY = SmallModelConfig(layers=2, width=32, heads=2, vocabulary_size=512, steps=0)
CONFIG = RunConfig(
    data=DataConfig(packages=("numpy",), sequence_length=16),
    model=ModelConfig(small=TINY),
    engine=EngineConfig(max_tokens=512, exact=True, devices_per_worker=2),
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Group]]:
    before = os.environ.get("FEDSIM_CACHE")
    os.environ["FEDSIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    engine = dataclasses.replace(CONFIG.engine, devices_per_worker=1)
    worker, group = Worker.of(dataclasses.replace(CONFIG, engine=engine)), Group(CONFIG)
    yield worker, group
    group.close()
    if before is None:
        del os.environ["FEDSIM_CACHE"]
    else:
        os.environ["FEDSIM_CACHE"] = before


def asked(worker: Worker, units: np.ndarray, exact: bool = False, **changes: object) -> TrainRequest:
    train = worker.store.split("train")
    plan: Plan = UlsPlan(
        group_size=2,
        clip_norm=0.1,
        noise_multiplier=1.0,
        steps=1,
        delta=1e-3,
        num_users=train.num_users,
        sampling_probability=0.1,
    )
    values: dict = {
        "round": 3,
        "units": units,
        "clip": Clip(norm=0.1),
        "plan": plan.to_json(),
        "sampling_seed": 5,
        "parameters": worker.layout.flatten(worker.model).numpy() * np.float32(1.1),
        "resolution": resolution_for(Clip(norm=0.1), 1000) if exact else 0.0,
    }
    return TrainRequest(**{**values, **changes})


def test_a_group_answers_as_one_process_does(both: tuple[Worker, Group]) -> None:
    worker, group = both
    request = asked(worker, np.arange(9))
    one, two = worker.train(request), group.train(request)
    np.testing.assert_allclose(two.total, one.total, atol=1e-6)
    assert two.total.dtype == np.float32
    np.testing.assert_array_equal(two.units, request.units)
    np.testing.assert_allclose(np.sort(two.norms), np.sort(one.norms), rtol=1e-4)
    for name in ("clipped_units", "nonfinite_units", "empty_units", "rows", "tokens"):
        assert two.statistics[name] == one.statistics[name]
    assert two.statistics["loss_sum"] == pytest.approx(one.statistics["loss_sum"], rel=1e-5)
    assert GradientPaths.from_json(two.paths).wholly_fast


def test_exact_sums_are_the_same_bits(both: tuple[Worker, Group]) -> None:
    worker, group = both
    request = asked(worker, np.arange(4, 11), exact=True)
    one, two = worker.train(request), group.train(request)
    assert two.total.dtype == np.int64
    np.testing.assert_array_equal(two.total, one.total)
    assert two.total.any()


def test_a_group_evaluates_as_one_process_does(both: tuple[Worker, Group]) -> None:
    worker, group = both
    parameters = worker.layout.flatten(worker.model).numpy() * np.float32(0.9)
    rows = np.arange(min(37, worker.store.split("validation").num_rows))
    request = EvaluateRequest(split="validation", rows=rows, parameters=parameters)
    one, two = worker.evaluate(request), group.evaluate(request)
    np.testing.assert_allclose(two.loss_sum, one.loss_sum, rtol=1e-5)
    np.testing.assert_array_equal(two.label_count, one.label_count)
    np.testing.assert_array_equal(two.correct, one.correct)


def test_units_without_rows_add_nothing(both: tuple[Worker, Group]) -> None:
    worker, group = both
    assert not group.train(asked(worker, np.zeros(0, np.int64))).total.any()


def test_other_inputs_are_refused_and_the_group_stays(both: tuple[Worker, Group]) -> None:
    worker, group = both
    group.work(16)
    before = group.process_ids
    with pytest.raises(InputsDiffer, match="fingerprint"):
        group.train(asked(worker, np.arange(3), inputs=Inputs(data="other", model="other")))
    assert group.process_ids == before


def test_a_member_that_is_killed_fails_the_message_and_the_next_is_answered(both: tuple[Worker, Group]) -> None:
    worker, group = both
    group.work(16)
    killed, stays = group.process_ids
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(Failure, match=r"process 0 of a group of 2 ended \(exit code -9\)"):
        group.train(asked(worker, np.arange(6), exact=True))
    assert not group.process_ids
    with pytest.raises(ProcessLookupError):
        os.kill(stays, 0)
    request = asked(worker, np.arange(6), exact=True)
    np.testing.assert_array_equal(group.train(request).total, worker.train(request).total)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_member_that_is_killed_while_all_compute_together_fails_the_message(
    both: tuple[Worker, Group], rank: int
) -> None:
    """The other one waits for it meanwhile, in the middle of a sum."""
    worker, group = both
    request = asked(worker, np.arange(6), exact=True)
    group.work(16)
    killed = group.process_ids[rank]
    os.kill(killed, signal.SIGSTOP)
    later = threading.Timer(1.0, os.kill, (killed, signal.SIGKILL))
    later.start()
    with pytest.raises(Failure, match=rf"process {rank} of a group of 2 ended \(exit code -9\)"):
        group.train(request)
    later.join()
    assert not group.process_ids
    np.testing.assert_array_equal(group.train(request).total, worker.train(request).total)


def test_members_do_not_outlive_who_leads_them() -> None:
    """Neither one that waits for the other in the middle of a sum, nor one that waits to be asked."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    leading = context.Process(target=_lead, args=(theirs,))
    leading.start()
    assert ours.poll(400)
    waits, stopped = ours.recv()
    os.kill(stopped, signal.SIGSTOP)
    ours.send("go on")
    time.sleep(2.0)
    os.kill(leading.pid, signal.SIGKILL)
    leading.join()
    try:
        assert _ends(waits), "a member lives on"
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert _ends(stopped), "a member lives on"


def _lead(pipe: Any) -> None:
    group = Group(CONFIG)
    group.work(16)
    pipe.send(group.process_ids)
    pipe.recv()
    group.work(16)


def _ends(process: int, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().split(")")[-1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "local"}, "engine.kind"),
        ({"workers": 0}, "engine.workers"),
        ({"compile": "on"}, "engine.compile"),
        ({"gpus_per_worker": 0.5}, "engine.gpus-per-worker"),
        ({"devices_per_worker": 0}, "engine.devices-per-worker"),
    ],
)
def test_what_a_group_cannot_do_is_refused_in_a_sentence(changes: dict, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        dataclasses.replace(EngineConfig(devices_per_worker=2), **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"plan": PlanConfig(local_steps=2)}, "plan.local-steps"),
        ({"model": ModelConfig(path="some/model", lora_rank=2, quantise="nf4")}, "model.quantise"),
    ],
)
def test_models_and_plans_that_cannot_be_sharded_are_refused(changes: dict, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        RunConfig(engine=EngineConfig(devices_per_worker=2), **changes)
