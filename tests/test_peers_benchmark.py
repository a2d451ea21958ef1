"""The comparison with other libraries, without them: what is exported, certified, read again and printed."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import norm

from benchmarks import environments
from benchmarks.peers import clock, figure, ours
from benchmarks.peers.certificates import ADD_OR_REMOVE, EMPTYING, certify, event_of, noise_for, shown
from benchmarks.peers.lines import OPTIONAL, Line, asked, best, read, read_line, table
from benchmarks.peers.peers import NAMES, OURS, PACKAGES, PEERS
from benchmarks.peers.sides.side import Task, at_most
from benchmarks.peers.task import Corpus, drawn, rows_of
from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.accountant import delta_bounds, epsilon_bounds
from fedsim.privacy.events import Gaussian, PoissonSubsampledGaussian, Repeated
from fedsim.rows import TokenRows

LINE = Line(
    peer="opacus",
    date="2026-11-28",
    versions={"opacus": "1.6.0", "torch": "2.13.0", "transformers": "5.23.0"},
    task={"epsilon": 8.0, "delta": 1e-5, "learning_rate": 0.003, "seed": 0},
    seconds=60.0,
    processor_seconds=50.0,
    gradients=6369,
    loss_before=4.5,
    validation_loss=3.1,
    test_loss=3.2,
    stated_epsilon=7.99,
    stated_of="one row of text",
    user_epsilon=3770.3,
    user_words=ADD_OR_REMOVE,
    mechanism={"kind": "poisson-rows"},
    group_privacy_epsilon=float("inf"),
)


class Rows:
    """What `rows_of` asks of a store."""

    def __init__(self, lengths: list[list[int]]) -> None:
        flat = np.array([length for user in lengths for length in user])
        self.num_users, self.num_rows = len(lengths), len(flat)
        self.user_offsets = np.cumsum([0, *map(len, lengths)])
        self.offsets = np.cumsum([0, *flat])

    def take(self, rows: np.ndarray) -> TokenRows:
        return TokenRows(tokens=np.arange(self.offsets[-1]), offsets=self.offsets).take(rows)


def test_rows_are_exported_with_their_owners() -> None:
    rows, owners = rows_of(Rows([[3, 3], [3], [3, 3, 3]]))
    assert rows.tolist() == np.arange(18).reshape(6, 3).tolist()
    assert owners.tolist() == [0, 0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="3 to 4 tokens"):
        rows_of(Rows([[3, 4]]))


def test_held_out_rows_are_the_same_every_time_and_bounded() -> None:
    rows = np.arange(40).reshape(20, 2)
    assert drawn(rows, 5).tolist() == drawn(rows, 5).tolist()
    assert len(drawn(rows, 5)) == 5
    assert drawn(rows, 50).tolist() == rows.tolist()


def test_no_user_keeps_more_rows_than_the_bound() -> None:
    users = np.repeat(np.arange(4), [1, 9, 3, 2])
    kept = at_most(np.zeros((15, 2)), users, 3, seed=1)
    assert np.bincount(users[kept]).tolist() == [1, 3, 3, 2]
    assert (np.diff(kept) > 0).all()


def test_rows_have_one_length_on_the_command_line_as_in_the_export() -> None:
    corpus = Corpus(path="texts.parquet", model="folder")
    data, options = corpus.data(), corpus.options()
    said = dict(zip(options[::2], options[1::2], strict=True))
    assert data.minimum_tokens == data.sequence_length
    assert said["--data.sequence-length"] == said["--data.minimum-tokens"] == str(data.sequence_length)
    assert said["--data.long-texts"] == data.long_texts
    assert said["--data.path"] == data.path


def test_fedsim_is_asked_for_the_same_task() -> None:
    task = Task(steps=7, gradients=96, group_size=3, learning_rate=0.02, seed=5)
    arguments = ours.command(Path("run"), Corpus(), task, OURS["fedsim-bands"][1])
    said = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert (said["--plan.rounds"], said["--plan.gradients-per-round"], said["--plan.group-size"]) == ("7", "96", "3")
    assert (said["--optimizer.learning-rate"], said["--plan.bands"]) == ("0.02", "auto")


def test_rows_sampled_by_themselves_are_accounted_with_the_largest_user() -> None:
    one = {"kind": "poisson-rows", "probability": 0.1, "noise_multiplier": 1.0, "steps": 10, "most_rows": 1}
    single = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.0)
    assert certify(one, 1e-5).epsilon == pytest.approx(
        epsilon_bounds(Repeated(event=single, count=10), 1e-5).upper, rel=2e-3
    )
    three = certify({**one, "most_rows": 3}, 1e-5)
    assert certify(one, 1e-5).epsilon < three.epsilon < three.by_group_privacy


def test_shuffled_epochs_are_not_amplified() -> None:
    found = certify({"kind": "shuffled-epochs", "epochs": 4, "noise_multiplier": 2.0}, 1e-5)
    assert found.epsilon == pytest.approx(epsilon_bounds(Gaussian(noise_multiplier=1.0), 1e-5).upper, rel=1e-6)
    assert (found.against, found.by_group_privacy) == (EMPTYING, None)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 2.0])
def test_users_drawn_with_replacement_are_no_better_hidden_than_the_certificate_says(epsilon: float) -> None:
    """Two users who pull apart, two draws: without one of them the sum is -2, with it -2, 0 or 2."""
    sigma, at = 1.5, np.linspace(-20, 20, 200_001)
    with_user = sum(w * norm.pdf(at, x, sigma) for w, x in ((0.25, -2), (0.5, 0), (0.25, 2)))
    without = norm.pdf(at, -2, sigma)
    true = [
        np.maximum(p - np.exp(epsilon) * q, 0).sum() * (at[1] - at[0])
        for p, q in ((with_user, without), (without, with_user))
    ]
    mechanism = {
        "kind": "cohort-with-replacement",
        "cohort": 2,
        "population": 2,
        "noise_multiplier": sigma,
        "steps": 1,
    }
    assert delta_bounds(event_of(mechanism), epsilon).upper >= max(true) * (1 - 1e-6)


@pytest.mark.parametrize(
    "mechanism",
    [
        {"kind": "poisson-rows", "probability": 0.1, "steps": 10, "most_rows": 4},
        {"kind": "fixed-cohort", "cohort": 10, "population": 100, "steps": 10},
    ],
)
def test_noise_that_is_found_has_the_epsilon_asked_for(mechanism: dict) -> None:
    noise = noise_for(mechanism, 3.0, 1e-5)
    assert 2.9 < certify({**mechanism, "noise_multiplier": noise}, 1e-5).epsilon <= 3.0


def test_an_unknown_mechanism_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"mechanism\.kind is 'hope'"):
        certify({"kind": "hope"}, 1e-5)


@pytest.mark.parametrize("name", [item.name for item in fields(Line) if item.name not in OPTIONAL])
def test_a_line_without_a_field_is_refused_by_name(name: str, tmp_path: Path) -> None:
    values = json.loads(LINE.to_json())
    del values[name]
    (tmp_path / "opacus.jsonl").write_text(json.dumps(values) + "\n")
    with pytest.raises(InvalidInput, match=rf"opacus\.jsonl:1 .* a line with {name}\."):
        read(tmp_path)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "opacus.jsonl").write_text(LINE.to_json() + "\n")
    assert read(tmp_path) == [LINE]
    assert "Infinity" not in LINE.to_json()
    for text in ("", "{"):
        with pytest.raises(InvalidInput, match="a line of JSON"):
            read_line(text, "here")
    with pytest.raises(InvalidInput, match="output"):
        read(tmp_path / "none")


def test_the_learning_rate_is_chosen_by_validation_users_alone() -> None:
    other = replace(LINE, task=LINE.task | {"learning_rate": 0.01}, validation_loss=3.5, test_loss=1.0)
    again = replace(LINE, task=LINE.task | {"seed": 1}, test_loss=3.4, user_epsilon=4000.0)
    (chosen,) = best([other, LINE, again])
    assert chosen.task["learning_rate"] == 0.003
    assert chosen.test_loss == pytest.approx(3.3)
    assert chosen.user_epsilon == 4000.0


def test_other_epsilons_have_lines_of_their_own_and_one_epsilon_a_table() -> None:
    stronger = replace(
        LINE, task=LINE.task | {"epsilon": 2.0, "learning_rate": 0.01}, validation_loss=3.9, test_loss=3.8
    )
    found = best([stronger, LINE])
    assert [one.test_loss for one in found] == [3.8, LINE.test_loss]
    assert asked(found, 2.0) == [found[0]]
    assert asked(found, 8.0) == [found[1]]


def test_the_figure_shows_each_library_where_it_stands_and_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figure, "save", lambda made, path: drawn.append(made) or path)
    curve = [
        replace(
            LINE,
            peer=figure.CURVE,
            stated_epsilon=e,
            user_epsilon=e,
            test_loss=4 - e / 10,
            task=LINE.task | {"epsilon": e},
        )
        for e in (8.0, 2.0)
    ]
    same = replace(LINE, peer="fedsim", stated_epsilon=8.0, user_epsilon=8.0)
    without = replace(LINE, peer="pfl", user_epsilon=None)
    figure.draw([LINE, *curve, same, without], 8.0, tmp_path / "peers.png")
    (axes,) = drawn[0].axes
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    assert points == [
        (LINE.stated_epsilon, LINE.test_loss),
        (LINE.user_epsilon, LINE.test_loss),
        (8.0, LINE.test_loss),
    ]
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 3.8], [8.0, 3.2]]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["Opacus", "fedsim, independent noise"]
    assert set(figure.SHORT) == set(NAMES) - {figure.CURVE}


def test_the_table_says_what_is_certified_and_what_is_not() -> None:
    silent = replace(
        LINE,
        peer="flower",
        stated_epsilon=None,
        user_epsilon=None,
        user_words="clients weigh by their rows",
        test_loss=3.0,
    )
    weaker = replace(LINE, peer="shuffle", user_epsilon=15.0, user_words=EMPTYING)
    printed = table([silent, LINE, weaker], {"opacus": "Opacus"}, {"opacus": "opacus"}).splitlines()
    assert [line.split(" | ")[0] for line in printed[2:5]] == ["| shuffle", "| Opacus", "| flower"]
    assert "15.00 (emptying one user's rows" in printed[2]
    assert "| 1.6.0 | 3.200 | 7.99 (one row of text) | 3,771 | 6,369 | 60 | 50 |" in printed[3]
    assert "| none | none (clients weigh by their rows) |" in printed[4]
    assert printed[-1].startswith("2026-11-28; torch 2.13.0; transformers 5.23.0; ")


@pytest.mark.parametrize(
    ("epsilon", "text"), [(7.991, "8.00"), (8.0, "8.00"), (3770.34, "3,771"), (float("inf"), "∞")]
)
def test_epsilons_are_rounded_up(epsilon: float, text: str) -> None:
    assert shown(epsilon) == text


def test_every_library_has_its_program() -> None:
    sides = Path(sys.modules[Task.__module__].__file__).parent
    assert all((sides / f"{peer.side}.py").is_file() for peer in PEERS.values())
    assert all(peer.here or peer.requirements for peer in PEERS.values())


def test_the_clock_counts_from_the_first_record_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(clock.FILE, str(tmp_path / "clock"))
    one = clock.Clock()
    for number in range(3):
        one.on_record({"round": number})
    found = clock.elapsed(tmp_path / "clock")
    assert found["processor_seconds"] >= 0
    assert 0 <= found["seconds"] < 60


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is run in place of venv and pip, which end well unless they are to install `missing`."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        calls.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
        failed = "missing" in command
        return subprocess.CompletedProcess(command, int(failed), stderr="ERROR: No matching distribution" * failed)

    monkeypatch.setattr(environments.subprocess, "run", run)
    return calls


def test_an_environment_is_made_once_and_anew_for_other_packages(tmp_path: Path, pip: list[list[str]]) -> None:
    folder = tmp_path / "env"
    for wanted, count in ((["a==1"], 2), (["a==1"], 2), (["a==2"], 4)):
        assert environments.environment(folder, wanted) == folder / "bin" / "python"
        assert len(pip) == count
    environments.environment(folder, ["a==2"], without_dependencies=["b"])
    assert pip[-1][-2:] == ["--no-deps", "b"]


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(Failure, match="No matching distribution"):
        environments.environment(tmp_path / "env", ["missing"])
    assert not (tmp_path / "env").exists()


def test_the_page_shows_the_table_of_the_lines_that_are_kept() -> None:
    root = Path(__file__).resolve().parents[1]
    printed = table(asked(best(read(root / "docs" / "reports" / "peers")), 8.0), NAMES, PACKAGES)
    assert printed in (root / "docs" / "peers.md").read_text(encoding="utf-8")


def test_the_page_shows_the_curve_of_the_lines_that_are_kept() -> None:
    root = Path(__file__).resolve().parents[1]
    kept = [one for one in best(read(root / "docs" / "reports" / "peers")) if one.peer == figure.CURVE]
    kept.sort(key=lambda one: one.user_epsilon or 0.0)
    page = (root / "docs" / "peers.md").read_text(encoding="utf-8")
    assert f"ε | {' | '.join(shown(one.user_epsilon) for one in kept)} |" in page
    assert f"loss | {' | '.join(f'{one.test_loss:.3f}' for one in kept)} |" in page
    events = [one.mechanism["event"]["events"][0] for one in kept]
    bands = [len(event["events"]) if event["kind"] == "one-of" else 1 for event in events]
    assert f"bands chosen | {' | '.join(map(str, bands))} |" in page
    others = {one.peer: one for one in best(read(root / "docs" / "reports" / "peers"))}
    assert all(kept[-1].test_loss < others[name].test_loss for name in ("opacus", "dptrainer"))
    assert min(others[name].user_epsilon for name in ("opacus", "dptrainer")) > 24 * kept[-1].user_epsilon


def cells(text: str) -> list[list[str]]:
    """Of a table in Markdown, without its headings."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_readme_shows_what_the_page_does() -> None:
    """Each library's loss, both ε and processor seconds."""
    root = Path(__file__).resolve().parents[1]
    page = cells(table(asked(best(read(root / "docs" / "reports" / "peers")), 8.0), NAMES, PACKAGES))
    kept = {row[0]: (row[2], row[3].split(" (")[0], row[4].split(" (")[0], row[-1]) for row in page}
    readme = (root / "README.md").read_text(encoding="utf-8")
    shown = cells(readme.split("## Against other libraries")[1].split("\n## ")[0])
    assert len(shown) == len(kept)
    for name, loss, stated, certified, seconds in shown:
        library = re.sub(r" \d+\.\d+\.\d+", "", name)
        assert (loss, stated.split(" (")[0], certified.split(" (")[0], seconds) == kept[library], library
