"""What the end of a benchmark says to a shell."""

import sys
from dataclasses import dataclass

import pytest

from benchmarks.command_line import run_benchmark
from fedsim.errors import Failure, InvalidInput


@dataclass(frozen=True)
class Benchmark:
    """Ends as it is told to."""

    end: str
    size: int = 3

    def run(self) -> object:
        if self.end == "input":
            raise InvalidInput("size", self.size, "an even number")
        if self.end == "failure":
            raise Failure("the disk is full")
        return {"rows": self.size} if self.end == "rows" else int(self.end)


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("0", 0, ""),
        ("1", 1, ""),
        ("rows", 0, ""),
        ("failure", 1, "failed: the disk is full\n"),
        ("input", 2, "error: size is 5; it must be an even number.\n"),
    ],
)
@pytest.mark.parametrize("positional", [True, False])
def test_a_benchmark_ends_with_a_sentence_and_its_exit_code(
    end: str,
    code: int,
    said: str,
    positional: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *([end] if positional else ["--end", end]), "--size", "5"])
    assert run_benchmark(Benchmark, positional=positional) == code
    assert capsys.readouterr().err == said
