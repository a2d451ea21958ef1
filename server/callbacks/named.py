"""The callbacks that a configuration names: trackers, and classes in modules of one's own."""

import importlib
import inspect
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType

from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.registry import import_module
from server.callbacks.callback import Callback
from server.callbacks.trackers.tracker import Opening, Tracked, Tracker


def require_callbacks(config: RunConfig) -> None:
    """Refuse a configuration whose callbacks cannot be had, before anything is begun.

    Raises:
        InvalidInput: A tracker's library is not installed, a module cannot be imported, or a class in it is no
            callback, or cannot be called without arguments.
    """
    for tracker in config.trackers:
        if find_spec(tracker) is None:
            hint = f"Install it: pip install 'fedsim[{tracker}]'."
            raise InvalidInput("trackers", tracker, "one whose library is installed", hint)
    for name in config.callbacks:
        _class_of(name)


def callbacks_of(config: RunConfig) -> list[Callback]:
    """The callbacks of a run, those of one's own first, made anew.

    Raises:
        InvalidInput: As require_callbacks.
    """
    require_callbacks(config)
    own = [_class_of(name)() for name in config.callbacks]
    return [*own, *(Tracker(name, partial(_begin, name)) for name in dict.fromkeys(config.trackers))]


def _begin(tracker: str, run: Opening) -> Tracked:
    """Only now is the library imported, which takes a second or two."""
    module: ModuleType = importlib.import_module(f"server.callbacks.trackers.{tracker}")
    tracked: Tracked = module.begin(run)
    return tracked


def _class_of(name: str) -> type[Callback]:
    module, _, attribute = name.partition(":")
    import_module("callbacks", module, name)
    found = getattr(sys.modules[module], attribute, None)
    if not (isinstance(found, type) and issubclass(found, Callback)):
        hint = f"{module} has no {attribute}." if found is None else "Derive it from fedsim.Callback."
        raise InvalidInput("callbacks", name, "a class derived from fedsim.Callback, named module:Class", hint)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise InvalidInput("callbacks", name, "a class called without arguments", f"It is {error}.") from error
    return found
