"""The same apps under Flower's own command, `flwr run .`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_flags import SMALL

ROOT = Path(__file__).resolve().parents[2]


WATCHED = "trackers = '[\"tensorboard\"]'\n"


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[Path]:
    """A folder for Flower's own state; the SuperLink that `flwr run` leaves behind is stopped at the end."""
    yield tmp_path
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(tmp_path):
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue


def as_toml(flags: list[str]) -> str:
    """Command-line flags as the lines of a run-config file; --data.packages takes a list."""
    names, values = flags[::2], flags[1::2]
    fields = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
    fields["data.packages"] = f"'{json.dumps([fields['data.packages']])}'"
    return "".join(f"{name} = {value}\n" for name, value in fields.items())


def test_flwr_run_trains_with_the_same_apps(flower_home: Path) -> None:
    output, settings = flower_home / "out", flower_home / "run.toml"
    settings.write_text(as_toml(SMALL) + f'plan.rounds = 2\nevaluation.every = 1\noutput = "{output}"\n{WATCHED}')
    environment = {
        **os.environ,
        "FLWR_HOME": str(flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["flwr", "run", ".", "--stream", "--run-config", str(settings)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["algorithm"] == "uls"
    assert summary["epsilon"] <= 8
    assert summary["rounds"] == 2
    assert (output / "model" / "model.safetensors").exists()
    assert list((output / "tensorboard").glob("events.*"))
