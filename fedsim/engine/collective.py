"""Processes that each own some of a vector's coordinates, and sum and share vectors among themselves.

torch.distributed's gloo, over vectors in the host's memory. Whoever wants them to meet holds a `Rendezvous`; each of
them makes `Peers` of it at the same time. When one dies or leaves, whatever the others do together ends in an
exception; the rest can meet again under another name.

The group is an object of its own rather than the process's default one: what else in the process computes in groups
has that, and references to it, which modules of torch's keep, would keep its connections open when it is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from fedsim.randomness import BLOCK

PIECE = 4 * BLOCK
"""Coordinates of each owner that are moved at once: what is copied on its way is this times the number of owners."""


def shares(size: int, owners: int) -> list[slice]:
    """Which coordinates each owner has: as equal as multiples of BLOCK can be, in order, each coordinate once.

    Noise is drawn in such blocks, and torch's rules take the same steps on either side of a block's border.
    """
    blocks = -(-size // BLOCK)
    cuts = [min(size, blocks * owner // owners * BLOCK) for owner in range(owners + 1)]
    return [slice(cuts[owner], cuts[owner + 1]) for owner in range(owners)]


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where some processes meet, as a message to one of them says.

    Attributes:
        host, port: Of the rendezvous.
        name: Of this meeting; never used twice.
        rank: Which of them it is, from 0.
        owners: How many they are.
        seconds: How long each waits for the others, here and in everything they do together.
    """

    host: str
    port: int
    name: str
    rank: int
    owners: int
    seconds: float


class Rendezvous:
    """A store in this process through which others find each other; closed, whoever still waits gives up at once.

    Args:
        host: The address at which they reach this process.
        seconds: How long they wait.
    """

    def __init__(self, host: str, seconds: float) -> None:
        self.host = host
        self._store: TCPStore | None = TCPStore(
            host, 0, None, True, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
        self.port = self._store.port

    def close(self) -> None:
        """May be called twice."""
        self._store = None


class Peers:
    """This process among others that each own some coordinates.

    Args:
        meeting: Where they meet.
        size: Coordinates of the vectors, P.

    Raises:
        RuntimeError: They do not all come within the time (any of torch.distributed's errors is one).
    """

    def __init__(self, meeting: Meeting, size: int) -> None:
        wait = timedelta(seconds=meeting.seconds)
        store = PrefixStore(meeting.name, TCPStore(meeting.host, meeting.port, None, False, timeout=wait))
        self._gloo: Any = ProcessGroupGloo(store, meeting.rank, meeting.owners, wait)
        self.rank, self.owners = meeting.rank, meeting.owners
        self.shares = shares(size, meeting.owners)

    @property
    def own(self) -> slice:
        """The coordinates of this process."""
        return self.shares[self.rank]

    @property
    def before(self) -> slice:
        """Those of the process before it, whose state it keeps a copy of."""
        return self.shares[self.rank - 1]

    @property
    def _group(self) -> Any:
        if self._gloo is None:
            raise RuntimeError("this process has left the group")
        return self._gloo

    def leave(self) -> None:
        """Close the connections to the others, so that those who wait for this process hear of it at once.

        An exception that still has its traceback may keep them open: leave once it is dealt with.
        """
        self._gloo = None

    def sum_of(self, number: int) -> int:
        """Σ of every process's number."""
        total = torch.tensor([number], dtype=torch.int64)
        self._group.allreduce([total]).wait()
        return int(total.item())

    def reduce_scatter(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The sum, over all processes and each one's parts, of this process's coordinates.

        Integers add the same in any order; float32 sums depend on how units were spread, as ever.

        Args:
            parts: Vectors [P], as many as there are here; none counts as zero. They are left as they are.
            dtype: Of all of them.

        Returns:
            [own], new.
        """
        own = torch.empty(self._length(self.rank), dtype=dtype)
        piece = self._piece
        staged = torch.zeros(self.owners, piece, dtype=dtype)
        received = torch.empty(piece, dtype=dtype)
        for start in range(0, self._longest, piece):
            for owner in range(self.owners):
                here = self._at(owner, start, piece)
                length = here.stop - here.start
                row = staged[owner]
                row[length:] = 0
                if not parts:
                    row[:length] = 0
                    continue
                row[:length] = parts[0][here]
                for part in parts[1:]:
                    row[:length] += part[here]
            self._group.reduce_scatter([received], [list(staged)]).wait()
            length = min(piece, max(0, len(own) - start))
            own[start : start + length] = received[:length]
        return own

    def all_gather(self, own: torch.Tensor) -> torch.Tensor:
        """The whole vector [P], new, of which each process gives its own coordinates [own]."""
        whole = torch.empty(self.shares[-1].stop, dtype=own.dtype)
        piece = self._piece
        sent, received = torch.zeros(piece, dtype=own.dtype), torch.empty(self.owners, piece, dtype=own.dtype)
        for start in range(0, self._longest, piece):
            length = min(piece, max(0, len(own) - start))
            sent[:length] = own[start : start + length]
            self._group.allgather([list(received)], [sent]).wait()
            for owner in range(self.owners):
                here = self._at(owner, start, piece)
                whole[here] = received[owner, : here.stop - here.start]
        return whole

    def passed_on(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the process before this one gives, while the next is given this one's: a copy of each elsewhere.

        Args:
            own: Tensors [own] by name, the same names everywhere.

        Returns:
            The same of the process before, new; nothing where there is only one.
        """
        if self.owners == 1:
            return {}
        following, previous = (self.rank + 1) % self.owners, (self.rank - 1) % self.owners
        taken = {}
        for name in sorted(own):
            taken[name] = torch.empty(self._length(previous), dtype=own[name].dtype)
            asked = []
            if len(own[name]):
                asked.append(self._group.send([own[name]], following, 0))
            if len(taken[name]):
                asked.append(self._group.recv([taken[name]], previous, 0))
            for one in asked:
                one.wait()
        return taken

    def _length(self, owner: int) -> int:
        length: int = self.shares[owner].stop - self.shares[owner].start
        return length

    @property
    def _longest(self) -> int:
        return max(map(self._length, range(self.owners)))

    @property
    def _piece(self) -> int:
        return min(PIECE, self._longest)

    def _at(self, owner: int, start: int, piece: int) -> slice:
        """A piece of an owner's coordinates, empty beyond its end."""
        share = self.shares[owner]
        return slice(min(share.start + start, share.stop), min(share.start + start + piece, share.stop))
