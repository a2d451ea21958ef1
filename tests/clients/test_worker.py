"""The client's worker on a real model and store: what it returns is what the plan in the message says."""

import copy
import dataclasses
import os
import time
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch

from clients.computing import Computing
from clients.worker import Worker, as_tensor
from fedsim.clip import Clip
from fedsim.config import EngineConfig, EvaluationConfig, PlanConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.engine.evaluation_messages import EvaluateRequest
from fedsim.engine.exact import dequantise, resolution_for
from fedsim.engine.messages import TrainRequest
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.models.evaluate import evaluate_rows
from fedsim.plan import ElsPlan, Plan, UlsPlan

TINY = SmallModelConfig(layers=1, width=32, heads=2, vocabulary_size=512, steps=0)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    before = os.environ.get("FEDSIM_CACHE")
    os.environ["FEDSIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    config = RunConfig(
        data=DataConfig(packages=("numpy",), sequence_length=16),
        model=ModelConfig(small=TINY),
        plan=PlanConfig(),
        engine=EngineConfig(max_tokens=512),
        evaluation=EvaluationConfig(),
    )
    yield Worker.of(config)
    if before is None:
        del os.environ["FEDSIM_CACHE"]
    else:
        os.environ["FEDSIM_CACHE"] = before


def plan_of(worker: Worker, algorithm: str, **changes: int) -> Plan:
    train = worker.store.split("train")
    common = {"group_size": 2, "clip_norm": 0.1, "noise_multiplier": 1.0, "steps": 1, "delta": 1e-3}
    if algorithm == "els":
        return ElsPlan(**common, num_examples=train.num_rows, sampling_probability=0.1)  # type: ignore[arg-type]
    return UlsPlan(**common, **changes, num_users=train.num_users, sampling_probability=0.1)  # type: ignore[arg-type]


def ask(worker: Worker, plan: Plan, units: np.ndarray, **changes: object) -> TrainRequest:
    values: dict = {"plan": plan.to_json(), "round": 3, "sampling_seed": 5, "clip": Clip(norm=plan.clip_norm)}
    parameters = worker.layout.flatten(worker.model).numpy()
    return TrainRequest(**{**values, "units": units, "parameters": parameters, **changes})


@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_the_sum_of_several_messages_is_the_sum_of_one(worker: Worker, algorithm: str) -> None:
    plan, units = plan_of(worker, algorithm), np.arange(9)
    together = worker.train(ask(worker, plan, units))
    parts = [worker.train(ask(worker, plan, part)) for part in np.array_split(units, 4)]
    np.testing.assert_allclose(together.total, np.sum([part.total for part in parts], axis=0), atol=1e-6)
    assert together.statistics["rows"] == sum(part.statistics["rows"] for part in parts)
    np.testing.assert_array_equal(together.units, units)
    assert together.round == 3


@pytest.mark.parametrize("local_steps", [1, 3])
def test_every_user_is_clipped_on_its_own(worker: Worker, local_steps: int) -> None:
    plan = plan_of(worker, "uls", local_steps=local_steps)
    for user in range(5):
        reply = worker.train(ask(worker, plan, np.array([user])))
        norm = float(np.linalg.norm(reply.total.astype(np.float64)))
        assert 0 < norm <= plan.clip_norm
        # An untrained model's gradients are far above 0.1: everybody is clipped, to the bound.
        if local_steps == 1:
            assert norm == pytest.approx(plan.clip_norm, rel=1e-3)
            assert reply.statistics["clipped_units"] == 1


@pytest.mark.parametrize("exact", [False, True])
def test_norms_are_those_of_the_updates_before_the_clip(worker: Worker, exact: bool) -> None:
    units = np.arange(5)
    wide, narrow = (dataclasses.replace(plan_of(worker, "uls"), clip_norm=norm) for norm in (1e4, 0.1))
    resolution = resolution_for(Clip(norm=0.1), narrow.population) if exact else 0.0
    reply = worker.train(ask(worker, narrow, units, resolution=resolution))
    alone = [worker.train(ask(worker, wide, unit[None])).total for unit in units]  # nobody is clipped
    assert reply.norms.dtype == np.float32
    np.testing.assert_allclose(np.sort(reply.norms), np.sort([np.linalg.norm(one) for one in alone]), rtol=1e-4)
    assert reply.statistics["memory_bytes"] > 50_000_000


