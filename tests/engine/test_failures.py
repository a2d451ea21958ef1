"""Workers that die, hang or vanish: the round's sum is the same, or the round fails and says why."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from flwr.clientapp import ClientApp
from mock_clients import CLIP, known_sum, make_app, request_for
from ray.cluster_utils import Cluster

from fedsim.engine import transport
from fedsim.engine.exact import resolution_for
from fedsim.engine.ray_grid import RayGrid
from server.dispatch import Dispatcher, RoundFailed
from server.packing import Roster

UNITS = np.random.default_rng(3).permutation(500)[:60].astype(np.int64)
COSTS = np.random.default_rng(4).pareto(1.5, size=60) + 1
SIZE = 100_000


def grid_of(cluster: Cluster, workers: int, **config: object) -> RayGrid:
    return RayGrid("mock_clients:app", config, workers=workers, address=cluster.address)  # type: ignore[arg-type]


def kill(process_id: int) -> None:
    # It may have been killed in the round before, after its last reply, so that nobody has noticed yet.
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


@pytest.mark.parametrize("units_per_message", [None, 5])
def test_workers_killed_at_random_moments_change_no_sum(cluster: Cluster, units_per_message: int | None) -> None:
    rng = np.random.default_rng(units_per_message or 0)
    failures: list[str] = []
    with grid_of(cluster, 3, seconds_per_unit=0.02) as grid:
        dispatcher = Dispatcher(grid, units_per_message=units_per_message, attempts=5)
        for round in range(5):
            grid.get_node_ids()
            victim = int(rng.choice(list(grid.process_ids.values())))
            killer = threading.Timer(rng.uniform(0, 0.5), kill, [victim])
            killer.start()
            gathered = dispatcher.gather(request_for(UNITS, round=round, size=SIZE), COSTS)
            killer.join()
            assert np.array_equal(gathered.total, known_sum(UNITS, round, SIZE))
            assert gathered.units == gathered.statistics["rows"] == len(UNITS)
            failures += gathered.failures
    assert any("worker" in failure and "died" in failure for failure in failures)


def test_exact_sums_are_bit_for_bit_the_same_for_any_number_of_workers_and_a_death(
    cluster: Cluster, tmp_path: Path
) -> None:
    resolution = resolution_for(CLIP, 500)
    totals = []
    for workers in (1, 2, 4):
        with grid_of(cluster, workers, marks=str(tmp_path)) as grid:
            request = request_for(UNITS, size=3000, resolution=resolution, misfortune={"die": int(UNITS[7])})
            gathered = Dispatcher(grid).gather(request, COSTS)
            totals.append(gathered.total)
            assert len(gathered.failures) == (workers == 1)
    assert np.array_equal(totals[0], totals[1])
    assert np.array_equal(totals[0], totals[2])


def test_a_worker_that_hangs_is_timed_out_and_replaced(cluster: Cluster, tmp_path: Path) -> None:
    with grid_of(cluster, 2, marks=str(tmp_path)) as grid:
        before = grid.process_ids
        request = request_for(UNITS, size=SIZE, misfortune={"hang": int(UNITS[7])})
        gathered = Dispatcher(grid, timeout=1.5).gather(request, COSTS)
        assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
        assert len(gathered.failures) == 1
        assert "no answer in 1.5 s" in gathered.failures[0]
        hung = int(gathered.failures[0].split("worker ")[1][0])
        gathered = Dispatcher(grid).gather(request_for(UNITS, round=1, size=SIZE), COSTS)
        assert not gathered.failures
        deadline = time.monotonic() + 30
        while Path(f"/proc/{before[hung]}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_worker_that_is_frozen_is_timed_out(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "REACH_SECONDS", 1.0)  # it does not say, either, whether segments reach it
    with grid_of(cluster, 2) as grid:
        os.kill(grid.process_ids[1], signal.SIGSTOP)
        gathered = Dispatcher(grid, timeout=1.5).gather(request_for(UNITS, size=SIZE), COSTS)
        assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
        assert "worker 1" in gathered.failures[0]


def test_a_unit_that_kills_every_worker_fails_the_round(cluster: Cluster) -> None:
    with grid_of(cluster, 2) as grid:
        request = request_for(UNITS, size=SIZE, misfortune={"die": int(UNITS[7])})
        with pytest.raises(RoundFailed, match=r"^round 0: worker \d failed on \d+ units: .*died.*attempt 3 of 3"):
            Dispatcher(grid).gather(request, COSTS)


def test_the_round_fails_when_no_worker_is_left(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    def app_that_stops_loading() -> ClientApp:
        if broken.exists():
            raise OSError("the disk is gone")
        return make_app()

    with RayGrid(app_that_stops_loading, workers=1, address=cluster.address) as grid:
        broken.touch()
        os.kill(grid.process_ids[1], signal.SIGKILL)
        with pytest.raises(RoundFailed, match=r"no other worker is left.*the disk is gone"):
            Dispatcher(grid, roster=Roster(grid, 0.5)).gather(request_for(UNITS), COSTS)


def test_a_node_that_dies_in_a_round_has_its_units_computed_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    gate = tmp_path / "gate"

    def remove_node() -> None:
        cluster.remove_node(node, allow_graceful=False)
        gate.touch()

    cluster.wait_for_nodes()
    with RayGrid(
        "mock_clients:app", {"gate": str(gate)}, workers=5, cpus_per_worker=2, address=cluster.address
    ) as grid:
        for slot in grid._slots.values():
            slot.near = False  # as on machines of their own, or the dead node's worker might answer through segments
        killer = threading.Timer(0.2, remove_node)
        killer.start()
        gathered = Dispatcher(grid).gather(request_for(UNITS, size=SIZE), COSTS)
        killer.join()
        assert np.array_equal(gathered.total, known_sum(UNITS, 0, SIZE))
        assert len(gathered.failures) == 1
        assert len(grid.get_node_ids()) == 4
        # Ray needs a while to notice; until then it would offer the dead node's cores to the tests that follow.
        deadline = time.monotonic() + 120
        while sum(node["Alive"] for node in ray.nodes()) > 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
