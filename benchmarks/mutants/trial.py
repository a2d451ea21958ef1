"""Running tests on a changed copy of the tree, in a process that has imported what all of them need already."""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from benchmarks.mutants.catalogue import ROOT

ROOMS = ("fedsim", "clients", "server", "experiments", "benchmarks", "tests")
COPIED = (*ROOMS, "docs", "examples", "pyproject.toml", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PRELOADED = (
    "torch", "transformers", "transformers.models.gpt2.modeling_gpt2", "flwr.clientapp", "flwr.serverapp", "mpmath",
    "scipy.optimize", "scipy.stats", "hypothesis", "pyarrow", "pytest", "dp_accounting", "tyro", "rich.table",
)  # fmt: skip
PASSED, FAILED = 0, 1
"""Exit codes of pytest; all others say that the tests were not run."""


def warm_context() -> multiprocessing.context.ForkServerContext:
    """Where processes are forked from one that holds the libraries; nothing of this project is in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def copy_tree(folder: Path) -> Path:
    """A copy of what tests read, and a link to the data that lies beside the repository."""
    tree = folder / "tree"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            tree.mkdir(exist_ok=True)
            shutil.copy2(source, tree / name)
    if (data := ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(data.resolve())
    return tree


def outcome(
    context: multiprocessing.context.ForkServerContext, tree: Path, tests: Sequence[str], log: Path, seconds: float
) -> tuple[int | None, float]:
    """pytest's exit code on a tree, None where it ran out of time; and how long it took, seconds."""
    started = time.perf_counter()
    process: ForkServerProcess = context.Process(target=_run, args=(str(tree), tuple(tests), str(log)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # with all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None, time.perf_counter() - started
    return process.exitcode, time.perf_counter() - started


def failed_tests(log: Path) -> tuple[str, ...]:
    """The tests that pytest names as failed, as it takes them; none where its output holds no such line."""
    lines = log.read_text(encoding="utf-8").splitlines()
    named = [line.split(" ", 1)[1].split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return tuple(named)


def _run(tree: str, tests: tuple[str, ...], log: str) -> None:
    """In a process of its own: the project's modules are the tree's."""
    os.setsid()
    # A change may keep a file's length, and compiled code is told from older by that and the second.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    os.chdir(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOMS]:
        del sys.modules[name]
    sys.path[:] = [tree, *(path for path in sys.path if Path(path).resolve() not in (ROOT, Path(tree)))]
    os.environ["PYTHONPATH"] = tree
    importlib.invalidate_caches()
    import pytest

    with Path(log).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0"]
        code = int(pytest.main([*options, *tests]))
    os._exit(code)  # what a test left running must not keep this