def test_exact_mode_gives_the_same_sum_on_the_grid(worker: Worker) -> None:
    plan, units = plan_of(worker, "uls"), np.arange(6)
    resolution = resolution_for(Clip(norm=plan.clip_norm), plan.population)
    exact = worker.train(ask(worker, plan, units, resolution=resolution))
    assert exact.total.dtype == np.int64
    plain = worker.train(ask(worker, plan, units))
    np.testing.assert_allclose(dequantise(exact.total, resolution), plain.total, atol=1e-6)


def test_rows_fetched_ahead_are_the_ones_that_would_be_drawn(worker: Worker) -> None:
    plan, following = plan_of(worker, "uls"), np.arange(4, 9)
    expected = worker.train(ask(worker, plan, following, round=4)).total
    worker.train(ask(worker, plan, np.arange(4), next_units=following))
    assert worker._ahead[1] is not None
    np.testing.assert_array_equal(worker.train(ask(worker, plan, following, round=4)).total, expected)


@pytest.mark.parametrize("changes", [{"units": np.arange(9, 14)}, {"sampling_seed": 6}, {"round": 5}])
def test_rows_fetched_ahead_are_not_taken_for_others(worker: Worker, changes: dict) -> None:
    plan, announced = plan_of(worker, "uls"), np.arange(4, 9)
    asked = {"units": announced, "round": 4} | changes
    expected = worker.train(ask(worker, plan, **asked)).total
    worker.train(ask(worker, plan, np.arange(4), next_units=announced))
    np.testing.assert_array_equal(worker.train(ask(worker, plan, **asked)).total, expected)


def test_sums_are_what_the_parameters_were(worker: Worker) -> None:
    """A tensor for a tensor, which then need not leave the device."""
    plan, units = plan_of(worker, "uls"), np.arange(3)
    asked = ask(worker, plan, units)
    of_array = worker.train(asked).total
    of_tensor = worker.train(ask(worker, plan, units, parameters=torch.from_numpy(asked.parameters))).total
    assert isinstance(of_array, np.ndarray)
    assert isinstance(of_tensor, torch.Tensor)
    assert of_tensor.device.type == worker.device.type
    np.testing.assert_array_equal(of_tensor.cpu().numpy(), of_array)


def test_parameters_that_must_not_be_written_to_are_read_where_they_are() -> None:
    """As the shared object store gives them; and not a word of it."""
    flat = np.arange(4, dtype=np.float32)
    flat.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = as_tensor(flat)
    assert read.data_ptr() == flat.ctypes.data
    assert as_tensor(read) is read


