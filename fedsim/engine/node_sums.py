"""Sums formed on each Ray node, where the node's workers leave theirs: one a node comes to the server."""

import itertools
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.engine.summing_actor import SummingActor
from fedsim.engine.sums import NotIn, ServerSum, Sums
from fedsim.engine.totals import BadReply, Expected
from fedsim.engine.work import Vector

PAYS_FROM_BYTES = 4 << 20
"""Sums below this size are added by the server: two more calls a node take longer than they save."""


@dataclass(frozen=True)
class StoredVector:
    """A vector that lies in the object store of the node where it was made, and stays there unless it is asked for.

    Attributes:
        reference: Ray's, by which others read it.
        node: The node's id, Ray's.
        dtype, shape: Of the vector, as its maker says.
    """

    reference: Any
    node: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class SummingActors:
    """The summing actor of each node: started when it is first needed, and alive until it fails or all is over."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self.gatherings = itertools.count()

    def on(self, node: str) -> Any:
        """The actor of a node."""
        if node not in self._actors:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": here}
            self._actors[node] = ray.remote(SummingActor).options(**options).remote(sys.path)
        return self._actors[node]

    def drop(self, node: str) -> None:
        """End a node's actor, which died or hangs: whatever it had can no longer come into any sum."""
        if (actor := self._actors.pop(node, None)) is not None:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """End them all."""
        for node in list(self._actors):
            self.drop(node)


@dataclass
class _Handed:
    """What a node's actor was given: by key, what is expected of each part, and Ray's word on it."""

    expected: dict[str, Expected]
    verdicts: "dict[str, ray.ObjectRef[str]]"

    def of(self, keys: list[str]) -> Expected:
        """What the sum of some parts can be."""
        parts = [self.expected[key] for key in keys]
        return replace(parts[0], units=sum(part.units for part in parts))


class NodeSums(Sums):
    """A round's sum, formed on the nodes.

    Each part is checked and added by the actor of the node that it lies on, while others are still computed. `settle`
    asks each actor once for its sum and for the keys of what is in it. An actor that failed, is late, or names other
    keys than those it accepted is ended, and all of its parts are lost: so a part is in one sum, once, or in none.
    A part that came to the server inside its message (it was small) is added here.

    Args:
        actors: The nodes' actors.
        patience: Seconds that they get to add what they have and to hand the sum over.
    """

    def __init__(self, actors: SummingActors, patience: float) -> None:
        self._actors = actors
        self._patience = patience
        self._here = ServerSum()
        self._gathering = next(actors.gatherings)
        self._handed: dict[str, _Handed] = {}

    def add(self, key: str, total: Vector, expected: Expected) -> None:
        """Have a part checked and added where it lies; Ray frees it there once that is done."""
        if not isinstance(total, StoredVector):
            self._here.add(key, total, expected)
            return
        expected.check_form(total)
        handed = self._handed.setdefault(total.node, _Handed({}, {}))
        handed.expected[key] = expected
        adding = self._actors.on(total.node).add.remote(self._gathering, key, expected, total.reference)
        handed.verdicts[key] = adding

    def settle(self) -> dict[str, NotIn]:
        """Bring the nodes' sums here, one after the other, so that no more than one takes memory beside the total."""
        giving = {
            node: self._actors.on(node).give.options(num_returns=2).remote(self._gathering) for node in self._handed
        }
        handed, self._handed = self._handed, {}
        self._gathering = next(self._actors.gatherings)
        failed: dict[str, NotIn] = {}
        for node, parts in handed.items():
            failed |= self._fetch(node, parts, *giving.pop(node))
        return failed

    def _fetch(self, node: str, parts: _Handed, keys: Any, total: Any) -> dict[str, NotIn]:
        """Add a node's sum to that of the nodes before it; what is not in it, by key."""
        failed: dict[str, NotIn] = {}
        try:
            refusals = ray.get(list(parts.verdicts.values()), timeout=self._patience)
            for key, refusal in zip(parts.verdicts, refusals, strict=True):
                if refusal:
                    failed[key] = NotIn(refusal, refused=True)
            named = ray.get(keys, timeout=self._patience)
            if sorted(named) != sorted(parts.verdicts.keys() - failed.keys()):
                raise _SumLost("it has other parts than it was given")
            if named:
                values = ray.get(total, timeout=self._patience)
                parts.of(named).check(values)
                self._here.put(values)
        except (ray.exceptions.RayError, _SumLost, BadReply) as failure:
            self._actors.drop(node)
            reason = f"the sum of its node was lost ({type(failure).__name__}: {_first_line(failure)})"
            lost = {key: NotIn(reason, refused=False) for key in parts.verdicts}
            return lost | failed
        return failed

    def total(self) -> Vector | None:
        """The sum of the nodes' sums."""
        return self._here.total()


class _SumLost(Exception):
    """A node's sum is not what it should be."""


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [""])[0]
