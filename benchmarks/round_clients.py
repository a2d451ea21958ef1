"""Clients of the round benchmark on Ray; apart from it, so that it runs without Flower."""

from collections.abc import Mapping
from typing import Any

import torch
from flwr.clientapp import ClientApp

from benchmarks.round import worker_of
from clients.answers import app_of
from fedsim.engine.ray_grid import RayGrid


def client_app() -> ClientApp:
    """A ClientApp that answers with the benchmark's worker."""
    return app_of(worker_of)


def grid(settings: Mapping[str, Any], workers: int) -> RayGrid:
    """So many workers on Ray actors, which share a GPU where there is one."""
    gpus = 1 / workers if torch.cuda.is_available() else 0.0
    return RayGrid("benchmarks.round_clients:client_app", dict(settings), workers=workers, gpus_per_worker=gpus)
