"""The command line: `python -m experiments.run [command] [options]`."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fedsim.errors import Failure, InvalidInput
from fedsim.terminal import speak

COMMANDS = {
    "compare": (
        "experiments.compare",
        "Compare",
        "ULS and ELS side by side at the same compute and (ε, δ); the default",
    ),
    "train": ("experiments.train", "Train", "fine-tune with one algorithm"),
    "plan": (
        "experiments.plan.command",
        "PlanCommand",
        "predict whether ULS or ELS will win, and the group size, in seconds",
    ),
    "sweep": ("experiments.sweep.command", "Sweep", "ULS and ELS over ε, compute, group sizes and seeds; resumable"),
    "mean-estimation": (
        "experiments.mean_estimation.command",
        "MeanEstimation",
        "the synthetic study, with closed form",
    ),
    "account": ("experiments.account.command", "Account", "ε of a plan, or the noise for a target ε"),
    "audit": ("experiments.audit.command", "Audit", "attack a plan or a finished run: lower bounds on ε"),
    "search-noise": ("experiments.search_noise", "SearchNoise", "find a law for randomised-scale Laplace noise"),
    "generate": ("experiments.generate", "Generate", "text from a finished run or any other model"),
    "evaluate": ("experiments.evaluate", "Evaluate", "a model's loss and accuracy on users' text, by user"),
    "push": ("experiments.push", "Push", "upload a finished run's model with its statement to the Hugging Face hub"),
    "prepare": ("experiments.prepare", "Prepare", "build a user store from files or a hub data set"),
    "merge": ("experiments.merge", "Merge", "write adapters merged into their base, as a plain model"),
    "report": ("experiments.report.command", "Report", "write the report of a finished run or comparison again"),
}
DEFAULT_COMMAND = "compare"


def usage() -> str:
    """What --help prints before a command is chosen."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m experiments.run [command] [options]",
            "",
            "Fine-tune language models with user-level differential privacy.",
            "",
            "commands:",
            *lines,
            "",
            "`python -m experiments.run COMMAND --help` lists the options of a command.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    speak()
    # Modules of one's own are looked for in the working directory, as by `python -m`: an installed script's path has
    # its own folder there instead. At the end, so that no file lying there hides a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    command = DEFAULT_COMMAND if not arguments or arguments[0].startswith("-") else arguments.pop(0)
    try:
        if command not in COMMANDS:
            raise InvalidInput("command", command, "one of " + ", ".join(COMMANDS))
        with _ending_by_sigterm():
            return _run(command, arguments)
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    except Terminated:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """SIGTERM came where no round was under way: answered as Ctrl-C is, so that workers end and people are told."""


@contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises Terminated, unless somebody inside answers it in another way."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: str, arguments: list[str]) -> int:
    import tyro

    module, name, _ = COMMANDS[command]
    kind = getattr(importlib.import_module(module), name)
    default, arguments = _defaults(kind, arguments)
    chosen = tyro.cli(kind, args=arguments, prog=f"experiments.run {command}", default=default, use_underscores=False)
    code: int = chosen.run()
    return code


def _defaults(kind: type, arguments: list[str]) -> tuple[object | None, list[str]]:
    """What options start from: the values of `--preset NAME`, or of the run that `--resume FOLDER` goes on with."""
    from experiments.presets import load_preset, preset_name
    from experiments.resume import resumed

    name, rest = preset_name(arguments)
    return (resumed(kind, rest) if name is None else load_preset(kind, name)), rest


if __name__ == "__main__":
    sys.exit(main())
