"""What is refused before anything was charged leaves nothing behind, and takes nothing away that was there."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import trained

from experiments.compare import Compare
from experiments.run import main
from fedsim.config import RunConfig
from fedsim.disk import require_writable
from fedsim.errors import Failure, InvalidInput
from server.precautions import trial
from server.results.run_folder import RunFolder


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial, which comes last of all that is tried, refuses every run."""

    def no_room(path: Path) -> int:
        return 0

    monkeypatch.setattr(trial, "free_bytes", no_room)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("output", ["run", "runs/deep/run"])
@pytest.mark.usefixtures("refused")
def test_a_refused_run_leaves_nothing(small_run: Callable[..., RunConfig], tmp_path: Path, output: str) -> None:
    with pytest.raises(Failure, match="are free"):
        trained(small_run(tmp_path / output))
    assert everything(tmp_path) == {}


@pytest.mark.usefixtures("refused")
def test_what_was_there_stays(small_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name in ("notes.txt", "checkpoints/step-100.bin", "releases/1.0.txt", "paths.json", "film.partial"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(Failure, match="are free"):
        trained(small_run(tmp_path / "run"))
    assert everything(tmp_path) == before


@pytest.mark.usefixtures("refused")
def test_a_refused_comparison_leaves_nothing(small_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = small_run(tmp_path / "both")
    common = {item.name: getattr(run, item.name) for item in dataclasses.fields(RunConfig)}
    comparison = Compare(**{**common, "plan": dataclasses.replace(run.plan, noise_multiplier=None, epsilon=8.0)})
    with pytest.raises(Failure, match="are free"):
        comparison.compared(comparison.own_folder())
    assert everything(tmp_path) == {}


def test_a_run_that_was_interrupted_after_its_first_charge_stays(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.training.Training.run", end)
    with pytest.raises(KeyboardInterrupt):
        trained(small_run(tmp_path / "run"))
    assert {"config.json", "secret.json", "ledger.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_that_began_meanwhile_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.require_unused()
    second.require_unused()
    first.make()
    first.write_config(config={})
    before = everything(tmp_path)
    with pytest.raises(InvalidInput, match="no other process is at work"), second.undone_unless_kept():
        second.make()
    assert everything(tmp_path) == before
    first.hold.let_go()
    with pytest.raises(InvalidInput, match="without a run in it"), second.undone_unless_kept():
        second.make()


@pytest.mark.parametrize("place", ["file", "file/run", "a" * 300, "new/" + "b" * 300, "nul\0", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused_before_it_is_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    before = everything(tmp_path)
    with pytest.raises(InvalidInput, match=r"output is .*a folder that can be written\. \w"):
        require_writable(tmp_path / place)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data.source", "files", "--data.path", "absent.jsonl"],
        ["compare", "--data.source", "files", "--data.path", "absent.jsonl"],
        ["sweep", "--data.source", "files", "--data.path", "absent.jsonl"],
        ["train", "--model.path", "./absent"],
        ["compare", "--model.path", "./absent"],
        ["sweep", "--model.path", "./absent"],
    ],
)
@pytest.mark.parametrize("output", [[], ["--output", "deep/out"]])
def test_a_refused_command_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], output: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *output]) == 2
    assert everything(tmp_path) == {}
