"""A worker whose model is on a device that is not the host's: what it returns is what a worker of the host returns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.computing import Computing
from clients.worker import Worker
from fedsim.clip import Clip
from fedsim.config import RunConfig
from fedsim.data.config import DataConfig
from fedsim.engine.evaluation_messages import EvaluateRequest
from fedsim.engine.exact import resolution_for
from fedsim.engine.messages import TrainRequest
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.plan import UlsPlan
from fedsim.resources import Resources, open_resources

TINY = SmallModelConfig(layers=1, width=32, heads=2, vocabulary_size=512, steps=0)
CONFIG = RunConfig(data=DataConfig(packages=("numpy",), sequence_length=16), model=ModelConfig(small=TINY))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def resources(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Resources:
    """Each worker needs a model of its own, which it writes to."""
    monkeypatch.setenv("FEDSIM_CACHE", str(cache))
    return open_resources(CONFIG)


def worker_of(resources: Resources, **computing: Any) -> Worker:
    loaded = resources.loaded
    computing = {"row_tokens": 16, "max_tokens": 256, **computing}
    return Worker(loaded.model, loaded.objective, resources.store, Computing(**computing), len(loaded.tokenizer))


def plan_of(worker: Worker, **changes: Any) -> UlsPlan:
    values: dict[str, Any] = {"group_size": 2, "clip_norm": 0.1, "noise_multiplier": 1.0, "steps": 1, "delta": 1e-3}
    users = worker.store.split("train").num_users
    return UlsPlan(**{**values, **changes}, num_users=users, sampling_probability=0.1)


def ask(plan: UlsPlan, parameters: Any, units: np.ndarray, **changes: Any) -> TrainRequest:
    values: dict[str, Any] = {
        "plan": plan.to_json(),
        "round": 3,
        "sampling_seed": 5,
        "clip": Clip(norm=plan.clip_norm),
    }
    return TrainRequest(**{**values, "parameters": parameters, "units": units, **changes})


HOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fast": ({}, {}),
    "reference": ({"gradients": "reference"}, {}),
    "local steps": ({}, {"local_steps": 2}),
    "bfloat16": ({"autocast": None}, {}),
}


@pytest.mark.parametrize("how", HOW)
def test_sums_are_those_of_a_worker_of_the_host(
    how: str, resources: Resources, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on the device where parameters are one; an array for an array."""
    computing, changes = HOW[how]
    there = worker_of(resources, **computing)
    assert there.device.type == device.type
    assert {p.device for p in there.model.parameters()} == {device}
    flat = there.layout.flatten(there.model)
    monkeypatch.setattr("clients.worker.computing_device", lambda: torch.device("cpu"))
    host = worker_of(open_resources(CONFIG), **{**computing, "autocast": how == "bfloat16"})
    plan, units = plan_of(there, **changes), np.arange(5)
    expected = host.train(ask(plan, flat.cpu().numpy(), units))
    of_tensor, of_array = there.train(ask(plan, flat, units)), there.train(ask(plan, flat.cpu().numpy(), units))
    assert isinstance(of_tensor.total, torch.Tensor)
    assert of_tensor.total.device == device
    assert isinstance(of_array.total, np.ndarray)
    np.testing.assert_array_equal(of_tensor.total.cpu().numpy(), of_array.total)
    tolerance = 3e-2 if how == "bfloat16" else 1e-4
    assert np.linalg.norm(of_array.total - expected.total) <= tolerance * np.linalg.norm(expected.total)
    for name in ("clipped_units", "nonfinite_units", "empty_units", "rows", "tokens"):
        assert of_tensor.statistics[name] == expected.statistics[name]
    assert of_tensor.statistics["loss_sum"] == pytest.approx(expected.statistics["loss_sum"], rel=tolerance)
    assert there.work(64) == 64


def test_exact_sums_and_those_of_nobody(
    resources: Resources, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers, of the same kind as the parameters."""
    there = worker_of(resources, exact=True)
    flat = there.layout.flatten(there.model)
    monkeypatch.setattr("clients.worker.computing_device", lambda: torch.device("cpu"))
    host = worker_of(open_resources(CONFIG), exact=True)
    plan = plan_of(there)
    resolution = resolution_for(Clip(norm=plan.clip_norm), plan.population)
    for units in (np.arange(4), np.empty(0, np.int64)):
        expected = host.train(ask(plan, flat.cpu().numpy(), units, resolution=resolution)).total
        found = there.train(ask(plan, flat, units, resolution=resolution)).total
        assert isinstance(found, torch.Tensor)
        assert (found.device, found.dtype) == (device, torch.int64)
        np.testing.assert_allclose(found.cpu().numpy() * resolution, expected * resolution, atol=1e-6)
        assert found.cpu().numpy().any() == bool(len(units))
    nobody = there.train(ask(plan, flat, np.empty(0, np.int64))).total
    assert (nobody.device, nobody.dtype) == (device, torch.float32)


def test_held_out_losses_are_those_of_a_worker_of_the_host(
    resources: Resources, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = worker_of(resources)
    flat = there.layout.flatten(there.model)
    monkeypatch.setattr("clients.worker.computing_device", lambda: torch.device("cpu"))
    host = worker_of(open_resources(CONFIG))
    asked = {"split": "validation", "rows": np.arange(6)}
    expected = host.evaluate(EvaluateRequest(parameters=flat.cpu().numpy(), **asked))
    for parameters in (flat, flat.cpu().numpy()):
        found = there.evaluate(EvaluateRequest(parameters=parameters, **asked))
        np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-5)
        np.testing.assert_array_equal(found.label_count, expected.label_count)
        np.testing.assert_array_equal(found.correct, expected.correct)
