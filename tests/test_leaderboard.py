"""The leaderboard: what enters, what is refused, in which order it is shown, and whether it can be run again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from leaderboard_task import SHAPE, TASK, WHO, made_in, trained

from benchmarks.leaderboard import __main__ as command
from benchmarks.leaderboard import reproduce as reproducing
from benchmarks.leaderboard import tasks
from benchmarks.leaderboard.arguments import arguments_of, config_of
from benchmarks.leaderboard.check import check
from benchmarks.leaderboard.enter import entry_of, keep
from benchmarks.leaderboard.entry import FOLDER, Entry, Run, read_entry
from benchmarks.leaderboard.reproduce import faults, reproduce
from benchmarks.leaderboard.table import BEGIN, END, tables
from benchmarks.leaderboard.tasks import Files, Opened, content_of, keep_figures
from benchmarks.marked import between_marks
from experiments.run import main
from fedsim.errors import Failure, InvalidInput
from fedsim.models.small import small_model_folder
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import Gaussian, PoissonSubsampledGaussian, Repeated, from_json, to_json
from fedsim.privacy.selection import best_of
from fedsim.resources import open_resources


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """Text and base model of the task, whose figures stand beside those of the others in a file of its own."""
    folder = tmp_path_factory.mktemp("leaderboard")
    found = made_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(folder / "cache"))
        (folder / "figures.json").write_text(tasks.FIGURES.read_text(encoding="utf-8"), encoding="utf-8")
        patch.setattr(tasks, "FIGURES", folder / "figures.json")
        patch.setitem(tasks.TASKS, TASK.name, TASK)
        keep_figures(TASK.name, Opened(TASK, open_resources(TASK.config(found))).found())
        yield found


@pytest.fixture(scope="module")
def run(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "uls"
    return trained(output, files, "--sampling-seed", "1", "--noise-seed", "2")


@pytest.fixture(scope="module")
def entry(run: Path) -> Entry:
    return entry_of([run], WHO)


def forged(entry: Entry, **values: Any) -> Entry:
    return replace(entry, **values)


def with_noise(event: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same event with more noise."""
    return {
        name: with_noise(value, factor)
        if isinstance(value, dict)
        else [with_noise(one, factor) for one in value]
        if isinstance(value, list)
        else value * factor
        if name == "noise_multiplier"
        else value
        for name, value in event.items()
    }


def certified(event: dict[str, Any]) -> float:
    return epsilon_bounds(from_json(event), TASK.delta).upper


def test_a_run_enters_is_kept_and_stands(entry: Entry, run: Path, tmp_path: Path) -> None:
    written = keep(entry, tmp_path)
    assert written.name == "tiny-uls.json"
    assert read_entry(written) == entry
    assert check(entry).faults == []
    statement = json.loads((run / "privacy.json").read_text(encoding="utf-8"))
    assert entry.event == statement["event"]
    assert 0 <= entry.epsilon - statement["epsilon"]["upper"] <= 1e-4
    assert entry.arguments is not None
    said = dict(zip(entry.arguments[1::2], entry.arguments[2::2], strict=True))
    assert (said["--plan.delta"], said["--plan.gradients-per-round"], said["--plan.rounds"]) == ("0.001", "16", "2")
    assert said["--optimizer.learning-rate"] == "0.001"  # by default, and said all the same
    assert not {name for name in said if name.startswith(("--data", "--model", "--engine", "--evaluation"))}
    assert [(one.sampling_seed, one.noise_seed) for one in entry.runs] == [(1, 2)]
    with pytest.raises(InvalidInput, match="one that no other entry of the task has"):
        keep(entry, tmp_path)


def test_the_loss_is_measured_and_not_read(entry: Entry, run: Path, files: Files) -> None:
    """The run measured five rows; the entry's loss is that of the task's twenty."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    opened = Opened.of(TASK, files)
    assert len(opened.rows) == TASK.most_rows
    assert entry.loss != summary["test_loss_after"]
    assert entry.loss != opened.base_loss == entry.base_loss


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"epsilon": 7.9}, "certifies no less than"),
        ({"epsilon": 8.5}, "must be at most 8"),
        ({"delta": 1e-2}, "its δ is 0.01"),
        ({"content": "0" * 64}, "its data has the content 000000000000"),
        ({"weights": "0" * 64}, "its base model has the weights 000000000000"),
        ({"unit": "example"}, "about one example"),
        ({"adjacency": "replace-one-user"}, "for replace-one-user"),
        ({"chosen": "private selection"}, "is not charged in its event"),
        ({"event": {"kind": "hope"}}, "kind is 'hope'"),
        ({"event": {"kind": "stranger:Event"}}, "stranger"),
        ({"event": to_json(Repeated(event=Gaussian(noise_multiplier=2.0), count=1))}, "its arguments plan event"),
    ],
)
def test_what_is_forged_is_refused(entry: Entry, values: dict[str, Any], fault: str) -> None:
    found = check(forged(entry, **values)).faults
    assert any(fault in one for one in found), found


def test_noise_that_the_arguments_do_not_add_is_refused_though_its_epsilon_is_right(entry: Entry) -> None:
    event = with_noise(entry.event, 1.5)
    found = check(forged(entry, event=event, epsilon=certified(event))).faults
    assert len(found) == 1
    assert "noise_multiplier" in found[0]
    # What accountants of two versions differ by is no forgery.
    near = with_noise(entry.event, 1.001)
    assert check(forged(entry, event=near)).faults == []


def test_an_event_without_a_finite_epsilon_is_refused(entry: Entry) -> None:
    found = check(forged(entry, arguments=None, words="by hand", event={"kind": "unprotected"})).faults
    assert found == ["its event has no finite ε at all"]


def test_the_second_method_has_a_word(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accountant that is wrong does not let an entry in by itself."""
    bounds = epsilon_bounds(from_json(entry.event), TASK.delta)
    too_low = replace(bounds, lower=0.5 * bounds.lower, upper=0.5 * bounds.upper)
    monkeypatch.setattr("benchmarks.leaderboard.check.epsilon_bounds", lambda *_, **__: too_low)
    (found,) = check(forged(entry, epsilon=too_low.upper)).faults
    assert "the second method finds δ" in found
    assert "contradicted" in found


