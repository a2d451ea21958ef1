"""A long run whose workers keep dying: what does it leak?

`python -m benchmarks.soak` drives the real round loop (ledger, checkpoints, evaluation, dispatch) over Ray actors that
end themselves at random, and prints memory, file handles and object-store bytes as it goes. It ends with 1 when the
driver or a worker grew by more than 5 % after the first fifth of the rounds, or anything was left behind.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsim.config import OptimizerConfig
from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.messages import TrainReply, TrainRequest

USERS = 1000
ALLOWED_GROWTH = 0.05


def client_app() -> ClientApp:
    """Clients that return zeros, and die instead with the probability in the run configuration."""
    app = ClientApp()
    generator = np.random.default_rng(os.getpid())

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if generator.random() < float(context.run_config["death-probability"]):
            os._exit(1)
        request = TrainRequest.from_record(message.content)
        total = np.zeros(request.parameters.shape[0], dtype=np.float32)
        statistics = {"loss_sum": 1.0, "clipped_units": 1.0, "nonfinite_units": 0.0, "seconds": 0.01}
        statistics |= {"tokens": 8.0 * len(request.units), "memory_bytes": 1e6}
        reply = TrainReply(round=request.round, units=request.units, total=total, statistics=statistics)
        return Message(reply.to_record(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        rows = EvaluateRequest.from_record(message.content).rows
        ones = np.ones(len(rows), dtype=np.int64)
        reply = EvaluateReply(rows=rows, loss_sum=2.0 * ones, label_count=ones, correct=ones)
        return Message(reply.to_record(), reply_to=message)

    return app


class Sizes:
    """A store of USERS users with two rows each, of which only sizes are asked."""

    num_users, num_rows = USERS, 2 * USERS
    user_offsets = np.arange(USERS + 1, dtype=np.int64) * 2
    row_lengths = np.full(2 * USERS, 8)

    def split(self, name: str) -> "Sizes":
        return self


def resident_bytes(pid: int) -> int:
    """Memory of a process, shared pages of the object store left out."""
    resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def stored_objects() -> int:
    """Bytes in Ray's object store."""
    import ray
    from ray._private.internal_api import node_stats

    address = ray.nodes()[0]
    stats = node_stats(address["NodeManagerAddress"], address["NodeManagerPort"], False)
    return int(stats.store_stats.object_store_bytes_used)


def measure(grid: Any, round: int) -> dict[str, float]:
    """What this process, its workers and the object store hold now."""
    workers = [resident_bytes(pid) for pid in grid.process_ids.values() if Path(f"/proc/{pid}/statm").exists()]
    return {
        "round": round,
        "driver MB": resident_bytes(os.getpid()) / 1e6,
        "largest worker MB": max(workers, default=0) / 1e6,
        "driver handles": len(os.listdir("/proc/self/fd")),
        "object store MB": stored_objects() / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--death-probability", type=float, default=0.02, help="of a worker, at each message")
    options = parser.parse_args()
    from fedsim.engine.ray_grid import RayGrid
    from fedsim.optimizer import ServerOptimizer
    from fedsim.plan import UlsPlan
    from fedsim.privacy.ledger import Ledger
    from fedsim.release import Release
    from fedsim.seeds import Seeds
    from server.checkpoint import CheckpointWriter
    from server.dispatch import Dispatcher
    from server.evaluation import HeldOut
    from server.results.run_folder import RunFolder
    from server.round import Budget, Round
    from server.training import Job, Training

    plan = UlsPlan(
        num_users=USERS,
        sampling_probability=0.05,
        group_size=2,
        clip_norm=1.0,
        noise_multiplier=1.0,
        steps=options.rounds,
        delta=1e-4,
    )
    measured: list[dict[str, float]] = []
    failures: list[str] = []
    seeds, store = Seeds(sampling=1, noise=2), Sizes()
    parameters = np.zeros(options.parameters, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.jsonl") as ledger:
        run = RunFolder(folder)
        grid = RayGrid(
            client_app, {"death-probability": options.death_probability}, workers=options.workers, timeout=300.0
        )
        handles_before = len(os.listdir("/proc/self/fd"))
        dispatcher = Dispatcher(grid, timeout=300.0)

        def watched(request: TrainRequest, costs: np.ndarray, **following: Any) -> Any:
            gathered = dispatcher.gather(request, costs, **following)
            failures.extend(gathered.failures)
            if request.round % max(1, options.rounds // 20) == 0:
                measured.append(measure(grid, request.round))
                print("  ".join(f"{name} {value:,.1f}" for name, value in measured[-1].items()), flush=True)
            return gathered

        checkpoints = CheckpointWriter(run.checkpoints, rounds=10, minutes=0, keep=2)
        job = Job(
            round=Round(
                plan,
                store,  # type: ignore[arg-type]  # its text is never asked for
                seeds,
                Budget(plan, ledger, 10_000.0),
                Release(plan, {"parameters": options.parameters}, seeds.noise),
                ServerOptimizer(parameters, OptimizerConfig(name="adam"), plan.steps),
            ),
            gather=watched,
            held_out=HeldOut(grid, store, 100, 100),  # type: ignore[arg-type]
            folder=run,
            evaluate_every=max(1, options.rounds // 10),
            checkpoints=checkpoints,
        )
        try:
            began = time.monotonic()
            Training(job).run()
            seconds = time.monotonic() - began
            checkpoints.join()
            charges = len(ledger)
        finally:
            grid.close()
    return verdict(measured, len(failures), charges, options.rounds, seconds, handles_before)


def verdict(
    measured: list[dict[str, float]], failures: int, charges: int, rounds: int, seconds: float, handles: int
) -> int:
    """Print what the run shows; 1 where something grew."""
    settled = [row for row in measured if row["round"] >= rounds / 5]
    grown = False
    print(f"{rounds} rounds in {seconds:.0f} s, {failures} messages of workers that died, {charges} charges")
    for name in ("driver MB", "largest worker MB", "driver handles", "object store MB"):
        early, late = (np.median([row[name] for row in part]) for part in np.array_split(settled, 2))
        change = late / early - 1 if early else 0.0
        grown |= bool(late > early * (1 + ALLOWED_GROWTH))
        print(
            f"{name}: median {early:,.1f} in the first half of the settled rounds, {late:,.1f} in the second "
            f"({change:+.1%})"
        )
    print(f"handles of the driver: {handles} before the run, {settled[-1]['driver handles']:.0f} at its end")
    return int(grown or charges != rounds)


if __name__ == "__main__":
    sys.exit(main())
