"""The process behind one RayGrid worker."""

import os
import pickle
import sys
from typing import TypeAlias

import numpy as np
import ray
from flwr.app import ArrayRecord, Message, UserConfig

from fedsim.engine.arrays import array_record, stored_bytes
from fedsim.engine.broadcast import INLINE_BYTES, SharedRecord
from fedsim.engine.carried import Folder, placed
from fedsim.engine.environment import Whereabouts
from fedsim.engine.messages import FLAT, TOTAL
from fedsim.engine.resident import ClientAppSource, ResidentClient
from fedsim.engine.segments import HEADER_BYTES, Mapped, SharedVector
from fedsim.versions import versions

StoredPlace: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Where a vector lies: Ray's id of the node, the vector's type and its shape."""


class ResidentActor:
    """A Ray actor that keeps one ClientApp loaded and answers messages one at a time.

    Args:
        threads: Threads that numerical libraries may use here.
        driver: Where the driver stands.
    """

    def __init__(self, threads: int, driver: Whereabouts) -> None:
        self._threads = threads
        self._client: ResidentClient | None = None
        self._driver = driver
        driver.share()
        self._mapped = Mapped()
        # Read by OpenMP and the BLAS libraries when they are first loaded.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)

    def describe(self) -> dict[str, str]:
        """Versions of Python and packages in this process, and its platform."""
        return versions()

    def start(
        self,
        source: ClientAppSource,
        run_config: UserConfig,
        folders: tuple[Folder, ...],
        node_id: int,
        workers: int,
    ) -> int:
        """Load the ClientApp; returns this process's id.

        Raises:
            NotHere: This node lacks one of the folders that the configuration names.
        """
        self._client = ResidentClient(source, placed(run_config, folders, self._driver), node_id, workers)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._threads)
        return os.getpid()

    def reaches(self, shared: SharedVector) -> bool:
        """Whether this process can map the driver's segments: it runs on the driver's machine."""
        try:
            self._mapped.values(shared.place, shared.shape, shared.dtype)
        except (OSError, ValueError):
            return False
        return True

    def answer(self, written: bytes, names: list[str], *records: ArrayRecord | SharedRecord) -> Message:
        """The client's reply.

        Args:
            written: The message, pickled.
            names, records: Its large records, read from shared memory.
        """
        assert self._client is not None
        message: Message = pickle.loads(written)
        for name, record in zip(names, records, strict=True):
            message.content[name] = record if isinstance(record, ArrayRecord) else self._opened(record)
        return self._client.answer(message)

    def _opened(self, record: SharedRecord) -> ArrayRecord:
        values = {name: self._mapped.values(one.place, one.shape, one.dtype) for name, one in record.items()}
        return array_record(**values)

    def answer_into(
        self, room: SharedVector, written: bytes, names: list[str], *records: ArrayRecord | SharedRecord
    ) -> tuple[Message, SharedVector | None]:
        """As `answer`, a large sum written into the driver's segment if it fits: the driver has it without a copy.

        Returns:
            The reply; and of a sum that was taken out of it, where it is.
        """
        reply = self.answer(written, names, *records)
        total = _large_total(reply)
        if total is None or total.nbytes > room.place.size - HEADER_BYTES:
            return reply, None
        self._mapped.values(room.place, total.shape, str(total.dtype), write=True)[...] = total
        del reply.content[TOTAL]
        return reply, SharedVector(room.place, str(total.dtype), total.shape)

    def answer_apart(
        self, written: bytes, names: list[str], *records: ArrayRecord | SharedRecord
    ) -> tuple[tuple[Message, StoredPlace | None], np.ndarray | None]:
        """As `answer`, a large sum apart: Ray leaves it in this node's object store until somebody asks for it.

        Returns:
            The reply; of a sum that was taken out, where it lies, its type and its shape; and the sum itself.
        """
        reply = self.answer(written, names, *records)
        total = _large_total(reply)
        if total is None:
            return (reply, None), None
        del reply.content[TOTAL]
        node: str = ray.get_runtime_context().get_node_id()
        return (reply, (node, str(total.dtype), total.shape)), total

    def rest(self) -> None:
        """Nothing: by the time this is called, what the call before returned has been freed here."""


def _large_total(reply: Message) -> np.ndarray | None:
    """A reply's sum, if it is one that should not travel inside."""
    record = reply.content.get(TOTAL) if reply.has_content() else None
    if not isinstance(record, ArrayRecord) or stored_bytes(record) < INLINE_BYTES or list(record) != [FLAT]:
        return None
    return record[FLAT].numpy()
