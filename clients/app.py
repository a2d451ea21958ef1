"""The Flower ClientApp: the same on Ray actors, in this process, and under `flwr run`."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from clients.answers import app_of
from clients.group import Group
from clients.worker import Worker
from fedsim.config import RunConfig, from_flat
from fedsim.engine.environment import stay_alone_under_flower


def resident_worker(run_config: Mapping[str, Any]) -> Worker | Group:
    """The worker of this process for a run; built at its first message."""
    return _worker(json.dumps(dict(run_config), sort_keys=True))


@functools.lru_cache(maxsize=1)
def _worker(run_config: str) -> Worker | Group:
    config = from_flat(RunConfig, json.loads(run_config))
    return Group(config) if config.engine.devices_per_worker > 1 else Worker.of(config)


stay_alone_under_flower()
app = app_of(resident_worker)
