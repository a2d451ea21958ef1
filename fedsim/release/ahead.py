"""Work that a thread of its own does while the round waits for its workers."""

import threading
import time
from collections.abc import Iterator


class Ahead:
    """Steps of work, the first done at once and the others by a thread of its own.

    What goes wrong from the start goes wrong before this returns; what goes wrong later is raised by `finish`.

    Args:
        steps: What is done between one yield and the next; it must change nothing that others read meanwhile.

    Attributes:
        seconds: How long the thread worked, once it has ended.
    """

    def __init__(self, steps: Iterator[None]) -> None:
        self.seconds = 0.0
        self._error: BaseException | None = None
        self._unwanted = threading.Event()
        self._thread: threading.Thread | None = None
        for _ in steps:
            self._thread = threading.Thread(target=self._work, args=(steps,), name="noise", daemon=True)
            self._thread.start()
            break

    def finish(self) -> None:
        """Wait until all is done; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Give up what has not been done; it returns when the thread has ended, after the step that it is at."""
        self._unwanted.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self, steps: Iterator[None]) -> None:
        began = time.monotonic()
        try:
            for _ in steps:
                if self._unwanted.is_set():
                    return
        except BaseException as error:  # as a round's own: it is raised where the work is asked for
            self._error = error
        finally:
            self.seconds = time.monotonic() - began
