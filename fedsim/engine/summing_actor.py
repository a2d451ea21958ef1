"""The process on each Ray node that adds up what the node's workers computed."""

import sys

import numpy as np

from fedsim.engine.totals import BadReply, Expected


class SummingActor:
    """A Ray actor that checks its node's sums and adds them, one after the other, where they lie in shared memory.

    Only the newest gathering has a sum here: a part of one that is over is refused, and what an earlier one left is
    dropped. One buffer is kept for all of them, so that its pages are new once.

    Args:
        paths: The driver's import path.
    """

    def __init__(self, paths: list[str]) -> None:
        sys.path.extend(path for path in paths if path not in sys.path)
        self._gathering = -1
        self._keys: list[str] = []
        self._sum: np.ndarray | None = None
        self._buffer: np.ndarray | None = None

    def add(self, gathering: int, key: str, expected: Expected, total: np.ndarray) -> str:
        """Add a part to a gathering's sum; returns why it was refused, nothing where it was added."""
        if gathering > self._gathering:
            self._gathering, self._keys, self._sum = gathering, [], None
        if gathering < self._gathering or key in self._keys:
            return "it came late, or twice"
        try:
            expected.check(total)
        except BadReply as refusal:
            return str(refusal)
        if self._sum is None:
            self._sum = total  # read where it lies; a node with a single part adds nothing
        else:
            self._sum = np.add(self._sum, total, out=self._room(total))
        self._keys.append(key)
        return ""

    def give(self, gathering: int) -> tuple[list[str], np.ndarray | None]:
        """The keys of the parts in a gathering's sum, and the sum; after it the gathering is over."""
        keys, found = (self._keys, self._sum) if gathering == self._gathering else ([], None)
        self._gathering, self._keys, self._sum = max(self._gathering, gathering + 1), [], None
        return keys, found

    def _room(self, like: np.ndarray) -> np.ndarray:
        """The buffer, made anew where it is of another size or type."""
        if self._buffer is None or self._buffer.shape != like.shape or self._buffer.dtype != like.dtype:
            self._buffer = np.empty_like(like)
        return self._buffer
