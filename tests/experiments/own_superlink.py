"""`flwr run` with a SuperLink of its own, which is stopped at the end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from own_ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
PORTS = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
"""Without ports of its own it would take the SuperLink that somebody else's `flwr run` has left on this machine, with
that one's folder, packages and end."""


@contextmanager
def own_superlink(home: Path) -> Iterator[dict[str, str]]:
    """An environment for `flwr run` in which Flower's state is in a folder of the test's."""
    environment = {
        **os.environ,
        **dict(zip(PORTS, free_ports(len(PORTS)), strict=True)),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        yield environment
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(home):
                    process.kill()
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue


def flwr_run(folder: Path, environment: dict[str, str], *options: str) -> str:
    """What `flwr run` of the app in a folder prints; it must end well."""
    done = subprocess.run(
        ["flwr", "run", ".", "--stream", *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
