"""Pages as a browser reads them: what stands where, what is left out, and what a full disk makes of them."""

import errno
import html
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from small_flags import LOCAL, SMALL

from experiments.report import page as pages
from experiments.report.arms.guarantee import NOT_COVERED, guarantee
from experiments.report.run import write_report
from experiments.run import main
from fedsim.errors import Failure

OLD = Path(__file__).parent / "runs_of_version_0_1"
RUNS = ["uls-quantile", "els-matrix", "uls-laplace", "compare/uls", "compare/els"]
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Headings in order with the words below each, items of lists by the list's class, and what is badly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[tuple[int, str]] = []
        self.words: dict[str, str] = {}
        self.items: dict[str, list[str]] = {}
        self.figures = 0
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in VOID:
            return
        self._open.append((tag, given.get("class") or ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag == "li":
            self.items.setdefault(self._open[-2][1], []).append("")
        self.figures += tag == "svg"
        if tag == "svg":
            assert given["role"] == "img"
            assert given["aria-label"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "style" in tags or "svg" in tags:
            return
        if tags and re.fullmatch("h[1-6]", tags[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data
        elif tags and tags[-1] == "li":
            self.items[self._open[-2][1]][-1] += data
        sections = [text for level, text in self.headings if level <= 2]
        if sections:
            self.words[sections[-1]] = self.words.get(sections[-1], "") + data

    @property
    def sections(self) -> list[str]:
        return [text for level, text in self.headings if level == 2]


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Old runs that may be written to."""
    return Path(shutil.copytree(OLD, tmp_path / "runs"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--plan.algorithm", "uls", "--plan.epsilon", "8", "--plan.rounds", "4", "--evaluation.every", "2"]
    assert main(["train", *SMALL, *LOCAL, *arguments, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "run"
    flags = [flag for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if "seed" not in pair[0] for flag in pair]
    arguments = ["--plan.algorithm", "uls", "--plan.epsilon", "8", "--plan.rounds", "2", "--release"]
    secure = ["--noise.secure", "--engine.exact"]
    assert main(["train", *flags, *LOCAL, *arguments, *secure, "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("run", [*RUNS, "compare"])
def test_a_page_has_its_sections_in_order_and_a_table_under_each_figure(runs: Path, run: str) -> None:
    write_report(runs / run)
    page = read(runs / run)
    assert page.sections[:3] == ["At a glance", "Outcome", "Training"]
    assert page.sections[-1] == "Settings"
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert levels.count(1) == 1
    text = (runs / run / "report.html").read_text(encoding="utf-8")
    assert page.figures == text.count("<figure>") == text.count("<summary>its numbers</summary>") == 3
    for svg in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    for told in ("δ", "ε at most (certified)", "ε at least", "data", "model", "treated as public", "learning rate"):
        assert told in page.words["At a glance"]


@pytest.mark.parametrize("run", RUNS)
def test_the_guarantee_is_the_statements_own_words_as_a_list(runs: Path, run: str) -> None:
    write_report(runs / run)
    page, statement = read(runs / run), json.loads((runs / run / "privacy.json").read_text(encoding="utf-8"))
    assert page.items["not-covered"] == statement["not_covered"]
    items = page.items["guarantee"]
    assert " ".join(items) == statement["in_words"].partition(NOT_COVERED)[0].strip()
    assert len(items) >= 6
    mechanism = statement["mechanism"]
    assert any(item.startswith(mechanism) for item in items)
    assert f"{statement['algorithm'].upper()}: {statement['sampling']['in_words']};" in items


def test_a_statement_of_another_form_is_cut_into_sentences() -> None:
    words = "This run gives NO privacy guarantee: ε is infinite. Do not release them."
    statement = {"in_words": words, "sampling": {"in_words": "not to be found"}, "mechanism": "none"}
    assert guarantee(statement) == ["This run gives NO privacy guarantee: ε is infinite.", "Do not release them."]


def test_what_is_computed_from_private_users_stands_under_its_heading_alone(trained: Path) -> None:
    page = read(trained)
    seconds = json.loads((trained / "summary.json").read_text())["training_seconds"]
    marks = ["train loss", "clipped fraction 1", f"{seconds:,.1f} seconds", "Where the time of a round went"]
    for mark in marks:
        assert mark in page.words["Not private"]
        assert not any(mark in words for name, words in page.words.items() if name != "Not private")


def test_a_release_has_no_private_facts(released: Path) -> None:
    page = read(released)
    assert "Not private" not in page.sections
    text = "".join(words for name, words in page.words.items() if name not in ("Settings", "What is guaranteed"))
    for mark in ("train loss", "clipped fraction", "seconds", "Where the time", "not private"):
        assert mark not in text


def test_the_planners_word_is_not_private_where_it_read_users_sizes(runs: Path) -> None:
    write_report(runs / "compare")
    prediction = json.loads((runs / "compare/prediction.json").read_text(encoding="utf-8"))
    page = read(runs / "compare")
    assert bool(prediction["private_statistics"])
    assert prediction["in_words"][0] in page.words["Not private"]
    assert not any(prediction["in_words"][0] in words for name, words in page.words.items() if name != "Not private")


def test_of_an_unfinished_run_the_page_tells_how_far_it_is(runs: Path) -> None:
    folder = runs / "uls-quantile"
    for name in ("summary.json", "privacy.json"):
        (folder / name).unlink()
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(metrics[:2]) + "\n" + metrics[2][:20])
    write_report(folder)
    page = read(folder)
    text = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert "The run is not finished: 2 of 4 rounds are told of, for which ε = 6.002 is spent at most" in text
    assert "What is guaranteed" not in page.sections
    assert page.figures == 3
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    assert read(folder).figures == 0


def test_of_a_comparison_whose_second_arm_is_unfinished_both_are_shown(runs: Path) -> None:
    (runs / "compare/els/summary.json").unlink()
    (runs / "compare/els/privacy.json").unlink()
    write_report(runs / "compare")
    text = html.unescape((runs / "compare/report.html").read_text(encoding="utf-8"))
    assert "ELS: The run is not finished: 4 of 4 rounds" in text
    assert "ULS: guarantee" in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "a folder with a run in it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_where_the_disk_is_full_the_run_is_said_to_be_complete(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs / "uls-quantile"
    (folder / "report.html").write_text("the old one")
    real = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if "report.html" in path.name:
            real(path, text[:10], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["report", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "the run itself is complete" in said
    assert f"python -m experiments.run report {folder}" in said
    assert (folder / "report.html").read_text() == "the old one"
    assert not list(folder.glob("*.partial"))


def test_a_refusal_of_something_else_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no disk"), pages.written_later(tmp_path, "the run itself", "again"):
        raise ValueError("no disk")
    with (
        pytest.raises(Failure, match="but the run itself is complete"),
        pages.written_later(tmp_path, "the run itself", ""),
    ):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_samples_of_text_before_and_after_are_shown_and_kept(trained: Path) -> None:
    assert main(["report", str(trained), "--samples", "--prompt", "Return <b>", "The"]) == 0
    samples = json.loads((trained / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert [one["prompt"] for one in samples] == ["Return <b>", "The"]
    assert all(one["before"] and one["after"] for one in samples)
    assert any(one["before"] != one["after"] for one in samples)
    page = read(trained)
    assert samples[1]["after"] in page.words["Text before and after"]
    assert main(["report", str(trained)]) == 0
    assert "Text before and after" in read(trained).sections


def test_samples_that_cannot_be_had_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "uls-laplace"), "--samples"]) == 2
    assert "a finished run with its model" in capsys.readouterr().err
    assert main(["report", str(runs / "uls-laplace"), "--prompt", "x"]) == 2
    assert "Add --samples" in capsys.readouterr().err
