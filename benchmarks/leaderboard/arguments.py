"""From a run's configuration to the arguments that reproduce it, and from arguments to what the run would release."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.leaderboard.tasks import Task
from experiments.command_line.options import Unreadable, read_options
from experiments.train import Train
from fedsim.config import RunConfig, to_flat
from fedsim.errors import InvalidInput
from fedsim.privacy.events import Event
from fedsim.privacy.ledger import merged

OWN = (
    *("plan.", "optimizer.", "engine.exact", "engine.precision", "model.base-dtype", "model.quantise"),
    *("model.lora-", "model.rank-pattern", "model.alpha-pattern", "model.use-", "model.modules-to-save"),
    *("model.trainable", "model.export"),
)
"""Options that a row sets: algorithm, privacy, optimizer, which weights are trained."""
SAID = (
    *("plan.algorithm", "plan.epsilon", "plan.delta", "plan.rounds", "plan.gradients-per-round", "plan.clip-norm"),
    *("optimizer.name", "optimizer.learning-rate"),
)
"""Those of them that are written down although they are what is so by default."""
ELSEWHERE = (
    *("engine.", "evaluation.", "checkpoint.", "output", "resume", "trackers", "callbacks", "training-metrics"),
    *("model.path", "model.threads", "model.checkpointing", "data.path", "data.memory-limit", "noise.lost-releases"),
    *("sampling-seed", "noise-seed", "release"),
)
"""Options of where and how fast it runs, and of who is told. Seeds stand with each run, and paths nowhere."""
OF_A_MODULE = ":"
"""In names of the form module:class, which would be imported: not from what anybody may have written."""


def arguments_of(config: RunConfig, task: Task) -> tuple[str, ...]:
    """What a run sets of its own beside its task, as arguments of `fedsim`.

    Raises:
        InvalidInput: It sets something that the task fixes, or that an entry cannot hold.
    """
    flat, default = to_flat(config), to_flat(RunConfig())
    found = ["train"]
    for name, value in flat.items():
        fixed = task.options.get(name, default.get(name))
        if name.startswith(OWN):
            found += _argument(name, value) if name in SAID or value != default.get(name) else []
        elif value != fixed and not name.startswith(ELSEWHERE):
            raise InvalidInput(name, value, f"{fixed!r}, as in the task {task.name}")
    if config.evaluation.private:
        hint = "Held-out users of the board's tasks are public."
        raise InvalidInput("evaluation.private", True, "off for an entry", hint)
    return tuple(found)


def _argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):  # every such option is off by default
        return [f"--{name}"]
    listed = isinstance(value, str) and value.startswith("[")  # how to_flat writes lists
    return [f"--{name}", *(map(str, json.loads(value)) if listed else [str(value)])]


def config_of(arguments: Sequence[str], task: Task) -> Train:
    """The configuration that an entry's arguments describe, with the task's data options and no paths.

    Raises:
        InvalidInput: They are no arguments of `fedsim train`, set what an entry may not, or would import a module.
    """
    if list(arguments[:1]) != ["train"]:
        raise InvalidInput("arguments", list(arguments[:1]), "those of fedsim train")
    for one in arguments:
        if OF_A_MODULE in one:
            hint = "A mechanism or sampling scheme of your own is entered in words, with a link to its module."
            raise InvalidInput("arguments", one, "without names of the form module:class", hint)
    try:
        config: Train = read_options(Train, list(arguments[1:]), program="fedsim train", default=None)
    except Unreadable as unread:
        raise InvalidInput("arguments", " ".join(arguments), "arguments of fedsim train", str(unread)) from None
    changed = [name for name, value in _changed(to_flat(config)).items() if not name.startswith(OWN)]
    if changed:
        raise InvalidInput("arguments", changed, f"options of a row alone ({', '.join(OWN)}); the task fixes others")
    if (config.plan.delta, config.plan.adjacency) != (task.delta, RunConfig().plan.adjacency):
        raise InvalidInput("arguments", f"δ = {config.plan.delta:g}, {config.plan.adjacency}", f"δ = {task.delta:g}")
    return config


def _changed(flat: Mapping[str, Any]) -> dict[str, Any]:
    default = to_flat(RunConfig())
    return {name: value for name, value in flat.items() if value != default.get(name)}


def planned_event(arguments: Sequence[str], task: Task) -> Event:
    """What a run with these arguments releases of the task's training users, so many, who own so much: as its ledger
    has it, round by round.

    Raises:
        InvalidInput: As config_of; or there is no such plan for so many users.
    """
    plan = config_of(arguments, task).plan_for(task.sizes)
    return merged(plan.charge(round) for round in range(plan.steps))
