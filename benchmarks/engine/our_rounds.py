"""The small task on fedsim: a client that computes clipped sums, and the server's few lines around the dispatcher."""

import time

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from benchmarks.engine.small_task import (
    CLIP_NORM,
    LEARNING_RATE,
    NOISE_MULTIPLIER,
    Task,
    make_model,
    make_users,
)
from fedsim.clip import Clip
from fedsim.engine.grid import WaitingGrid
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.gradients import CausalLanguageModel, ParameterLayout, clipped_sum
from fedsim.rows import TokenRows
from server.dispatch import Dispatcher


def client_app() -> ClientApp:
    """A ClientApp that holds the model and all users."""
    task = Task()
    model = make_model(task).eval()
    users = make_users(task)
    layout = ParameterLayout.of(model)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        began = time.perf_counter()
        request = TrainRequest.from_record(message.content)
        layout.load(model, torch.from_numpy(np.array(request.parameters)))
        rows, unit_ids = _rows_of([users[unit] for unit in request.units])
        result = clipped_sum(model, rows, unit_ids, request.clip, objective=CausalLanguageModel())
        reply = TrainReply(
            round=request.round,
            units=request.units,
            total=result.total.numpy(),
            statistics={"seconds": time.perf_counter() - began},
        )
        return Message(reply.to_record(), reply_to=message)

    return app


def _rows_of(users: list[np.ndarray]) -> tuple[TokenRows, np.ndarray]:
    counts = [len(rows) for rows in users]
    tokens = np.concatenate(users)
    offsets = np.arange(len(tokens) + 1, dtype=np.int64) * tokens.shape[1]
    return TokenRows(tokens=tokens.ravel(), offsets=offsets), np.repeat(np.arange(len(users)), counts)


def train(grid: WaitingGrid, task: Task, rounds: int, noise_multiplier: float) -> tuple[list[float], np.ndarray]:
    """Seconds of each round, and the final flat parameters. Users come in order, cohort by cohort."""
    layout = ParameterLayout.of(make_model(task))
    flat = layout.flatten(make_model(task)).numpy().copy()
    sizes = np.array([len(rows) for rows in make_users(task)])
    dispatcher = Dispatcher(grid)
    rng = np.random.default_rng(0)
    seconds = []
    for round in range(rounds):
        began = time.perf_counter()
        units = np.arange(round * task.cohort, (round + 1) * task.cohort) % task.users
        request = TrainRequest(round=round, units=units, clip=Clip(norm=CLIP_NORM), parameters=flat)
        total = dispatcher.gather(request, sizes[units]).total
        if noise_multiplier:
            total += noise_multiplier * CLIP_NORM * rng.standard_normal(len(total), dtype=np.float32)
        flat = flat - LEARNING_RATE / task.cohort * total
        seconds.append(time.perf_counter() - began)
    return seconds, flat


def measure(grid: WaitingGrid, rounds: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Seconds of each round, and the parameters by name after one round without noise."""
    task = Task()
    _, after_one = train(grid, task, 1, 0.0)
    seconds, _ = train(grid, task, rounds, NOISE_MULTIPLIER)
    layout = ParameterLayout.of(make_model(task))
    return seconds, {name: np.array(view) for name, view in layout.views(torch.from_numpy(after_one)).items()}
