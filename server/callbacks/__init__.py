"""What is told of a run while it goes on: callbacks, and trackers through one of them."""

from server.callbacks.callback import BegunRun, Callback
from server.callbacks.calls import Callbacks
from server.callbacks.named import callbacks_of, require_callbacks

__all__ = ["BegunRun", "Callback", "Callbacks", "callbacks_of", "require_callbacks"]
