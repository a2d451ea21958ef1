"""Pipes that close, terminals that lack letters, a core install: nothing ends in a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = ["account", "--algorithm", "uls", "--sampling-probability", "0.01", "--noise-multiplier", "1"]
ACCOUNT += ["--steps", "10", "--delta", "1e-6"]


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    program = [sys.executable, "-m", "experiments.run", "train", "--help"]
    reads, writes = os.pipe()
    os.close(reads)  # nobody reads: the first write fails
    done = subprocess.run(program, stdout=writes, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    os.close(writes)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_letters_that_a_terminal_lacks_are_spelt(encoding: str) -> None:
    program = [sys.executable, "-m", "experiments.run", *ACCOUNT]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(program, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode(encoding)
    assert ("ε ≤" in printed) if encoding == "utf-8" else ("eps <=" in printed)


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from experiments.run import main
sys.exit(main(sys.argv[1:]))
"""
EXTRA = {"torch", "flwr", "ray", "transformers", "datasets", "peft", "safetensors", "pyarrow", "duckdb", "filelock"}
EXTRA |= {"tokenizers", "cryptography", "cloudpickle", "huggingface_hub"}


def without_extras(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command where the core alone is installed."""
    program = [sys.executable, "-c", WITHOUT.format(absent=EXTRA), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "prepare", "generate", "evaluate", "audit", "merge"])
def test_a_core_install_says_what_a_command_needs(command: str, tmp_path: Path) -> None:
    operands = {"generate": ["x", "--prompt", "y"], "evaluate": ["x"], "merge": ["x", "--output", "y"]}
    sources = ["--data.source", "files", "--data.path", "x", "--output", "y"]
    operands["prepare"] = sources
    done = without_extras(command, *operands.get(command, []), folder=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {command} needs ")
    assert line.endswith("which is not installed: pip install 'fedsim[sim]'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [ACCOUNT, ["plan", "--num-users", "1000", "--user-sizes", "4"], ["train", "--help"], ["train", "--lr", "3"]],
)
def test_a_core_install_accounts_plans_and_explains(arguments: list[str], tmp_path: Path) -> None:
    done = without_extras(*arguments, folder=tmp_path)
    assert "not installed" not in done.stderr
    assert done.returncode == (2 if "--lr" in arguments else 0), done.stderr


def test_nohup_keeps_a_hangup_ignored() -> None:
    script = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from experiments.command_line.signals import ending_by_signals\n"
        "with ending_by_signals(): os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "alive\n"


def test_a_signal_is_told_by_its_number_where_ray_makes_another_exception_of_it() -> None:
    program = (
        "import os, signal\n"
        "from experiments.command_line.signals import Terminated, ending_by_signals\n"
        "try:\n"
        "    with ending_by_signals():\n"
        "        try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        except Terminated: raise KeyboardInterrupt\n"
        "except Terminated as terminated: raise SystemExit(terminated.number)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == signal.SIGTERM
