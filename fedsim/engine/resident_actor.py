"""The process behind one RayGrid worker."""

import os
import sys
from typing import TypeAlias

import numpy as np
import ray
from flwr.app import ArrayRecord, Message, UserConfig

from fedsim.engine.arrays import stored_bytes
from fedsim.engine.broadcast import INLINE_BYTES
from fedsim.engine.carried import Folder, placed
from fedsim.engine.environment import Whereabouts
from fedsim.engine.messages import FLAT, TOTAL
from fedsim.engine.resident import ClientAppSource, ResidentClient
from fedsim.versions import versions

Place: TypeAlias = tuple[str, str, tuple[int, ...]]
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

    def answer(self, message: Message, names: list[str], *records: ArrayRecord) -> Message:
        """The client's reply. `records` are the message's large records, read from shared memory, by `names`."""
        assert self._client is not None
        for name, record in zip(names, records, strict=True):
            message.content[name] = record
        return self._client.answer(message)

    def answer_apart(
        self, message: Message, names: list[str], *records: ArrayRecord
    ) -> tuple[tuple[Message, Place | None], np.ndarray | None]:
        """As `answer`, a large sum apart: Ray leaves it in this node's object store until somebody asks for it.

        Returns:
            The reply; of a sum that was taken out, where it lies, its type and its shape; and the sum itself.
        """
        reply = self.answer(message, names, *records)
        record = reply.content.get(TOTAL) if reply.has_content() else None
        if not isinstance(record, ArrayRecord) or stored_bytes(record) < INLINE_BYTES or list(record) != [FLAT]:
            return (reply, None), None
        total = record[FLAT].numpy()
        del reply.content[TOTAL]
        node: str = ray.get_runtime_context().get_node_id()
        return (reply, (node, str(total.dtype), total.shape)), total

    def rest(self) -> None:
        """Nothing: by the time this is called, what the call before returned has been freed here."""
