"""A ClientApp that stays loaded between messages: model, weights and user store are set up once a worker."""

import importlib
import traceback
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedsim.engine.grid import RUN_ID, error_reply
from fedsim.errors import InvalidInput
from fedsim.memory import reuse_freed_memory

ClientAppSource = str | ClientApp | Callable[[], ClientApp]
"""A ClientApp, a function that makes one, or where to import either from: "package.module:name"."""


def load_client_app(source: ClientAppSource) -> ClientApp:
    """The ClientApp that `source` stands for.

    Raises:
        InvalidInput: The string is not of the form "module:name", or what it names is no ClientApp.
        ImportError, AttributeError: The module or the name does not exist.
    """
    found: object = source
    if isinstance(source, str):
        module, colon, name = source.partition(":")
        if not (module and colon and name):
            raise InvalidInput("client_app", source, 'of the form "package.module:name"')
        found = getattr(importlib.import_module(module), name)
    if not isinstance(found, ClientApp) and callable(found):
        found = found()
    if not isinstance(found, ClientApp):
        raise InvalidInput("client_app", source, "a Flower ClientApp, or a function that returns one")
    return found


class ResidentClient:
    """One worker's ClientApp with its Context, alive for the whole run, in a process that keeps freed memory for it.

    Args:
        source: The ClientApp.
        run_config: The run's flat user configuration, given to the app as `context.run_config`.
        node_id: The worker's id.
        workers: Number of workers, which the app finds in `context.node_config["num-partitions"]` as on stock Flower.
    """

    def __init__(self, source: ClientAppSource, run_config: UserConfig, node_id: int, workers: int) -> None:
        reuse_freed_memory()  # each message allocates what the one before freed
        self._app = load_client_app(source)
        self._context = Context(
            run_id=RUN_ID,
            node_id=node_id,
            node_config={"partition-id": node_id - 1, "num-partitions": workers},
            state=RecordDict(),
            run_config=dict(run_config),
        )

    def answer(self, message: Message) -> Message:
        """The app's reply; an exception in the app becomes an error reply that carries its traceback."""
        try:
            return self._app(message, self._context)
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}\n{traceback.format_exc()}"
            return error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
