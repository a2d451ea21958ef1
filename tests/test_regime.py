"""The study of the paper's regime: what is run, what it says of results, and that it goes on."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.marked import between_marks
from benchmarks.regime import __main__ as command
from benchmarks.regime.kept import Shelf
from benchmarks.regime.outcomes import Results, Took, at_25_rounds, by_diversity, gathered, growth, leads
from benchmarks.regime.page import BEGIN, END, sections, write_page
from benchmarks.regime.rates import MODEL, PILOTS, Pilot, Rates
from benchmarks.regime.scores import scored
from benchmarks.regime.studies import FILES, QUESTIONS_OF_DIVERSITY, STUDIES, Study, SweepOf, sweeps_of
from benchmarks.regime.synthetic import BOOKS, PASSAGE, WINDOW, SyntheticUsers
from experiments.run import main
from experiments.sweep.command import Sweep
from experiments.sweep.results import contrast
from fedsim.errors import InvalidInput

RATES = Rates(
    {
        (1024, 25, 1.0): 0.003,
        (1024, 25, 8.0): 0.01,
        (256, 25, 2.0): 0.003,
        (256, 25, 8.0): 0.003,
        (128, 50, 8.0): 0.003,
        (64, 100, 8.0): 0.001,
    }
)
STUDIED = ("shakespeare-epsilon", "shakespeare-compute", *QUESTIONS_OF_DIVERSITY)
SHORTER = [pilot for pilot in PILOTS if not pilot.longer]
PILOT_POINTS = sum(3 * len(pilot.epsilons) for pilot in SHORTER)
STEPS = {"uls": 0.05, "els": 0.01}
"""By how much the mock losses fall as ε doubles."""


def loss_of(arm: str, epsilon: float, group_size: int, seed: int) -> float:
    lost = STEPS[arm] * np.log2(epsilon) - 0.2 * (arm == "uls") + 0.001 * group_size
    return 4.0 - lost + 0.001 * seed


def finished_sweep(sweep: SweepOf, folder: Path) -> None:
    """As the sweep's own command leaves it."""
    points: list[dict[str, Any]] = []
    for arm, groups in (("uls", sweep.study.uls), ("els", sweep.study.els)):
        for epsilon in sweep.study.epsilons:
            for group in groups:
                for seed in range(sweep.study.seeds):
                    loss = loss_of(arm, epsilon, group, seed)
                    points.append(
                        {
                            "point": f"{arm}-{epsilon}-{group}-{seed}",
                            "arm": arm,
                            "epsilon": epsilon,
                            "gradients_per_round": sweep.place.gradients,
                            "group_size": group,
                            "learning_rate": sweep.rate,
                            "clip_norm": 1.0,
                            "bands": "1",
                            "bands_used": 1,
                            "predicted_noise_ratio": 1.0,
                            "average": "none",
                            "seed": seed,
                            "validation_loss": loss,
                            "test_loss": loss,
                            "noise_multiplier": 2.0,
                            "noise": 0.02,
                            "seconds": 1.0,
                        }
                    )
    (folder / sweep.name).mkdir(parents=True)
    (folder / sweep.name / "results.json").write_text(json.dumps({"pretrained_loss": 4.5, "points": points}))


def finished_pilot(pilot: Pilot, folder: Path) -> None:
    """With the losses that choose the learning rates of RATES."""
    (folder / pilot.name).mkdir(parents=True)
    points = [
        {
            "point": f"{epsilon}-{rate}",
            "arm": "uls",
            "epsilon": epsilon,
            "gradients_per_round": pilot.gradients,
            "group_size": 4,
            "learning_rate": rate,
            "clip_norm": 1.0,
            "bands": "1",
            "bands_used": 1,
            "predicted_noise_ratio": 1.0,
            "average": "none",
            "seed": 0,
            "validation_loss": 3.0 + (rate != RATES.at(pilot.gradients, pilot.rounds, epsilon)),
            "test_loss": 3.0,
            "noise": 0.02,
            "seconds": 1.0,
        }
        for epsilon in pilot.epsilons
        for rate in (0.001, 0.003, 0.01)
    ]
    (folder / pilot.name / "results.json").write_text(json.dumps({"pretrained_loss": 4.5, "points": points}))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    shelf = Shelf(tmp_path / "kept", tmp_path)
    for study in STUDIES:
        if study.name in STUDIED:
            for sweep in sweeps_of(study, RATES):
                finished_sweep(sweep, tmp_path)
                shelf.keep(sweep, tmp_path)
    return gathered(shelf, STUDIES, RATES)


