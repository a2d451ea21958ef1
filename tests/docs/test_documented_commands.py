"""Every block of README and docs runs and prints what the page shows, or says what it needs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from page_blocks import ROOT, Block, blocks, pages
from page_runs import READERS, Reader, first_missing
from warm_python import warm_python

from fedsim.models.config import SmallModelConfig

MINUTES = float(os.environ.get("FEDSIM_DOCS_MINUTES", "0"))
"""How many minutes a block may need and still be run here."""
SMALL_RUN = [
    "train", "--data.packages", "numpy", "--data.sequence-length", "32", "--model.small.layers", "2",
    "--model.small.width", "64", "--model.small.heads", "2", "--model.small.vocabulary-size", "1024",
    "--model.small.steps", "60", "--plan.delta", "1e-3", "--plan.gradients-per-round", "64", "--plan.rounds", "2",
    "--evaluation.max-rows", "100", "--evaluation.test-rows", "200", "--engine.kind", "local", "--engine.workers", "1",
]  # fmt: skip


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_here(page: Path) -> list[Block]:
    """What of a page this test runs; what is shown below a block goes with it."""
    chosen: list[Block] = []
    above_runs = False
    for block in blocks(page):
        runs = block.minutes <= MINUTES and (block.language != "text" or above_runs or bool(block.marks))
        above_runs = runs if block.language != "text" else above_runs
        if runs:
            chosen.append(block)
    return chosen


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_block_can_be_run_or_says_what_it_needs(page: Path) -> None:
    faults = [fault for block in blocks(page) for fault in block.faults()]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_command_stands_in_a_block(page: Path) -> None:
    """A command in indented code, or in a fence that is not closed, would be seen by nobody."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), "a fence is open"
    outside = re.sub(r"^( *)```.*?^\1```$", "", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL), flags=re.M | re.S)
    assert not re.findall(r"^ {4,}(?:\w+=\S+ )*(?:python|fedsim|make|ray|flwr|pip) .*$", outside, re.MULTILINE)


@pytest.fixture(scope="module")
def warm() -> Iterator[list[str]]:
    """What stands behind Python's name where a command of fedsim is to be run."""
    with warm_python(READERS) as words:
        yield words


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm: list[str]) -> Callable[[], Path]:
    """A small finished run, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("finished") / "run"

    def train() -> Path:
        if not folder.exists():
            command = [sys.executable, *warm, "-m", "experiments.run", *SMALL_RUN, "--output", str(folder)]
            subprocess.run(command, cwd=folder.parent, env=READERS, check=True)
        return folder

    return train


@pytest.fixture
def reader(
    tmp_path: Path, warm: list[str], finished: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    folder = tmp_path / "page"
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    # Blocks in Python are run in this process, where no page promises that the default model writes well.
    monkeypatch.setitem(SmallModelConfig.__init__.__kwdefaults__, "steps", 3)
    yield Reader(folder=folder, warm=warm, finished=finished)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("page", [page for page in pages() if run_here(page)], ids=name)
def test_blocks_run_and_print_what_the_page_shows(page: Path, reader: Reader) -> None:
    for block in run_here(page):
        reader.try_out(block)


@pytest.mark.parametrize("command", [line for page in pages() for line in re.findall(r"^make .*", "\n".join(
    block.text for block in blocks(page) if block.in_clone), re.MULTILINE)])  # fmt: skip
def test_make_has_the_targets_that_pages_name(command: str) -> None:
    dry = subprocess.run(
        ["bash", "-c", command.replace("make ", "make --dry-run ", 1)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr


def written(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nfalse\n```\n",
        "```bash\necho one | grep two | cat\n```\n",
        "```console\n$ echo 3.692\n3.69\n$ echo 3.692\n3.68\n```\n",
        "```console\n$ echo one; echo two\ntwo\none\n```\n",
        "```bash\necho one\n```\n\n```text\ntwo\n```\n",
        "<!-- varies -->\n```console\n$ echo loss 1\ngain 2\n```\n",
        "<!-- exit: 1 -->\n```bash\ntrue\n```\n",
        "```python\n1 / 3  # → 0.34\n```\n",
        "```python\nprint(unknown)\n```\n",
    ],
)
def test_a_page_that_is_wrong_fails(text: str, tmp_path: Path, reader: Reader) -> None:
    *first, last = blocks(written(tmp_path, text))
    for block in first:
        reader.try_out(block)
    with pytest.raises((AssertionError, NameError)):
        reader.try_out(last)


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ echo 3.692\n3.69\n$ X=two\n$ echo one $X\none …\n```\n",
        "```bash\necho one   two\n```\n\n```text\none two\n```\n",
        "<!-- given: y = 3 -->\n```python\nx = y / 7\nx  # → 0.4286\nprint('a', x)  # → a …\n```\n",
        "<!-- varies -->\n```console\n$ echo loss 5.1\nloss 7\n```\n",
        "<!-- exit: 3 -->\n<!-- given: touch there -->\n```bash\nls there\nexit 3\n```\n",
    ],
)
def test_a_page_that_is_right_passes(text: str, tmp_path: Path, reader: Reader) -> None:
    for block in blocks(written(tmp_path, text)):
        reader.try_out(block)


@pytest.mark.parametrize(
    "text", ["```\nls\n```\n", "<!-- needs: luck -->\n```bash\nls\n```\n", "<!-- nedes: a GPU -->\n```bash\nls\n```\n",
             "<!-- run by: tests/test_plan.py -->\n```bash\nls\n```\n"]
)  # fmt: skip
def test_a_block_that_nobody_can_place_is_refused(text: str, tmp_path: Path) -> None:
    assert [fault for block in blocks(written(tmp_path, text)) for fault in block.faults()]


def test_shown_numbers_count_as_far_as_they_are_shown() -> None:
    assert first_missing(["3.692"], "3.6921", varies=False) is None
    assert first_missing(["3.692"], "3.6926", varies=False) == "3.692"
    assert first_missing(["12 users"], "13 users", varies=False) == "12 users"
