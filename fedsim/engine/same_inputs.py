"""Server and workers must hold the same data and the same base model: a worker that does not refuses.

A unit travels as a number. On a worker whose store was made of other files that number means another user, so that one
user may count twice in a sum, and the guarantee is for half of what happened.
"""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a process computes with, as fingerprints of the content, wherever it lies.

    They find accidents: a store's is a hash of its files' sizes and checksums.

    Attributes:
        data: Of the user store: every user's rows, and which users are in which split.
        model: Of the base model: its configuration, weights and buffers as they were loaded, frozen ones included.
    """

    data: str
    model: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Inputs":
        return cls(**json.loads(text))


class InputsDiffer(Exception):
    """A worker was asked by a server that holds other data or another base model."""


def require_same_inputs(server: Inputs | None, worker: Inputs | None) -> None:
    """Compare what a request names with what the worker holds.

    Args:
        server: From the request; None where server and worker share their objects, in one process.
        worker: The worker's own; None where it does not know.

    Raises:
        InputsDiffer: Names what differs, both fingerprints, and what to do.
    """
    if server is None or server == worker:
        return
    reasons = []
    for name, what in (("data", "user store"), ("model", "base model")):
        here, there = getattr(worker, name, "unknown"), getattr(server, name)
        if here != there:
            reasons.append(f"its {what} has the fingerprint {here[:12]}, the server's {there[:12]}")
    raise InputsDiffer(
        f"{'; '.join(reasons)}. A unit's number would mean another's text, or its update another model's: give every "
        "node the same files, or one shared folder (prepare writes a store for --data.source store)"
    )