def test_every_sweep_is_a_command_that_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Sweep] = []
    monkeypatch.setattr(Sweep, "run", lambda self: read.append(self) or 0)
    known: set[str] = set()
    for study in STUDIES:
        for sweep in sweeps_of(study, RATES):
            assert main(sweep.arguments(tmp_path, tmp_path / "runs")) == 0
            run = read[-1]
            assert run.plan.rounds == sweep.place.rounds
            assert run.sweep.compute == (sweep.place.gradients,)
            assert set(run.sweep.epsilons) <= set(study.epsilons)
            assert run.sweep.seeds == study.seeds
            assert not run.sweep.nonprivate
            assert sweep.name not in known
            known.add(sweep.name)
    for pilot in PILOTS:
        assert main(pilot.arguments(tmp_path, tmp_path / "runs")) == 0
        assert read[-1].sweep.epsilons == pilot.epsilons


def test_a_rate_is_that_of_the_pilot_nearest_in_rounds_then_compute_then_epsilon() -> None:
    assert RATES.at(1024, 25, 0.5) == 0.003
    assert RATES.at(1024, 25, 32) == 0.01
    assert RATES.at(64, 100, 0.1) == 0.001
    assert RATES.at(64, 25, 32) == 0.003
    assert RATES.at(128, 50, 8) == 0.003


def test_leads_are_of_the_best_settings_and_grow_as_the_losses_say(results: Results) -> None:
    found = leads(results, study="shakespeare-epsilon")
    assert [one.uls.epsilon for one in found] == [0.5, 2.0, 8.0]
    assert {one.uls.group_size for one in found} == {16}
    for one in found:
        assert one.nats == pytest.approx(0.012 - 0.2 + (0.05 - 0.01) * np.log2(one.uls.epsilon), abs=1e-9)
        assert one.decided == ("ULS" if one.nats > 0 else "ELS")
    nats, half = growth(found[0], found[-1])
    assert nats == pytest.approx(0.04 * 4, abs=1e-9)
    assert half is not None
    assert 0 < half < 0.01
    assert [one.uls.place.gradients for one in at_25_rounds(results)] == [64, 256, 1024]


def test_a_predictor_is_scored_by_order_and_by_what_its_first_choice_loses(results: Results) -> None:
    right = list(scored(results, lambda one: -one.loss))
    assert all(one.rank == pytest.approx(1) and one.regret == 0 for one in right)
    assert len(right) == 3 + 2 + 4  # ε at one place, places at one ε, and four made-up kinds of users
    for one in scored(results, lambda one: one.loss):
        assert one.rank == pytest.approx(-1)
        assert one.regret == pytest.approx(max(s.loss for s in one.settings) - one.best.loss)
        assert 0 < one.chance < one.regret


def test_settings_that_are_predicted_the_same_are_ranked_first_together(results: Results) -> None:
    for one in scored(results, lambda one: -one.noise - 1.0 * (one.group_size > 1)):
        single = [s for s in one.settings if s.group_size == 1]
        assert {s.arm for s in one.first} == {s.arm for s in single} == {"uls", "els"}
        assert one.regret == pytest.approx(np.mean([s.loss for s in single]) - one.best.loss)


def test_settings_with_correlated_noise_count_the_noise_that_is_left(tmp_path: Path) -> None:
    sweep = next(sweeps_of(next(study for study in STUDIES if study.name == "irc-allocation"), RATES))
    finished_sweep(sweep, tmp_path)
    path = tmp_path / sweep.name / "results.json"
    written = json.loads(path.read_text())
    changes = {"bands": "auto", "predicted_noise_ratio": 0.5, "noise": 0.06, "bands_used": 8}
    written["points"] += [point | changes for point in written["points"]]
    path.write_text(json.dumps(written))
    shelf = Shelf(tmp_path / "kept", tmp_path)
    shelf.keep(sweep, tmp_path)
    found = {one.bands: one.noise for one in gathered(shelf, STUDIES, RATES).settings}
    assert found == {"1": pytest.approx(0.02), "auto": pytest.approx(0.01)}


