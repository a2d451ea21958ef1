"""The table of user inference: what is kept is not made again, and what is shown is what was found."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import user_inference
from benchmarks.regime.kept import CORPORA
from benchmarks.regime.rates import MODEL
from benchmarks.regime.studies import FILES
from benchmarks.user_inference import SHARES, Point, Table, markdown
from experiments.command_line.options import read_options
from experiments.train import Train
from fedsim.errors import InvalidInput


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for name in (*FILES.values(), f"{MODEL}/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of the runs that were asked for; each leaves the files that are read."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        left = {
            "config": {},
            "summary": {"test_loss_before": 4.0, "test_loss_after": 3.0},
            "privacy": {"epsilon": {"upper": 7.9}},
        }
        for name, values in left.items():
            (folder / f"{name}.json").write_text(json.dumps(values))
        return SimpleNamespace(returncode=0, stderr="")

    attack = SimpleNamespace(
        area=SimpleNamespace(area=0.61, lower=0.55, upper=0.67),
        found=SimpleNamespace(rate=0.03, lower=0.01, upper=0.08),
        users=(100, 200),
    )
    monkeypatch.setattr(user_inference, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(user_inference, "infer_users", lambda *_, **__: attack)
    config = SimpleNamespace(plan=SimpleNamespace(delta=1e-5))
    monkeypatch.setattr(user_inference, "stored_config", lambda *_: config)
    return asked


def test_finished_points_are_not_made_again_unless_they_were_of_other_text(
    corpora: Path, tmp_path: Path, trained, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(corpora=corpora, output=tmp_path / "runs", only=("shakespeare",), epsilons=(math.inf, 8.0))
    table.run()
    assert len(trained) == 2
    printed = capsys.readouterr().out
    assert (
        "| shakespeare | none | 4.000 → 3.000 | 0.610 (0.550 to 0.670) | 3.0% (1.0% to 8.0%) | 100, 200 |" in printed
    )
    assert "| shakespeare | 7.90 |" in printed
    first = json.loads(printed.splitlines()[-1])
    assert [point["epsilon_certified"] for point in first["points"]] == [None, 7.9]
    table.run()
    assert len(trained) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    dataclasses.replace(table, rounds=3).run()
    assert len(trained) == 4
    (corpora / FILES["shakespeare"]).write_text("other")
    user_inference.digest_of.cache_clear()
    dataclasses.replace(table, rounds=3).run()
    assert len(trained) == 6


@pytest.mark.parametrize("corpus", SHARES)
@pytest.mark.parametrize("epsilon", [math.inf, 2.0])
def test_the_commands_are_such_as_train_understands(corpus: str, epsilon: float) -> None:
    command, *arguments = Table(corpora=CORPORA)._arguments(corpus, epsilon, CORPORA)
    assert command == "train"
    config = read_options(Train, arguments, program="train", default=None)
    assert config.plan.epsilon == epsilon
    assert 1 - config.data.validation_fraction - config.data.test_fraction == pytest.approx(SHARES[corpus])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="corpora"):
        Table(corpora=tmp_path).run()
    with pytest.raises(InvalidInput, match="only"):
        Table(corpora=tmp_path, only=("no",)).run()


def test_a_loss_that_is_no_number_is_shown_as_none() -> None:
    point = Point(
        corpus="x",
        epsilon=2.0,
        epsilon_certified=2.0,
        loss_before=4.0,
        loss=None,
        area=(0.5, 0.4, 0.6),
        found=(0.0, 0.0, 0.1),
        users=(3, 4),
        arguments=[],
        content=[],
        date="",
        versions={},
    )
    assert "4.000 → –" in markdown([point])
