"""Where the time of a private round goes: `python -m benchmarks.round --size 124m`.

Rounds as a run does them (sampled, charged to a ledger on disk, gathered, noised, stepped) on synthetic users in a
real store, of a GPT-2, or a Llama with adapters, of random weights. `--engine ray` has clients on Ray actors; `direct`
has one worker in this process, needs neither Flower nor Ray, and leaves parameters, sum, noise and optimizer on the
device where the worker computes. Prints the phases, and ends with one JSON line.
"""

import argparse
import functools
import json
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.gradient_models import SIZES, build
from clients.computing import Computing
from clients.worker import Worker
from fedsim.config import OptimizerConfig
from fedsim.data.shape import Examples
from fedsim.data.store import UserStore
from fedsim.data.write import StoreWriter
from fedsim.engine.work import Gathered, Work
from fedsim.gradients import CausalLanguageModel, ParameterLayout
from fedsim.optimizer import ServerOptimizer
from fedsim.phases import COMPUTE, LOAD, OTHER, WORKER_SECONDS, Times
from fedsim.plan import UlsPlan
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release
from fedsim.seeds import Seeds
from server.round import Budget, Gather, Round

POPULATION = 50
"""Users in the store for each that a round draws."""


def main() -> None:
    words, line = rounds(options_of())
    print(words)
    print(f"All but gradients: {100 * line['beyond_gradients']:.1f} % of a round")
    print(json.dumps(line))


def rounds(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Rounds as the options say: where their time went in words, and as what is kept of them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedsim-round-")))
        size = SIZES[options.size]
        users = options.users or size.users
        write_store(folder / "store", size.vocabulary, size.length, users * POPULATION, options.rows)
        settings = {"size": options.size, "store": str(folder / "store"), "precision": options.precision}
        gather = stack.enter_context(_Engine(options, settings))
        round = make_round(folder, settings, users, options, gather.device)
        warm_up(round, gather.gather, options.warm_up)
        found = measure(round, gather.gather, options.warm_up, options.rounds)
    times = found.pop("times")
    assert isinstance(times, Times)
    words = f"{options.size}, {users} users of {options.rows} rows, {options.engine} engine: {times.in_words()}"
    told = {"benchmark": "round", "size": options.size, "engine": options.engine, "users": users, "rows": options.rows}
    return words, told | found | {"beyond_gradients": beyond_gradients(times)} | times.to_json()


def beyond_gradients(times: Times) -> float:
    """Share of a round in which no gradients were computed."""
    return 1 - times.seconds.get(COMPUTE, 0.0) / times.whole


def write_store(folder: Path, vocabulary: int, length: int, users: int, rows: int) -> None:
    """Users of as many full rows of random tokens each."""
    folder.mkdir()
    writer = StoreWriter(folder, np.dtype(np.uint16))
    keys = np.stack([np.arange(users), np.zeros(users)], axis=1).astype(np.uint64)
    tokens = np.random.default_rng(0).integers(0, vocabulary, users * rows * length).astype(np.uint16)
    owners = np.repeat(np.arange(users), rows)
    writer.append(keys, Examples(tokens=tokens, lengths=np.full(users * rows, length), users=owners))
    splits = {"train": [0, users], "validation": [users, users], "test": [users, users]}
    names = pa.table({"user": pa.array([str(user) for user in range(users)])})
    writer.finish(names, splits, {"classes": [], "tokenizer": "none"})


def worker_of(settings: Mapping[str, Any]) -> Worker:
    """A worker on that store, with the model of that size."""
    return _worker(*(str(settings[name]) for name in ("size", "store", "precision")))


@functools.lru_cache(maxsize=1)
def _worker(size: str, store: str, precision: str) -> Worker:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computing = Computing(autocast=precision == "bfloat16", row_tokens=SIZES[size].length)
    return Worker(build(SIZES[size], device, False), CausalLanguageModel(), UserStore.open(store), computing)


def make_round(
    folder: Path, settings: Mapping[str, Any], users: int, options: argparse.Namespace, device: torch.device | None
) -> Round:
    """A round of user-level sampling with Adam; on a device, or, without one, on the CPU beside workers elsewhere."""
    model = worker_of(settings).model if device is not None else build(SIZES[options.size], torch.device("cpu"), False)
    layout, store = ParameterLayout.of(model), UserStore.open(settings["store"]).split("train")
    flat = layout.flatten(model)
    del model
    plan = UlsPlan(
        num_users=store.num_users,
        sampling_probability=users / store.num_users,
        group_size=options.rows,
        clip_norm=1.0,
        noise_multiplier=1.0,
        steps=1000,
        delta=1e-6,
    )
    seeds = Seeds(sampling=1, noise=2)
    threads = torch.get_num_threads()
    return Round(
        plan,
        store,
        seeds,
        Budget(plan, Ledger.open(folder / "ledger.jsonl"), 1000.0),
        Release(plan, layout.sizes, seeds.noise, threads=threads, device=flat.device),
        ServerOptimizer(flat, OptimizerConfig(), plan.steps),
        row_tokens=SIZES[options.size].length,
    )


def warm_up(round: Round, gather: Gather, rounds: int) -> None:
    """Rounds in which workers load their models, and micro-batches find their size."""
    for number in range(rounds):
        round.run(number, gather)


def measure(round: Round, gather: Gather, first: int, rounds: int) -> dict[str, Any]:
    """Times of so many rounds, and the processor time of this process in them."""
    before, used = round.phases.so_far(), _processor_seconds()
    with round.phases.of(OTHER):
        for number in range(first, first + rounds):
            if not round.affords(number):
                raise RuntimeError("the budget is spent")
            round.run(number, gather)
    times = round.phases.so_far().since(before)
    own = (_processor_seconds() - used) / rounds
    return {"times": replace(times, rounds=rounds), "parameters": len(round.parameters), "processor_seconds": own}


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Engine:
    """Where the workers are.

    Attributes:
        device: Where they compute, if that is in this process.
    """

    def __init__(self, options: argparse.Namespace, settings: Mapping[str, Any]) -> None:
        self._options, self._settings = options, settings
        self._stack = ExitStack()
        self.device = None if options.engine == "ray" else worker_of(settings).device
        self.gather: Gather = self._direct if options.engine == "direct" else self._dispatcher()

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _dispatcher(self) -> Gather:
        from benchmarks.round_clients import grid
        from server.dispatch import Dispatcher

        opened = self._stack.enter_context(grid(self._settings, self._options.workers))
        return Dispatcher(opened).gather

    def _direct(
        self, request: Work, costs: np.ndarray, *, next_units: np.ndarray | None = None, next_costs: Any = None
    ) -> Gathered:
        """The sum of the one worker of this process, without a message."""
        began = time.monotonic()
        ahead = request.next_units if next_units is None else next_units
        done = worker_of(self._settings).train(replace(request, next_units=ahead))
        phases = {phase: done.statistics[name] for phase, name in WORKER_SECONDS.items() if phase in (LOAD, COMPUTE)}
        seconds = time.monotonic() - began
        return Gathered(
            total=done.total,
            statistics=done.statistics,
            units=len(request.units),
            messages=1,
            failures=(),
            seconds=seconds,
            compute_seconds=done.statistics["seconds"],
            phases=phases,
        )


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options from words; from the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124m", choices=SIZES)
    parser.add_argument("--engine", default="ray", choices=("ray", "direct"))
    parser.add_argument("--workers", type=int, default=2, help="Ray actors")
    parser.add_argument("--users", type=int, default=0, help="that a round draws, in expectation; 0 is the size's own")
    parser.add_argument("--rows", type=int, default=1, help="full rows of each user")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