def test_a_selection_is_charged_and_said(entry: Entry) -> None:
    event = to_json(
        best_of(PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=2.0), expected_runs=4)
    )
    selected = forged(entry, arguments=None, words="by selection", event=event, epsilon=certified(event) + 1e-4)
    assert check(forged(selected, chosen="private selection")).faults == []
    (found,) = check(selected).faults
    assert "is charged in its event" in found


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("compare",), "those of fedsim train"),
        (("train", "--callbacks", "evil:Callback"), "module:class"),
        (("train", "--plan.mechanism=evil:Mechanism"), "module:class"),
        (("train", "--output", "/tmp/elsewhere"), "options of a row alone"),
        (("train", "--data.sequence-length", "32"), "options of a row alone"),
        (("train", "--plan.delta", "0.002"), r"it must be δ = 0\.001"),
        (("train", "--plan.rouns", "3"), "Did you mean --plan.rounds"),
    ],
)
def test_arguments_are_those_of_a_row_alone(arguments: tuple[str, ...], fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault):
        config_of(arguments, TASK)


def test_arguments_survive_the_way_there_and_back() -> None:
    task = tasks.TASKS["docstrings"]
    given = (
        *("train", "--model.lora-rank", "4", "--model.lora-targets", "c_attn", "c_proj", "--model.use-rslora"),
        *("--plan.algorithm", "els", "--plan.epsilon", "2.0"),
    )
    found = arguments_of(config_of(given, task), task)
    assert set(given) <= set(found)
    assert config_of(found, task) == config_of(given, task)


def test_a_run_of_something_else_does_not_enter(run: Path, files: Files, tmp_path: Path) -> None:
    written = json.loads((run / "config.json").read_text(encoding="utf-8"))
    said = json.loads((run / "privacy.json").read_text(encoding="utf-8"))
    (tmp_path / "model").symlink_to(run / "model")

    def refused(match: str, config: dict[str, Any] | None = None, **statement: Any) -> None:
        changed = {"config": {**written["config"], **(config or {})}, "identity": written["identity"]}
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        (tmp_path / "privacy.json").write_text(json.dumps(said | statement), encoding="utf-8")
        with pytest.raises(InvalidInput, match=match):
            entry_of([tmp_path], WHO)

    refused(r"data\.sequence-length is 8; it must be 16, as in the task tiny", {"data.sequence-length": 8})
    refused(r"data\.split-seed is 3", {"data.split-seed": 3})
    refused(r"plan\.delta is 0\.01", delta=0.01)
    refused("a run with a guarantee", private=False)
    refused("off for an entry", {"evaluation.private": True})
    refused("a run whose seeds were given", {"noise-seed": ""})
    lines = Path(str(files.data)).read_text(encoding="utf-8").splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]), encoding="utf-8")
    refused("text of the content", {"data.path": str(tmp_path / "fewer.jsonl")})
    public = ["Another text that somebody else pre-trained on."]
    other = small_model_folder(replace(SHAPE, steps=1), texts=lambda: public, cache=tmp_path, progress=False)
    refused(r"data is|model is", {"model.path": str(other)})


def test_what_something_else_trained_enters_in_words_alone(run: Path, files: Files, tmp_path: Path) -> None:
    event = tmp_path / "event.json"
    event.write_text(json.dumps(to_json(Repeated(event=Gaussian(noise_multiplier=4.0), count=4))), encoding="utf-8")
    said = replace(WHO, words="by hand", event=event, files=files, title="Rival")
    rival = entry_of([run / "model"], said)
    assert rival.arguments is None
    assert check(rival).faults == []
    with pytest.raises(InvalidInput, match="an https:// address"):
        entry_of([run / "model"], replace(said, link=""))
    with pytest.raises(InvalidInput, match="It was made so: by hand"):
        list(reproduce(rival, files, 1))


