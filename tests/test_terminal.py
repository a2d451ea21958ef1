"""The one voice on the terminal: bars, lines and warnings, without one tearing another."""

import ast
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fedsim import terminal
from fedsim.terminal import RoundProgress, shown, speak, waiting


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal shows that somebody watches."""
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "CONSOLE", Console(file=stream, force_terminal=True, width=100))
    return stream


@pytest.fixture
def speaking() -> Iterator[None]:
    speak()
    yield
    for name in terminal.SPEAKERS:
        logging.getLogger(name).removeHandler(terminal.VOICE)


def lines_of(stream: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").split("\n")


def test_a_warning_while_a_bar_is_drawn_leaves_both_whole(watched: io.StringIO, speaking: None) -> None:
    sentence = "[batch] takes the reference path: " + "a long reason " * 12 + "ends here"
    with RoundProgress("ULS", 4) as progress:
        progress.advanced(1, 0.5)
        logging.getLogger("fedsim.gradients.sums").warning(sentence)
        progress.advanced(2, 0.75)
        progress.stopped(2, 1.0)
    lines = [line.rstrip() for line in lines_of(watched)]
    assert f"warning: {sentence}" in lines
    assert "ULS stopped after 2 of 4 rounds: another would exceed ε = 1." in lines
    assert re.fullmatch(r"ULS [━╸╺]+ 2/4 ε 0.75 .*", lines[-2])
    assert all(line.startswith(("warning: ", "ULS ", "ULS stopped")) for line in lines if line)


@pytest.mark.parametrize("width", [50, 80, 160])
def test_a_bar_fits_its_window_below_the_lines_of_evaluations(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "CONSOLE", Console(file=stream, force_terminal=True, width=width))
    with RoundProgress("ULS", 2000, loss=5.25) as progress:
        progress.advanced(10, 1.5)
        progress.evaluated(20, 4.75, 0.25, 2.5)
    lines = [line.rstrip() for line in lines_of(stream) if line.strip()]
    bars = [line for line in lines if re.match(r"ULS [━╸╺ ]{3,}", line)]
    assert bars
    assert all(len(line) <= width for line in bars)
    assert "loss 5.250" in bars[0]
    assert re.search(r" 20/2000 loss 4\.750 ε 2\.50 ", bars[-1])
    assert "ULS round 20/2000: held-out loss 4.7500, accuracy 0.2500, ε spent 2.500" in lines


def test_bars_within_bars(watched: io.StringIO) -> None:
    with shown() as outer, waiting("Waiting"):
        outer("Reading", 1, 2)
        with shown() as inner:
            inner("Training", 2, 2)
    text = "\n".join(lines_of(watched))
    assert re.search(r"Reading .*50%", text)
    assert re.search(r"Training .*100%", text)


def test_plain_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str], speaking: None) -> None:
    with waiting("Starting [2] workers"), RoundProgress("ELS", 3) as progress, shown() as report:
        progress.evaluated(1, 2.5, 0.25, 0.125)
        for done in range(3):
            report("Reading", done, 2)
    with shown(False) as report:
        report("Unheard", 1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Starting [2] workers",
        "ELS round 1/3: held-out loss 2.5000, accuracy 0.2500, ε spent 0.125",
        "Reading 0%",
        "Reading 100%",
    ]


def test_warnings_of_this_house_are_said_once_and_others_not(
    capsys: pytest.CaptureFixture[str], speaking: None
) -> None:
    speak()
    logging.getLogger("fedsim.models.load").warning("%d weights are new", 2)
    logging.getLogger("server.rounds").error("no worker is left")
    logging.getLogger("experiments.train").info("not worth a line")
    logging.getLogger("somebody.else").error("not ours")
    assert capsys.readouterr().err.splitlines() == ["warning: 2 weights are new", "error: no worker is left"]


def test_nothing_else_in_the_library_prints() -> None:
    library = Path(terminal.__file__).parent
    # docstring_reader is a script whose standard output is its answer.
    allowed = {"terminal.py", "docstring_reader.py"}
    printing = {
        file.name
        for file in library.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing <= allowed
