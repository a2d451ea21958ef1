"""Exact sums on a GPU: what is switched on there, and that nothing measured chooses the micro-batch.

There is no GPU here: a device of that kind is named, and of it nothing is asked.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from clients.computing import Computing
from clients.repeatable import WORKSPACE
from clients.worker import Worker
from experiments.simulation import with_measured_slices
from fedsim.clip import Clip
from fedsim.config import EngineConfig, RunConfig
from fedsim.engine.devices import Devices
from fedsim.engine.exact import MICRO_BATCH_TOKENS
from fedsim.engine.slices import Measured
from fedsim.engine.work import Work
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients import CausalLanguageModel
from fedsim.rows import TokenRows


class OnGpu(torch.nn.Linear):
    """A model that notes how things stood when it was moved to its device."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.workspace: str | None = "never moved"

    def to(self, *_: Any) -> "OnGpu":  # type: ignore[override]
        self.workspace = os.environ.get(WORKSPACE)
        return self


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Workers are on a GPU; what they ask torch for as to deterministic kernels."""
    asked: list[bool] = []
    threads = torch.get_num_threads()
    monkeypatch.setattr("clients.worker.computing_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(WORKSPACE, raising=False)
    yield asked
    torch.set_num_threads(threads)
    os.environ.pop(WORKSPACE, None)


def made(exact: bool, **engine: Any) -> tuple[Worker, OnGpu]:
    model = OnGpu()
    config = RunConfig(engine=EngineConfig(exact=exact, **engine))
    return Worker(model, CausalLanguageModel(), None, Computing.of(config, 16)), model  # type: ignore[arg-type]


def test_a_gpu_computes_with_deterministic_kernels_where_sums_are_exact(deterministic: list[bool]) -> None:
    _, model = made(exact=True)
    assert deterministic == [True]
    assert not torch.backends.cudnn.benchmark
    assert model.workspace == ":4096:8"  # by then: CUDA reads it when it starts


def test_other_runs_and_cpus_keep_their_kernels(deterministic: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = made(exact=False)
    monkeypatch.setattr("clients.worker.computing_device", lambda: torch.device("cpu"))
    made(exact=True)
    assert deterministic == []
    assert model.workspace is None
    assert torch.backends.cudnn.benchmark


def test_a_workspace_that_does_not_repeat_itself_is_refused(
    deterministic: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(InvalidInput, match=WORKSPACE):
        made(exact=True)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    assert made(exact=True)[1].workspace == ":16:8"


@pytest.mark.parametrize(("given", "expected"), [(0, MICRO_BATCH_TOKENS), (96, 96)])
def test_the_micro_batch_of_exact_sums_is_the_configurations(
    deterministic: list[bool], monkeypatch: pytest.MonkeyPatch, given: int, expected: int
) -> None:
    """Whatever is free on the device, which is not even asked for it."""
    asked: list[int | None] = []

    def refuse(*_: Any) -> None:
        raise AssertionError("asked for the free memory")

    def noting(*_: Any, **options: Any) -> Iterator[Any]:
        asked.append(options["max_tokens"])
        return iter(())

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    monkeypatch.setattr("clients.worker.clipped_units", noting)
    worker, _ = made(exact=True, max_tokens=given)
    rows = TokenRows.from_lists([[1, 2, 3]])
    request = Work(round=0, units=np.array([0]), clip=Clip(norm=1.0), parameters=np.zeros(6, np.float32), resolution=1)
    worker._with_memory_left(lambda tokens: worker._exact(_plan(), request, rows, np.array([0]), tokens))
    assert asked == [expected]


def test_a_trial_of_workers_leaves_the_micro_batch_of_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[int]] = []

    def measured(grid: Callable[[int], Any], workers: list[int], sizes: list[int]) -> list[Measured]:
        tried.append(list(sizes))
        return [Measured(workers=1, max_tokens=size, tokens_per_second=size) for size in sizes]

    monkeypatch.setattr("fedsim.engine.slices.try_slices", measured)
    for exact, given in ((True, 0), (True, 96), (False, 0)):
        config = RunConfig(engine=EngineConfig(exact=exact, workers=0, max_tokens=given))
        with_measured_slices(config, 10, 16, Devices(cores=2, gpus=0))
    assert tried[:2] == [[MICRO_BATCH_TOKENS], [96]]
    assert len(tried[2]) > 1


@pytest.mark.parametrize("tokens", [0, 4096])
def test_exact_sums_never_shrink_their_micro_batch(deterministic: list[bool], tokens: int) -> None:
    worker, _ = made(exact=True, max_tokens=tokens)
    tried: list[int | None] = []

    def compute(max_tokens: int | None) -> None:
        tried.append(max_tokens)
        raise torch.OutOfMemoryError("no room")

    for _ in range(2):
        with pytest.raises(Failure, match=f"{tokens or MICRO_BATCH_TOKENS} tokens.*--engine.max-tokens"):
            worker._with_memory_left(compute)
    assert tried == [tokens or MICRO_BATCH_TOKENS] * 2


def test_passes_of_exact_sums_are_not_compiled() -> None:
    with pytest.raises(InvalidInput, match=r"engine.compile"):
        EngineConfig(exact=True, compile="on")


def _plan() -> Any:
    class Plain:
        local_descent, weighting = None, "examples"

    return Plain()