def test_rows_stand_by_tier_the_least_loss_first(entry: Entry) -> None:
    stronger = with_noise(entry.event, 4.0)
    rows = {
        "worse": forged(entry, title="Worse", runs=(Run(loss=5.5, sampling_seed=1, noise_seed=2),)),
        "two": forged(
            entry,
            title="Two seeds",
            runs=(Run(loss=5.2, sampling_seed=1, noise_seed=2), Run(loss=5.4, sampling_seed=3, noise_seed=4)),
        ),
        "words": forged(
            entry,
            title="Stronger",
            arguments=None,
            words="by hand",
            event=stronger,
            epsilon=certified(stronger),
            runs=(Run(loss=5.9, sampling_seed=None, noise_seed=None),),
        ),
    }
    text = tables({Path(f"{name}.json"): row for name, row in rows.items()}).split("### tiny")[1]
    places = [text.index(found) for found in ("[Stronger]", "ε ≤ 8:", "[Two seeds]", "[Worse]")]
    assert places == sorted(places)
    (line,) = [line for line in text.splitlines() if "[Two seeds]" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["5.3000", "1.2706", "2"]  # t(0.975, 1) · 0.1, 12.706 · 0.1
    assert cells[-2:] == ["yes", "[two](leaderboard/two.json)"]
    assert "no: by hand" in text


def test_an_entry_is_run_again_and_a_loss_that_differs_is_told(
    entry: Entry, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproducing, "_train", lambda arguments: main(arguments))
    arguments = ["--data", str(files.data), "--model", str(files.model)]
    assert command.main(["reproduce", str(keep(entry, tmp_path)), *arguments]) == 0
    assert f"reproduced: loss {entry.loss:.6f}, entered {entry.loss:.6f}" in capsys.readouterr().out
    better = replace(entry, title="Better", runs=(replace(entry.runs[0], loss=entry.loss - 0.01),))
    assert command.main(["reproduce", str(keep(better, tmp_path)), *arguments]) == 1
    assert "not reproduced: the loss is" in capsys.readouterr().out


def test_other_versions_may_differ_by_more_and_epsilon_by_no_more(entry: Entry) -> None:
    run = entry.runs[0]
    same = reproducing.Outcome(loss=run.loss + 0.01, epsilon=entry.epsilon, differences=())
    assert len(faults(entry, run, same)) == 1
    assert faults(entry, run, replace(same, differences=("torch 1, not 2",))) == []
    assert "ε is" in faults(entry, run, replace(same, loss=run.loss, epsilon=entry.epsilon * 1.01))[0]


def test_a_file_that_is_no_entry_is_refused_by_the_field(entry: Entry, tmp_path: Path) -> None:
    values = json.loads(entry.to_json())
    path = tmp_path / "entry.json"
    for change, match in (
        ({"epsilon": "8"}, "entry.json: epsilon"),
        ({"format": 2}, "format 1"),
        ({"more": 1}, "and no others"),
        ({"arguments": ["train", 3]}, "entry.json: arguments"),
        ({"title": "a | b"}, "title is"),
        ({"link": "javascript:x"}, "link is"),
        ({"chosen": "on the test users"}, "must be charged"),
        ({"runs": []}, "at least one training"),
        ({"runs": [{"loss": float("nan"), "sampling_seed": 1, "noise_seed": 2}]}, "finite and above 0"),
    ):
        path.write_text(json.dumps(values | change), encoding="utf-8")
        with pytest.raises(InvalidInput, match=match):
            read_entry(path)


def test_content_is_of_users_and_tokens_and_not_of_a_place(files: Files, tmp_path: Path) -> None:
    text = Path(str(files.data)).read_text(encoding="utf-8")

    def content(text: str, name: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        config = TASK.config(replace(files, data=str(tmp_path / name)))
        return content_of(open_resources(config).store)

    assert content(text, "moved.jsonl") == TASK.figures.content
    assert content(text.replace("lazy", "busy", 1), "changed.jsonl") != TASK.figures.content


def test_a_page_without_the_marks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.md").write_text("no marks\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="a page with the lines"):
        between_marks(tmp_path / "page.md", BEGIN, END)
    assert command.main(["nothing"]) == 2
    assert command.main(["check", str(tmp_path / "page.md")]) == 2
    assert "a file of JSON" in capsys.readouterr().err


def test_the_kept_entries_stand_and_the_page_shows_them() -> None:
    entries = {path: read_entry(path) for path in sorted(FOLDER.glob("*.json"))}
    assert len(entries) >= 3
    for path, entry in entries.items():
        assert check(entry).faults == [], path.name
    shown = tables(entries).split("\n\n### tiny")[0]
    assert between_marks(FOLDER.parent / "leaderboard.md", BEGIN, END) == shown


def test_the_table_is_of_entries_that_stand(entry: Entry, tmp_path: Path) -> None:
    path = keep(forged(entry, epsilon=7.0), tmp_path)
    with pytest.raises(Failure, match="certifies no less than"):
        command._standing([path])
