"""How `make test` shares the tests among processes, and what each of these takes of the machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        ([], "auto"),
        (["ARGS=-x tests/privacy"], "auto"),
        (["ARGS=tests/test_plan.py::test_that -s"], "0"),
        (["ARGS=tests/test_plan.py", "WORKERS=3"], "3"),
    ],
)
def test_a_file_alone_is_run_in_one_process(arguments: list[str], workers: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("ARGS", "WORKERS", "MAKEFLAGS")}
    printed = subprocess.run(
        ["make", "--dry-run", "test", *arguments], cwd=TESTS.parent, env=environment, capture_output=True, text=True
    ).stdout
    assert f"-m pytest --numprocesses {workers} " in printed
    assert "--dist loadfile" in printed, "tests of a file share what their module has computed"


@pytest.mark.parametrize("workers", [1, 10_000])
def test_workers_have_no_more_threads_than_there_are_cores(workers: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    program = "import conftest, os; print(os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TESTS, env={**environment, "PYTEST_XDIST_WORKER_COUNT": str(workers)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(os.cpu_count() if workers == 1 else 1), done.stderr
