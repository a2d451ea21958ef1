"""From a command's arguments to its options; what cannot be read is refused in a sentence."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_type_hints

import tyro

from fedsim.suggestions import suggested

ELSEWHERE = {
    "batch-size": ("plan.gradients-per-round",),
    "dataset": ("data.path",),
    "epochs": ("plan.rounds",),
    "gpus": ("engine.gpus-per-worker",),
    "lora-r": ("model.lora-rank",),
    "max-grad-norm": ("plan.clip-norm",),
    "max-seq-length": ("data.sequence-length",),
    "max-steps": ("plan.rounds",),
    "model": ("model.path",),
    "num-rounds": ("plan.rounds",),
    "num-workers": ("engine.workers",),
    "output-dir": ("output",),
    "seed": ("sampling-seed", "noise-seed"),
    "sigma": ("plan.noise-multiplier",),
    "steps": ("plan.rounds",),
    "target-delta": ("plan.delta",),
    "target-epsilon": ("plan.epsilon",),
}
"""What other programs call these options."""
OFTEN = ("plan.epsilon", "plan.rounds", "plan.clip-norm", "optimizer.learning-rate", "data.path", "model.path")
VALUE = re.compile(r"(?:invalid literal for \w+\(\) with base 10|could not convert string to \w+): (.*)")
NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}


class Unreadable(Exception):
    """Arguments that are no options of the command; the message is a sentence for people."""


def read_options(kind: type, arguments: list[str], *, program: str, default: Any) -> Any:
    """The command that arguments describe.

    Args:
        kind: A dataclass of options.
        arguments: Behind the command's name.
        program: What the command is called by, for its help.
        default: What options are that no argument names; None for the class's own.

    Raises:
        Unreadable: For an option that there is not, a value of the wrong type, or one that is not allowed.
        SystemExit: Help was asked for, and is printed.
    """
    with _refusing(kind):
        chosen, unknown = tyro.cli(
            kind,
            args=arguments,
            prog=program,
            description="",  # which would not be wrapped: `experiments.run` prints it before
            default=default,
            use_underscores=False,
            return_unknown_args=True,
        )
    if unknown:
        raise Unreadable(_unknown(kind, unknown))
    return chosen


def option_names(kind: type) -> list[str]:
    """The options of a command, without the dashes before them."""
    return [name for name, _ in _fields(kind)]


def _fields(kind: type, group: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        name = group + item.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _fields(hints[item.name], name + ".")
        else:
            yield name, hints[item.name]


def _unknown(kind: type, tokens: list[str]) -> str:
    """A sentence about arguments that nothing was made of, of which the first is told."""
    token = next((token for token in tokens if token.startswith("-")), tokens[0]).partition("=")[0]
    if not token.startswith("-"):
        return f"{token!r} belongs to no option; what has blanks in it needs quotes."
    name, known = token.lstrip("-"), option_names(kind)
    found = [one for one in ELSEWHERE.get(name, ()) if one in known] or suggested(name, known, first=OFTEN)
    hint = f"Did you mean {' or '.join('--' + one for one in found)}?" if found else "See --help for those there are."
    return f"{token} is no option of this command. {hint}"


def _refusing(kind: type) -> AbstractContextManager[None]:
    """Within it tyro's refusals are raised in a sentence.

    The hook is not part of what tyro promises to keep: without it refusals are tyro's own, a box of several lines.
    """
    errors = getattr(tyro, "_errors", None)
    if not hasattr(errors, "on_parse_error"):
        return nullcontext()

    def refuse(event: Any) -> None:
        if (sentence := _in_words(kind, event)) is not None:
            raise Unreadable(sentence)

    hooked: AbstractContextManager[None] = errors.on_parse_error(refuse)  # type: ignore[union-attr]
    return hooked


def _in_words(kind: type, event: Any) -> str | None:
    """What a refusal of tyro's says, in our words; None for one that is not known here."""
    name = type(event).__name__
    argument = getattr(event, "argument", None)
    option = _spelt(argument) if argument is not None else ""
    if name == "InvalidChoice":
        allowed = "one of " + ", ".join(event.choices)
        near = suggested(str(event.value), event.choices, most=1)
        return f"{option} is {event.value!r}; it must be {allowed}." + (f" Did you mean {near[0]}?" if near else "")
    if name == "BadValue":
        if event.reason == "too_few_values":
            return f"{option} is without a value; it must be followed by {_wanted(argument)}."
        return f"{option} is {event.offending_value!r}; it must be without a value."
    if name == "MissingArgs":
        missing = ", ".join(_spelt(context.arg) for context in event.missing_arguments)
        return f"{missing} is missing; it must be given. See --help."
    if name == "UnrecognizedArgs":
        return _unknown(kind, list(event.tokens))
    if name == "InstantiationFailure":
        if argument is None or "; it must be " in event.message:
            return str(event.message)
        value = VALUE.search(event.message)
        told = value.group(1) if value else "not what can be read"
        return f"{option} is {told}; it must be {_wanted(argument)}."
    return None


def _spelt(argument: Any) -> str:
    if argument.is_positional():
        return str(argument.field.intern_name).replace("_", "-")
    return str(argument.lowered.name_or_flags[-1])


def _wanted(argument: Any) -> str:
    metavar = str(argument.lowered.metavar or "")
    return next((words for kind, words in NUMBERS.items() if kind in metavar), f"a value such as {metavar}")