def test_a_reply_says_how_long_rows_and_gradients_took(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart, and no more together than all of it."""
    took = {"load": 0.05, "compute": 0.1}
    fetched, clipped = worker._fetched, worker._clipped
    monkeypatch.setattr(worker, "_fetched", lambda *asked: time.sleep(took["load"]) or fetched(*asked))
    monkeypatch.setattr(worker, "_clipped", lambda *asked: time.sleep(took["compute"]) or clipped(*asked))
    seconds = worker.train(ask(worker, plan_of(worker, "uls"), np.arange(2))).statistics
    assert all(seconds[f"{phase}_seconds"] >= least for phase, least in took.items())
    assert seconds["load_seconds"] + seconds["compute_seconds"] <= seconds["seconds"]


def test_parameters_that_are_not_finite_add_zero_and_are_counted(worker: Worker) -> None:
    plan = plan_of(worker, "uls")
    broken = worker.layout.flatten(worker.model).numpy()
    kept = broken.copy()
    broken[:] = np.nan
    reply = worker.train(ask(worker, plan, np.arange(3), parameters=broken))
    assert reply.statistics["nonfinite_units"] == 3
    assert not reply.total.any()
    worker.layout.load(worker.model, kept)


def test_a_micro_batch_that_does_not_fit_is_halved_for_good(worker: Worker) -> None:
    tried = []

    def compute(max_tokens: int) -> str:
        tried.append(max_tokens)
        if max_tokens > 128:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert worker._with_memory_left(compute) == "done"  # type: ignore[comparison-overlap]
    assert tried == [512, 256, 128]
    assert worker.max_tokens == 128
    with pytest.raises(torch.OutOfMemoryError):
        worker._with_memory_left(lambda tokens: compute(10**6))
    worker.max_tokens = 512


def test_held_out_rows_are_measured_one_by_one(worker: Worker) -> None:
    rows = np.array([0, 3, 1])
    parameters = worker.layout.flatten(worker.model).numpy()
    reply = worker.evaluate(EvaluateRequest(split="test", rows=rows, parameters=parameters))
    alone = worker.evaluate(EvaluateRequest(split="test", rows=rows[1:2], parameters=parameters))
    assert reply.loss_sum[1] == pytest.approx(alone.loss_sum[0], rel=1e-5)
    np.testing.assert_array_equal(reply.label_count, worker.store.split("test").row_lengths[rows] - 1)


def test_held_out_rows_are_measured_in_the_precision_of_gradients(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = worker.layout.flatten(worker.model).numpy()
    asked = EvaluateRequest(split="test", rows=np.arange(3), parameters=parameters)
    computing = worker.computing
    found = {}
    for precision in ("float32", "bfloat16"):
        worker.computing = Computing.of(RunConfig(engine=EngineConfig(precision=precision)), 16)
        found[precision] = worker.evaluate(asked).loss_sum
    worker.computing = computing
    assert (found["bfloat16"] != found["float32"]).all()
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=1e-2)


def test_held_out_rows_that_do_not_fit_are_measured_in_smaller_batches(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def measuring(*arguments: object, **options: object) -> object:
        tried.append(options["max_tokens"])
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no room")
        return evaluate_rows(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("clients.worker.evaluate_rows", measuring)
    parameters = worker.layout.flatten(worker.model).numpy()
    worker.evaluate(EvaluateRequest(split="test", rows=np.arange(3), parameters=parameters))
    assert tried == [512, 256]
    worker.max_tokens = 512


def test_trial_work_says_how_many_tokens_it_did(worker: Worker) -> None:
    assert worker.work(160) == 160


@pytest.mark.parametrize(
    ("precision", "kind", "half"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("float32", "cuda", False),
        ("bfloat16", "cpu", True),
    ],
)
def test_precision_is_chosen_by_the_device_unless_it_is_given(
    worker: Worker, precision: Literal["auto", "float32", "bfloat16"], kind: str, half: bool
) -> None:
    """On a device of another kind, too, of which nothing is asked."""
    computing = Computing.of(RunConfig(engine=EngineConfig(precision=precision)), 16)
    other = copy.copy(worker)
    other.computing, other.device = computing, torch.device(kind)
    assert other._autocast == (torch.bfloat16 if half else None)


@pytest.mark.parametrize(("compile", "compiled"), [("auto", None), ("on", True), ("off", False)])
def test_passes_are_compiled_as_the_run_asks_for(
    worker: Worker, compile: Literal["auto", "on", "off"], compiled: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noting(*arguments: object, **options: object) -> None:
        asked.append(options["compiled"])
        raise KeyboardInterrupt

    monkeypatch.setattr("clients.worker.clipped_sum", noting)
    other = copy.copy(worker)
    other.computing = Computing.of(RunConfig(engine=EngineConfig(compile=compile)), 16)
    with pytest.raises(KeyboardInterrupt):
        other.train(ask(worker, plan_of(worker, "uls"), np.arange(2)))
    with pytest.raises(KeyboardInterrupt):
        other.work(64)
    assert asked == [compiled, bool(compiled)]