def test_the_page_gets_the_tables_between_its_marks_and_nothing_else_changes(results: Results, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_page(tmp_path, results, RATES, list(scored(results, lambda one: -one.loss)), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "\n75 points ran for 0.0 hours" in text
    assert "; 48 points ran for 0.0 hours more in longer studies and their pilots" in text
    assert text.count("| stronger privacy | ε = 8 | ε = 0.5 | -0.160") == 1
    assert text.count("| more diverse users | shakespeare-alike | shakespeare-mixed | +0.000") == 1
    assert text.count("| more diverse users | synthetic-alike | synthetic-mixed | +0.000") == 1
    assert len(list((tmp_path / "figures").glob("regime_*.png"))) == 4
    assert (tmp_path / "figures" / "regime_epsilon.png").stat().st_size > 1000


def test_a_study_goes_on_where_it_stopped_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*FILES.values(), MODEL, BOOKS):
        (tmp_path / "corpora" / name).mkdir(parents=True)
    output, ran, failing = tmp_path / "runs", list[str](), {"shakespeare-compute-B256-T25-lr0.003"}
    sweeps = {one.name: one for study in STUDIES for one in sweeps_of(study, RATES)}

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        name = Path(arguments[-1]).name
        ran.append(name)
        if name in sweeps and name not in failing:
            finished_sweep(sweeps[name], output)
        elif name not in failing:
            finished_pilot(next(pilot for pilot in PILOTS if pilot.name == name), output)
        return subprocess.CompletedProcess(arguments, int(name in failing))

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "predictor", lambda results, *folders: (results, lambda one: -one.loss))
    study = command.Regime(corpora=tmp_path / "corpora", output=output, only=("shakespeare-compute",))
    assert study.run() == 1
    assert len(ran) == len(set(ran)) == len(SHORTER) + 2
    assert "shakespeare-compute-B256-T25-lr0.003 ended with 1" in capsys.readouterr().err
    failing.clear()
    ran.clear()
    assert study.run() == 0
    assert ran == ["shakespeare-compute-B256-T25-lr0.003"]
    assert study.run() == 0
    assert len(ran) == 1
    assert (output / "regime.md").read_text(encoding="utf-8").startswith(f"{30 + PILOT_POINTS} points ran for")
    elsewhere = command.Regime(
        corpora=tmp_path / "corpora", output=tmp_path / "new", kept=output / "kept", only=("shakespeare-compute",)
    )
    elsewhere.output.mkdir()
    assert elsewhere.run() == 0
    assert len(ran) == 1
    assert (elsewhere.output / "regime.md").read_bytes() == (output / "regime.md").read_bytes()
    shelf = Shelf(output / "kept", tmp_path / "corpora")
    assert gathered(shelf, STUDIES, RATES).took == Took(30 + PILOT_POINTS, 30.0 + PILOT_POINTS)
    kept = output / "kept" / "shakespeare-compute-B256-T25-lr0.003.json"
    written = json.loads(kept.read_text())
    assert str(tmp_path) not in kept.read_text()
    written["arguments"][-1] = "with other settings"
    kept.write_text(json.dumps(written))
    assert gathered(shelf, STUDIES, RATES).took.points == 15 + PILOT_POINTS
    (tmp_path / "other" / MODEL).mkdir(parents=True)
    (tmp_path / "other" / MODEL / "config.json").write_text("{}")
    assert gathered(Shelf(output / "kept", tmp_path / "other"), STUDIES, RATES).took.points == 0


