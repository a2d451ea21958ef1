"""`--resume FOLDER`: the settings of an interrupted run become the defaults of the command line."""

import dataclasses
from typing import Any

from fedsim.errors import InvalidInput
from server.results.run_folder import RunFolder


def resumed(kind: type, arguments: list[str]) -> Any | None:
    """The configuration of the run that the arguments resume; None where they resume none.

    Options beside --resume may change where and how fast the run goes on; others are compared with the run's own when
    it does, and refused.

    Raises:
        InvalidInput: When the command cannot be resumed, or the folder holds no run.
    """
    folder = _value(arguments)
    if folder is None:
        return None
    # Imported here: other commands do without torch.
    from fedsim.config import RunConfig
    from server.identity import stored_config

    if not issubclass(kind, RunConfig):
        raise InvalidInput("resume", folder, "given to train or compare")
    if not folder:
        raise InvalidInput("resume", folder, "the folder of a run")
    run = RunFolder(folder, new=False)
    config = stored_config(kind, run.read_config(), folder)
    return dataclasses.replace(config, resume=folder, output=folder)


def how_to_go_on(folder: RunFolder) -> str:
    """What to do about a command that was ended outside of a round."""
    if folder.config.exists():
        return f"go on with --resume {folder.path}; what was charged stays charged"
    return "nothing was begun; give the same command again"


def _value(arguments: list[str]) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == "--resume":
            return arguments[place + 1] if place + 1 < len(arguments) else ""
        if argument.startswith("--resume="):
            return argument.removeprefix("--resume=")
    return None
