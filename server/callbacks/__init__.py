"""What is told of a run while it goes on: callbacks."""

from server.callbacks.callback import BegunRun, Callback
from server.callbacks.calls import Callbacks

__all__ = ["BegunRun", "Callback", "Callbacks"]
