"""The callbacks of a run, called so that none of them can end it."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fedsim.errors import InvalidInput
from server.callbacks.callback import BegunRun, Callback

logger = logging.getLogger(__name__)


class Callbacks:
    """Several callbacks as one. One that raises is not called again in the run.

    Args:
        callbacks: In the order in which they are called.

    Raises:
        InvalidInput: One of them is no Callback.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        for one in callbacks:
            if not isinstance(one, Callback):
                hint = "A class is called first: MyCallback()." if isinstance(one, type) else ""
                raise InvalidInput("callbacks", one, "objects of classes derived from fedsim.Callback", hint)
        self._callbacks = tuple(callbacks)
        self._heard: list[Callback] = []

    def begin(self, run: BegunRun) -> None:
        """Tell that a run is about to train.

        Raises:
            InvalidInput: A callback refuses the run.
        """
        for one in self._callbacks:
            self._heard.append(one)
            try:
                self._call(one, "on_begin", run)
            except InvalidInput:
                self._heard.remove(one)
                raise

    def record(self, record: dict[str, Any]) -> None:
        """Tell of a round."""
        self._call_all("on_record", record)

    def end(self, summary: dict[str, Any]) -> None:
        """Tell that the run is finished."""
        self._call_all("on_end", summary)

    @contextmanager
    def told_of_stops(self) -> Iterator[None]:
        """Within it, whatever ends a run that has begun is told, and goes on its way."""
        try:
            yield
        except BaseException as reason:
            self._call_all("on_stop", str(reason) or type(reason).__name__)
            raise

    def _call_all(self, name: str, told: Any) -> None:
        for one in list(self._heard):
            self._call(one, name, told)

    def _call(self, one: Callback, name: str, told: Any) -> None:
        method: Callable[[Any], None] = getattr(one, name)
        try:
            method(copy.deepcopy(told))
        except Exception as error:
            if name == "on_begin" and isinstance(error, InvalidInput):
                raise
            self._heard.remove(one)
            logger.warning(
                "the callback %s failed in %s and is not called again in this run: %s: %s",
                type(one).__qualname__,
                name,
                type(error).__name__,
                error,
            )
