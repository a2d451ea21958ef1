"""Weights & Biases: online where there is an API key, otherwise offline in the run's folder."""

import netrc
import os
import secrets
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlparse

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when the library is imported
import wandb

from fedsim.terminal import say
from server.callbacks.trackers.flat import Scalar
from server.callbacks.trackers.tracker import PROJECT, Opening, Tracked

HOST = "https://api.wandb.ai"


class _Run:
    """A run at Weights & Biases."""

    def __init__(self, run: Opening) -> None:
        self.key = run.known or secrets.token_hex(4)
        mode = _mode()
        # Neither the command line, which may hold seeds, nor what is printed; and no code, nothing of the machine
        # either where how busy it is would tell of users.
        settings = wandb.Settings(
            console="off",
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=run.private_only,
            x_disable_machine_info=run.private_only,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=self.key,
            resume="allow",
            dir=str(run.folder),
            mode=mode,
            config=dict(run.options),
            settings=settings,
            reinit="create_new",
        )
        # A step of its own would refuse rounds that a resumed run tells anew.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")
        if mode == "offline":
            say(f"wandb: there is no API key, so the run is kept in {run.folder / 'wandb'}; `wandb sync` sends it.")

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"round": round, **numbers})

    def summarise(self, outcome: Mapping[str, Scalar]) -> None:
        self._run.summary.update(dict(outcome))

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def begin(run: Opening) -> Tracked:
    """Begin, or go on with the run of the same id."""
    return _Run(run)


def _mode() -> Literal["online", "offline"] | None:
    """What WANDB_MODE or its settings say; offline where they say nothing and there is no key."""
    if "WANDB_MODE" in os.environ or wandb.Settings().mode != "online":
        return None
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    return "online" if any(key in os.environ for key in keys) or _in_netrc() else "offline"


def _in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
