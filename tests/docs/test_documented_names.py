"""Commands, options, presets and modules that pages name are there, also in sentences, which no test runs."""

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import tyro
from page_blocks import ROOT, pages

from experiments.run import COMMANDS

OTHERS = {"--head", "--address", "--port", "--system-config", "--stream", "--run-config", "--dry-run"}
OTHERS |= {"--federation-config", "--logdir", "--backend-store-uri", "--project"}
OTHERS |= {"--num-cpus", "--block", "--dashboard-host"}
OTHERS |= {"--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--time", "--signal"}
OTHERS |= {"--requeue", "--overlap"}
"""Options of ray, flwr, make, trackers and Slurm."""


@cache
def options() -> frozenset[str]:
    """Every option of every command, of `python -m experiments.run` itself, and of the benchmarks."""
    found = {"--help", "--version", "--preset", "--resume", *OTHERS}
    for module, name, _ in COMMANDS.values():
        parser = tyro.extras.get_parser(getattr(importlib.import_module(module), name))
        found |= {option for action in parser._actions for option in action.option_strings}
    for file in (ROOT / "benchmarks").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r'"(--[a-z][a-z-]*)"', text))
        found |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    ([a-z]\w*): ", text, re.MULTILINE)}
    return frozenset(found)


def missing(text: str) -> list[str]:
    """What a text names and nobody has."""
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL), re.DOTALL))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?:\.[a-z][a-z-]*)*(?![\w.-])", code))
    flags = {flag.rstrip("-") for flag in named} - options()
    commands = set(re.findall(r"(?:experiments\.run|(?<!from )\bfedsim) ([a-z][a-z-]+)(?![\w./:])", code)) - set(
        COMMANDS
    )
    modules = {
        name
        for name in re.findall(r"python -m ((?:benchmarks|experiments)\.[\w.]*\w)", code)
        if importlib.util.find_spec(name) is None
    }
    presets = {
        name
        for name in re.findall(r"--preset ([a-z][\w-]*)(?![\w.])", code)
        if not (ROOT / "experiments" / "presets" / f"{name}.toml").is_file()
    }
    return sorted(flags | commands | modules | presets)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore")
def test_what_a_page_names_is_there(page: Path) -> None:
    assert not missing(page.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_there_is_found() -> None:
    text = "`--plan.rouns 2` and `fedsim acount`, `python -m benchmarks.gone`, `--preset nobody`, --in-a-sentence"
    assert missing(text) == ["--plan.rouns", "acount", "benchmarks.gone", "nobody"]
