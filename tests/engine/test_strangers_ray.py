"""Somebody else's Ray on this machine is joined by whoever asks for it, and by nobody else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from strangers_ray import Stranger, strangers_ray

ROOT = Path(__file__).resolve().parents[2]

PLAIN = "import ray; ray.init(logging_level='ERROR'); print(ray.get_runtime_context().gcs_address)"
DRIVER = """
import ray, sys
from fedsim.engine.ray_grid import RayGrid

with RayGrid("mock_clients:app", workers=1, address=sys.argv[1] or None) as grid:
    print(ray.get_runtime_context().gcs_address)
"""


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    with strangers_ray() as started:
        yield started


def where(stranger: Stranger, code: str, *arguments: str, **variables: str) -> str:
    """The Ray that a program on this machine computes on."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**stranger.environment, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_ray_itself_joins_what_it_finds(stranger: Stranger) -> None:
    """So that the tests beside it can fail."""
    assert where(stranger, PLAIN) == stranger.address


@pytest.mark.parametrize("named", [True, False])
def test_nobody_joins_it_unasked(stranger: Stranger, named: bool) -> None:
    before = stranger.joined()
    variables = {"RAY_ADDRESS": stranger.address} if named else {}
    assert where(stranger, DRIVER, "", **variables) != stranger.address
    assert stranger.joined() == before


@pytest.mark.parametrize("named", [True, False])
def test_auto_joins_it_whether_it_is_named_or_found(stranger: Stranger, named: bool) -> None:
    variables = {"RAY_ADDRESS": stranger.address} if named else {}
    assert where(stranger, DRIVER, "auto", **variables) == stranger.address