def test_commands_are_printed_and_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*FILES.values(), MODEL, BOOKS):
        (tmp_path / name).mkdir(parents=True)
    for only, pilots in (((), SHORTER), (("irc-allocation",), PILOTS)):
        assert command.Regime(corpora=tmp_path, output=tmp_path / "runs", only=only, commands=True).run() == 0
        lines = capsys.readouterr().out.splitlines()
        assert [shlex.split(line)[-1] for line in lines] == [str(tmp_path / "runs" / pilot.name) for pilot in pilots]
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"shakespeare\.parquet"):
        command.Regime(corpora=tmp_path).run()
    with pytest.raises(InvalidInput, match="one of shakespeare-epsilon"):
        command.Regime(corpora=tmp_path, only=("none",)).run()


def test_studies_are_of_users_and_settings_that_differ() -> None:
    names = [study.name for study in STUDIES]
    assert len(set(names)) == len(names)
    assert all(isinstance(study, Study) and study.asks.endswith(("?", ".")) for study in STUDIES)


def test_synthetic_users_repeat_their_passage_or_write_anybodys(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(9_000)]
    (tmp_path / BOOKS).parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": [" ".join(words[:5_000]), " ".join(words[5_000:])]}), tmp_path / BOOKS)
    spreads = {}
    for diversity in (0.0, 0.5, 1.0):
        users = SyntheticUsers(diversity=diversity, users=200, examples=8)
        table = pq.read_table(users.write(tmp_path, tmp_path / "made"))
        assert np.bincount(table["user_id"].to_numpy()).tolist() == [8] * 200
        windows = [text.split() for text in table["text"].to_pylist()]
        assert all(one == words[(start := int(one[0][1:])) : start + WINDOW] for one in windows)
        starts = np.array([int(one[0][1:]) for one in windows]).reshape(200, 8)
        spreads[diversity] = np.ptp(starts, axis=1)
        assert (
            users.write(tmp_path, tmp_path / "made").stat().st_mtime
            == (tmp_path / "made" / users.file).stat().st_mtime
        )
    assert spreads[0.0].max() < PASSAGE
    assert np.median(spreads[0.5]) > PASSAGE
    assert np.median(spreads[1.0]) > np.median(spreads[0.5])


def test_the_page_shows_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables, and what the claims quote of them, wherever the corpora are."""
    docs = Path(__file__).resolve().parents[1] / "docs"

    def said(shelf: Shelf, sweep: SweepOf | Pilot) -> dict[str, str]:
        return dict(json.loads((shelf.folder / f"{sweep.name}.json").read_text(encoding="utf-8"))["content"])

    monkeypatch.setattr(Shelf, "_content", said)
    shelf = Shelf(docs / "reports" / "regime", docs)
    rates = Rates.read(shelf)
    results = gathered(shelf, STUDIES, rates)
    page = (docs / "results.md").read_text(encoding="utf-8")
    shown = between_marks(docs / "results.md", BEGIN, END)
    for section in sections(results, rates, []):
        assert section in shown
    by_epsilon, by_compute = leads(results, study="shakespeare-epsilon"), at_25_rounds(results)
    claims = page.partition("## The planner")[0]
    by_kind = by_diversity(results, "shakespeare")
    for one in (by_epsilon[0], by_epsilon[-1], *by_compute):
        assert interval(one.nats, one.half) in claims
    for found in (by_epsilon[::-1], by_compute, by_kind):
        assert interval(*growth(found[0], found[-1])) in claims
    words = page.partition("## The paper's regime")[2].partition(BEGIN)[0]
    for one in by_kind:
        assert interval(one.nats, one.half) in words
    for gained in gains_of_bands(results):
        assert interval(*gained) in words
    assert [one.uls.group_size for one in by_compute] == [1, 1, 4]
    assert [one.uls.group_size for one in by_epsilon] == [16, 4, 4]


def gains_of_bands(results: Results) -> list[tuple[float, float | None]]:
    """By how much correlated noise lowers the loss, by rounds."""
    found = {(one.place.rounds, one.bands): np.array(one.losses) for one in results.of(study="irc-allocation")}
    return [contrast([found[rounds, "1"], found[rounds, "auto"]], [1, -1]) for rounds in (25, 50, 100)]


def interval(nats: float, half: float | None) -> str:
    return f"{nats:.3f} ± {half:.3f}"
