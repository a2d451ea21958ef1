"""The code and the commands of a how-to page, and running them as its reader would."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from warm_python import COMMAND, warm_python

ROOT = Path(__file__).resolve().parents[2]
Fedsim = Callable[[list[str], Path], "subprocess.CompletedProcess[str]"]
AUDIT = [
    "--trials", "60",
    "--canaries", "64",
    "--num-users", "300",
    "--plan.gradients-per-round", "60",
    "--plan.rounds", "4",
    "--plan.delta", "1e-4",
    "--seed", "4",
]  # fmt: skip


def written(page: str, module: str, folder: Path) -> Path:
    """The folder, with the page's code in a module of that name."""
    (folder / f"{module}.py").write_text(code(page), encoding="utf-8")
    return folder


@contextmanager
def importable(folder: Path, classes: dict[str, Any], name: str) -> Iterator[None]:
    """The page's module can be imported here meanwhile, and is gone afterwards.

    Args:
        folder: Where it is.
        classes: Those of the registry that it registers in.
        name: MODULE:NAME of what it registers.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name.partition(":")[0], None)
        classes.pop(name, None)


def _fenced(page: str, language: str) -> str:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(block)


def code(page: str) -> str:
    """The page's one block of Python."""
    return _fenced(page, "python")


def command(page: str, name: str) -> list[str]:
    """The page's command of that name, without the program."""
    program = ["python", "-m", "experiments.run", name]
    lines = [shlex.split(line) for line in _fenced(page, "bash").splitlines()]
    (found,) = [line[3:] for line in lines if line[:4] == program]
    return found


@contextmanager
def warm_fedsim() -> Iterator[Fedsim]:
    """What the command line does in a folder outside the repository, with given arguments."""
    with warm_python({**os.environ, "PYTHONPATH": str(ROOT)}) as words:
        yield lambda arguments, folder: python([*words, *COMMAND, *arguments], folder)


def python(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Python in a folder outside the repository; the packages are found, the folder only where Python looks there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def unboxed(printed: str) -> str:
    """The words alone: tyro draws boxes and breaks lines."""
    return " ".join(printed.replace("│", " ").split())


def read(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
