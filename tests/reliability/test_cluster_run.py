"""A run on a cluster that was started from another folder, with other caches: on its GPUs, one worker each."""

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from mock_clients import known_sum, request_for
from ray.cluster_utils import Cluster
from small_runs import trained

from experiments.simulation import _default_workers, gpu_share
from fedsim.config import EngineConfig, RunConfig
from fedsim.engine import ray_grid
from fedsim.engine.devices import Devices
from server.dispatch import Dispatcher


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node that says it has two GPUs."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = {
        "ray_client_server_port": port,
        "num_cpus": 4,
        "num_gpus": 2,
        "object_store_memory": 200 << 20,
        "include_dashboard": False,
    }
    made = Cluster(initialize_head=True, head_node_args=node)
    os.chdir(before)
    yield made
    ray.shutdown()
    made.shutdown()


def test_relative_paths_are_the_drivers(
    cluster: Cluster,
    small_run: Callable[..., RunConfig],
    posts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, float, float, float]] = []
    begin = ray_grid.RayGrid.__init__

    def begun(grid: ray_grid.RayGrid, *arguments: object, **named: object) -> None:
        limits = named["start_timeout"], named["timeout"]
        asked.append((named["workers"], named["gpus_per_worker"], *limits))  # type: ignore[arg-type]
        begin(grid, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ray_grid.RayGrid, "__init__", begun)
    config = small_run("run")
    (tmp_path / "posts.jsonl").write_bytes(posts.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", "cache")
    data = dataclasses.replace(config.data, path="posts.jsonl")
    engine = EngineConfig(address=cluster.address, start_seconds=123.0, timeout_seconds=98.0)
    plan = dataclasses.replace(config.plan, rounds=2)
    assert trained(dataclasses.replace(config, data=data, engine=engine, plan=plan))["rounds"] == 2
    assert asked == [(2, 1.0, 123.0, 98.0)]
    assert not ray.is_initialized()
    written = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert written["data.path"] == "posts.jsonl", "the run's own settings are as they were given"


def test_a_machine_that_is_no_node_joins_by_rays_client(cluster: Cluster) -> None:
    port = cluster.head_node._ray_params.ray_client_server_port
    units = np.arange(50)
    with ray_grid.RayGrid("mock_clients:app", workers=2, address=f"ray://127.0.0.1:{port}") as grid:
        gathered = Dispatcher(grid).gather(request_for(units, size=10_000), np.ones(len(units)))
    assert np.array_equal(gathered.total, known_sum(units, 0, 10_000))
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("gpus", "share", "workers"), [(0, 0.0, 2), (1, 0.0, 1), (8, 0.0, 8), (2, 0.25, 8), (2, 0.6, 2), (8, 2.0, 4)]
)
def test_workers_by_default(gpus: int, share: float, workers: int) -> None:
    config = RunConfig(engine=EngineConfig(gpus_per_worker=share))
    assert _default_workers(config, Devices(cores=16, gpus=gpus)) == workers


@pytest.mark.parametrize(("workers", "gpus"), [(1, 8), (8, 8), (3, 2), (7, 2), (16, 4), (5, 0)])
def test_shares_of_gpus_leave_room_for_all_workers(workers: int, gpus: int) -> None:
    share = gpu_share(workers, gpus)
    assert share == 0 if not gpus else share <= 1
    if gpus:
        assert gpus * int(1 / share + 1e-9) >= workers
