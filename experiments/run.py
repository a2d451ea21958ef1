"""The command line: `python -m experiments.run [command] [options]`."""

import dataclasses
import importlib
import inspect
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from experiments.command_line.extras import what_is_needed
from experiments.command_line.signals import Terminated, ending_by_signals
from experiments.command_line.streams import after_a_closed_pipe, spell_what_is_missing
from fedsim.errors import Failure, InvalidInput
from fedsim.suggestions import suggested

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


def called() -> str:
    """What this program was started by: the installed script, or the module."""
    name = Path(sys.argv[0]).name
    return name if name == "fedsim" else "python -m experiments.run"


def usage() -> str:
    """What --help prints before a command is chosen."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {called()} [command] [options]",
            "",
            "Fine-tune language models with user-level differential privacy.",
            "",
            "commands:",
            *lines,
            "",
            f"`{called()} help COMMAND` lists the options of a command; `--version` tells the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input, 128 + n ended by signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    spell_what_is_missing()
    # Modules of one's own are looked for in the working directory, as by `python -m`: an installed script's path has
    # its own folder there instead. At the end, so that no file lying there hides a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        code = _answer(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return after_a_closed_pipe()
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    except Terminated as terminated:
        print("terminated", file=sys.stderr)
        return 128 + terminated.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _answer(arguments: list[str]) -> int:
    """The exit code of a command, or of a question about them."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if arguments[:1] == ["--version"]:
        from fedsim.versions import versions

        print(f"fedsim {versions()['fedsim']}")
        return 0
    command = DEFAULT_COMMAND if not arguments or arguments[0].startswith("-") else arguments.pop(0)
    if command not in COMMANDS:
        near = suggested(command, COMMANDS, most=1)
        hint = f"Did you mean {near[0]}?" if near else ""
        raise InvalidInput("command", command, "one of " + ", ".join(COMMANDS), hint)
    with ending_by_signals():
        try:
            return _run(command, arguments)
        except ModuleNotFoundError as missing:
            if (needed := what_is_needed(command, missing)) is None:
                raise
            print(f"error: {needed}", file=sys.stderr)
            return 2


def _run(command: str, arguments: list[str]) -> int:
    from experiments.command_line.options import Unreadable, read_options
    from fedsim.terminal import speak

    speak()
    module, name, _ = COMMANDS[command]
    kind = getattr(importlib.import_module(module), name)
    default, arguments = _defaults(kind, arguments)
    try:
        if {"-h", "--help"} & set(arguments):
            print(_description(kind), end="\n\n")
        chosen = read_options(kind, arguments, program=f"{called()} {command}", default=default)
    except Unreadable as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    code: int = chosen.run()
    return code


def _description(kind: type) -> str:
    """What a command's help begins with: what it does, and the two options that are read before all others."""
    from experiments.presets import preset_names

    text = [inspect.cleandoc(kind.__doc__ or "")]
    fields = {item.name for item in dataclasses.fields(kind)}
    if "data" in fields:
        names = ", ".join(preset_names())
        text.append(f"--preset NAME begins with the settings of a preset ({names}) or of a TOML file.")
    if "resume" in fields:
        text.append("--resume FOLDER begins with the settings of an unfinished run, and goes on with it.")
    width = shutil.get_terminal_size().columns
    paragraphs = [part for one in text for part in one.split("\n\n")]
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width, break_on_hyphens=False) for part in paragraphs)


def _defaults(kind: type, arguments: list[str]) -> tuple[object | None, list[str]]:
    """What options start from: the values of `--preset NAME`, or of the run that `--resume FOLDER` goes on with."""
    from experiments.presets import load_preset, preset_name
    from experiments.resume import resumed

    name, rest = preset_name(arguments)
    return (resumed(kind, rest) if name is None else load_preset(kind, name, rest)), rest


if __name__ == "__main__":
    sys.exit(main())
