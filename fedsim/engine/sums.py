"""Where a round's sums are formed: here, in the server's process; `fedsim.engine.node_sums` has the other form."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedsim.engine.totals import Expected
from fedsim.engine.work import Vector
from fedsim.errors import InvalidInput

SumsWanted = Literal["auto", "server", "nodes"]
"""Where sums shall be formed, as `EngineConfig.sums` says."""


@dataclass(frozen=True)
class NotIn:
    """Why a part that had been handed over is not in the sum.

    Attributes:
        reason: In a sentence's words.
        refused: Whether the part itself was bad; otherwise it was lost, through no fault of who computed it.
    """

    reason: str
    refused: bool


class Sums(ABC):
    """One round's sum, handed over part by part. Each has a key of its own, and is in the sum once or not at all."""

    @abstractmethod
    def add(self, key: str, total: Vector, expected: Expected) -> None:
        """Take a part, which may be checked and added now or later.

        Args:
            key: Its name, used once.
            total: The part, [P]; not written to, and let go of once it is added.
            expected: What it is held to.

        Raises:
            BadReply: It is not that, and nothing was added.
        """

    @abstractmethod
    def settle(self) -> dict[str, NotIn]:
        """Wait until everything that was taken is in the sum, and return the keys of what is not."""

    @abstractmethod
    def total(self) -> Vector | None:
        """The sum of what is in it, after `settle`: writable, the caller's own. None where nothing is."""


class ServerSum(Sums):
    """A sum formed in this process, where everything comes to: the order of additions is that of arrival."""

    def __init__(self) -> None:
        self._total: Vector | None = None
        self._own = False

    def add(self, key: str, total: Vector, expected: Expected) -> None:
        """Check a part and add it."""
        expected.check(total)
        self.put(total)

    def put(self, total: Vector) -> None:
        """Add what was checked."""
        if self._total is None:
            # Not ours to write to, unless it can be: then it is copied where no other one comes.
            self._total, self._own = total, isinstance(total, np.ndarray) and total.flags.writeable
        elif self._own:
            self._total += total
        else:
            self._total, self._own = self._total + total, True

    def settle(self) -> dict[str, NotIn]:
        """Nothing is outstanding."""
        return {}

    def total(self) -> Vector | None:
        """The sum; copied where it is a single part, which is its sender's."""
        if self._total is not None and not self._own:
            self._total = np.array(self._total) if isinstance(self._total, np.ndarray) else self._total.clone()
            self._own = True
        return self._total


def server_sum(wanted: SumsWanted) -> ServerSum:
    """The sum of a grid that has no other form: workers in this process, or stock Flower's.

    Raises:
        InvalidInput: Another form is wanted.
    """
    if wanted not in ("auto", "server"):
        raise InvalidInput("engine.sums", wanted, "auto or server", "Only workers on Ray form sums where they are.")
    return ServerSum()
