"""What each process does: write a store, or start and run rounds on one."""

import logging
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from benchmarks.gradient_models import Size, build
from benchmarks.synthetic_users import user_sizes
from clients.answers import app_of
from clients.computing import Computing
from clients.worker import Worker
from fedsim.config import OptimizerConfig
from fedsim.data.shape import Examples
from fedsim.data.store import UserStore
from fedsim.data.write import StoreWriter
from fedsim.engine.local import LocalGrid
from fedsim.gradients import CausalLanguageModel, ParameterLayout
from fedsim.optimizer import ServerOptimizer
from fedsim.plan import ALGORITHMS, UserSizes
from fedsim.privacy.ledger import Ledger
from fedsim.release import Release
from fedsim.rows import SizeCounts
from fedsim.seeds import Seeds
from server.alarms import Alarms
from server.dispatch import Dispatcher
from server.evaluation import HeldOut
from server.round import Budget, Gather, Round

BATCH, GROUP_SIZE = 1000, {"uls": 1, "els": 4}
ROWS_PER_USER, TOKENS_PER_ROW = 3, 2
MODEL = Size(kind="gpt2", width=8, layers=1, heads=1, vocabulary=64, length=8)
HELD_OUT_ROWS = 2000
FEW = 3 * BATCH
"""Users of the store on which libraries are used first."""
USERS_AT_ONCE = 1_000_000
WARM_UP, TRACED = 3, 2


def write(folder: Path, num_users: int) -> None:
    """A store of so many users, nine tenths of them for training; most own a row or two, a few very many."""
    folder.mkdir()
    owned, generator = user_sizes(num_users, ROWS_PER_USER * num_users, seed=0), np.random.default_rng(1)
    writer = StoreWriter(folder, np.dtype(np.uint16))
    for start in range(0, num_users, USERS_AT_ONCE):
        part = owned[start : start + USERS_AT_ONCE]
        lengths = np.full(part.sum(), TOKENS_PER_ROW)
        keys = np.stack([np.arange(start, start + len(part)), np.zeros(len(part))], axis=1).astype(np.uint64)
        tokens = generator.integers(0, MODEL.vocabulary, lengths.sum(), dtype=np.uint16)
        writer.append(keys, Examples(tokens=tokens, lengths=lengths, users=np.repeat(np.arange(len(part)), part)))
    first, second = num_users * 9 // 10, num_users * 19 // 20
    splits = {"train": [0, first], "validation": [first, second], "test": [second, num_users]}
    names = pa.table({"user": pc.cast(pa.array(np.arange(num_users)), pa.string())})
    writer.finish(names, splits, {"classes": [], "tokenizer": "none"})


def use(store: Path, few: Path, algorithm: str, rounds: int) -> dict[str, Any]:
    """Start on a store and run rounds: what that takes."""
    logging.getLogger("server").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="growth-ledgers-") as folder:
        _measured(few, algorithm, 2, Path(folder) / "few.jsonl")
        return _measured(store, algorithm, rounds, Path(folder) / "ledger.jsonl")


def _measured(store: Path, algorithm: str, rounds: int, ledger: Path) -> dict[str, Any]:
    resident = _highest_resident_mib(anew=True)
    began, by_clock = time.process_time(), time.perf_counter()
    round, gather = _start(store, algorithm, ledger)
    round.units(0)
    start, by_clock = time.process_time() - began, time.perf_counter() - by_clock
    started = _highest_resident_mib()
    seconds = []
    for number in range(WARM_UP + rounds):
        began = time.process_time()
        round.run(number, gather)
        seconds.append(time.process_time() - began)
    grown = _highest_resident_mib() - started
    allocated = 0.0
    for number in range(WARM_UP + rounds, WARM_UP + rounds + TRACED):
        tracemalloc.start()
        round.run(number, gather)
        allocated = max(allocated, tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    return {
        "users": _users_of(store),
        "algorithm": algorithm,
        "start_seconds": start,
        "start_seconds_by_clock": by_clock,
        "start_mib": started - resident,
        "round_seconds": float(np.median(seconds[WARM_UP:])),
        "round_mib": allocated,
        "resident_growth_of_all_rounds_mib": grown,
    }


def _start(store: Path, algorithm: str, ledger: Path) -> tuple[Round, Gather]:
    """What a run does with a store before its first round, as `server.app` and `Worker.of` do it."""
    opened = UserStore.open(store)
    longest = opened.longest_row
    train = opened.split("train")
    sizes = UserSizes.of_users(train)
    common = {"clip_norm": 1.0, "noise_multiplier": 1.0, "steps": 10_000, "delta": 1e-8}
    plan = ALGORITHMS[algorithm].draft(sizes, gradients_per_round=BATCH, group_size=GROUP_SIZE[algorithm], **common)
    model = build(MODEL, torch.device("cpu"), False)
    worker = Worker(model, CausalLanguageModel(), UserStore.open(store), Computing(row_tokens=longest))
    grid = LocalGrid(app_of(lambda _: worker))
    HeldOut(grid, opened, HELD_OUT_ROWS, HELD_OUT_ROWS)
    layout, seeds = ParameterLayout.of(model), Seeds(sampling=1, noise=2)
    round = Round(
        plan,
        train,
        seeds,
        Budget(plan, Ledger.open(ledger), 1e6),
        Release(plan, layout.sizes, seeds.noise),
        ServerOptimizer(layout.flatten(model), OptimizerConfig(), plan.steps),
        row_tokens=longest,
    )
    Alarms(plan, len(round.parameters), private_too=True).before_training(SizeCounts.of(round.users))
    return round, Dispatcher(grid).gather


def _users_of(store: Path) -> int:
    return UserStore.open(store).num_users


def _highest_resident_mib(anew: bool = False) -> float:
    """The most memory that this process has had resident, mapped pages counted; anew: forget what was before now."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split()[:2] for line in Path("/proc/self/status").read_text().splitlines() if " kB" in line)
    return int(fields["VmHWM:"]) / 1024
