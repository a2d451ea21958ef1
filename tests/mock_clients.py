"""Clients whose updates are known in advance: a function of the unit and the round alone."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsim.clip import Clip
from fedsim.engine.exact import quantise
from fedsim.engine.messages import TrainReply, TrainRequest

CLIP = Clip(norm=1.0)
Tamper = Callable[[TrainRequest, TrainReply, int], TrainReply]


def update_of(unit: int, round: int, size: int) -> np.ndarray:
    """A float32 [size] update within CLIP, of multiples of 2^-20, so that float sums are exact in any order."""
    steps = (np.arange(size) * 7 + unit * 13 + round * 5) % 11 - 5
    return (steps * 2.0**-20).astype(np.float32)


def known_sum(units: np.ndarray, round: int, size: int) -> np.ndarray:
    """Σ update_of, float32 [size], exact."""
    per_residue = np.bincount((units * 13 + round * 5) % 11, minlength=11)
    shifted = (np.arange(size)[:, None] * 7 + np.arange(11)) % 11 - 5
    return (shifted @ per_residue * 2.0**-20).astype(np.float32)


def request_for(
    units: np.ndarray, *, round: int = 0, size: int = 40, misfortune: dict[str, int] | None = None, **more: Any
) -> TrainRequest:
    """A request for these units with a model of `size` parameters, all zero.

    A misfortune names a unit at which the worker that computes it is to "die", "hang" or "raise"; mock clients read
    it where others read the plan.
    """
    parameters = np.zeros(size, dtype=np.float32)
    plan = json.dumps(misfortune or {})
    return TrainRequest(
        **{"round": round, "units": units, "clip": CLIP, "parameters": parameters, "plan": plan, **more}
    )


def honest_reply(request: TrainRequest) -> TrainReply:
    """The right answer."""
    size = request.parameters.shape[0]
    began = time.perf_counter()
    if request.resolution:
        total = np.zeros(size, dtype=np.int64)
        for unit in request.units.tolist():
            total += quantise(update_of(unit, request.round, size), request.clip, {"all": size}, request.resolution)
    else:
        total = known_sum(request.units, request.round, size)
    statistics = {"seconds": time.perf_counter() - began, "rows": float(len(request.units))}
    return TrainReply(round=request.round, units=request.units, total=total, statistics=statistics)


def make_app(tamper: Tamper | None = None) -> ClientApp:
    """A ClientApp that answers honestly, or whatever `tamper(request, honest reply, node id)` makes of it."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        request = TrainRequest.from_record(message.content)
        _misfortune(request, context)
        reply = honest_reply(request)
        if tamper is not None:
            reply = tamper(request, reply, context.node_id)
        return Message(reply.to_record(), reply_to=message)

    return made


def _misfortune(request: TrainRequest, context: Context) -> None:
    """What run_config or the request ask for: slow units, a gate (a file to wait for), or a death, a hang or an
    exception at one unit.

    With "marks" (a folder) in run_config a misfortune happens once, whoever it hits; without, every time.
    """
    time.sleep(float(context.run_config.get("seconds_per_unit", 0.0)) * len(request.units))
    while "gate" in context.run_config and not Path(str(context.run_config["gate"])).exists():
        time.sleep(0.02)
    asked = json.loads(request.plan or "{}")
    for name, happen in {"die": _die, "hang": _hang, "raise": _raise}.items():
        unit = asked.get(name)
        if unit is None or unit not in request.units:
            continue
        if "marks" in context.run_config:
            mark = Path(str(context.run_config["marks"])) / f"{name}-{request.round}"
            if mark.exists():
                continue
            mark.touch()
        happen()


def _die() -> None:
    os._exit(1)


def _hang() -> None:
    time.sleep(3600)


def _raise() -> None:
    raise RuntimeError("a unit of this message is cursed")


app = make_app()
