"""What the environment says to Ray: folders that it cannot name, and clusters that are not ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.engine import environment
from fedsim.engine.environment import forget_short_folder, own_import_paths, short_folder, stay_alone_under_flower
from fedsim.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]
LONG = "local/scratch/slurm/tmp/job.4711/" + "n" * 80


@pytest.fixture(autouse=True)
def no_folder_of_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("place", [LONG, "grün"])
def test_a_folder_that_ray_cannot_name_has_another_in_its_place(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, str(tmp_path / place))
    chosen = short_folder()
    assert chosen is not None
    assert Path(chosen).stat().st_mode & 0o777 == 0o700
    assert len(chosen) < 30
    assert f"{name} is " in caplog.text
    forget_short_folder()
    assert not Path(chosen).exists()


def test_no_other_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"/{LONG}")
    monkeypatch.setattr(environment, "SHORT_PLACES", ("/nowhere",))
    with pytest.raises(InvalidInput, match=r"^TMPDIR is '/local.*None of /nowhere can be written"):
        short_folder()


def test_a_folder_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/mine")
    assert short_folder() is None
    monkeypatch.delenv("TMPDIR")
    assert short_folder() is None


@pytest.mark.parametrize("place", [LONG, "grün"])
def test_ray_starts_there(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    program = (
        "import ray\nfrom fedsim.engine.ray_grid import RayGrid\n"
        'with RayGrid("mock_clients:app", workers=1) as grid: print(grid.get_node_ids())'
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "TMPDIR": str(folder),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[1]\n", done.stderr
    assert "TMPDIR is" in done.stderr
    used = Path(done.stderr.split("go to ", 1)[1].split(" ", 1)[0])
    assert not used.exists()


def test_only_flowers_simulation_is_kept_to_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    stay_alone_under_flower()
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/flwr-simulation"])
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setenv("TMPDIR", f"/{LONG}")
    stay_alone_under_flower()
    assert os.environ["RAY_ADDRESS"] == "local"
    assert "10.0.0.1:6379" in caplog.text
    assert len(os.environ["RAY_TMPDIR"]) < 30
    forget_short_folder()


def test_import_paths_are_those_that_no_installation_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [path for path in sys.path if "site-packages" in path or path.endswith("lib-dynload")]
    assert installed
    own_import_paths()  # what that reads of the standard library is read
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", "/absent", str(tmp_path), *installed])
    monkeypatch.chdir(ROOT)
    assert own_import_paths() == [str(tmp_path), str(ROOT)]
