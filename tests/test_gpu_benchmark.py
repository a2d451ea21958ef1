"""The GPU benchmark on a CPU at tiny sizes: its cells, its lines, what it goes on with, and the page of it all."""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import cell, checks, ways
from benchmarks.gpu.cells import CELLS, size_of
from benchmarks.gpu.checks import clip_checks
from benchmarks.gpu.findings import Findings, endings, read_lines
from benchmarks.gpu.measure import Way, measure
from benchmarks.gpu.page import write_page
from benchmarks.gradient_models import Size

CPU = torch.device("cpu")
WAYS = [
    "ours", "non-private", "non-private, fused loss", "ours, not compiled", "loop", "opacus per-sample",
    "opacus ghost", "ours, size chosen",
]  # fmt: skip
Lines = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def settings_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells make their own; they end with the test."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Cells run in this process, which has imported all they need; the names of those that ran.

    They collect garbage between measurements. What there was before is exempt: in this process that is so much that
    each time would take longer than a cell's steps do.
    """
    ran: list[str] = []

    def in_this_process(command: list[str], path: Path, seconds: float) -> int:
        ran.append(command[3])
        gc.freeze()
        with path.open("a") as file, contextlib.redirect_stdout(file), monkeypatch.context() as patched:
            patched.setattr(sys, "argv", command[2:])
            cell.main()
        return 0

    monkeypatch.setattr(benchmark, "run_process", in_this_process)
    yield ran
    gc.unfreeze()


def run(arguments: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """The benchmark on a CPU at tiny sizes: the lines it leaves."""
    words = ["gpu", "--device", "cpu", "--tiny", "--out", str(out), *arguments.split()]
    monkeypatch.setattr(sys, "argv", words)
    benchmark.main()
    return read_lines(out / "lines.jsonl")


def findings(seconds: float = 1e9, known: Lines | None = None) -> Findings:
    return Findings("350m", "CPU", seconds, known or [])


def said(capsys: pytest.CaptureFixture[str]) -> Lines:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_each_cell_finds_is_kept_and_shown_and_none_fails_the_whole(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell breaks, another needs what is not there, one way too: the page has the others, and the reasons."""
    find_spec, of = cell.find_spec, cell.size_of
    absent = ("ray", "opacus")
    monkeypatch.setattr(cell, "find_spec", lambda name: None if name in absent else find_spec(name))
    monkeypatch.setattr(ways, "find_opacus", lambda install: False)

    def broken(asked: Any, tiny: bool) -> tuple[str, Size]:
        if asked is CELLS["7b-lora"]:
            raise RuntimeError("the driver is gone\nand more")
        return of(asked, tiny)

    monkeypatch.setattr(cell, "size_of", broken)
    cells = "ceilings,rounds-350m,1.1b-lora,7b-lora,rounds-350m-ray,350m-checkpointing"
    lines = run(f"--cells {cells} --cases 4x1,ragged-4x1", tmp_path, monkeypatch)
    assert here == cells.split(",")
    ended = {name: line["ended"] for name, line in endings(lines).items()}
    assert ended == dict.fromkeys(here, "finished") | {"7b-lora": "failed", "rounds-350m-ray": "skipped"}
    for name in ("1.1b-lora", "350m-checkpointing"):
        own = [line for line in lines if line["cell"] == name]
        for case in ("4x1", "ragged-4x1"):
            told = [line for line in own if line.get("case") == case and "way" in line]
            assert list(dict.fromkeys(line["way"] for line in told)) == WAYS
            assert all(line["milliseconds"] > 0 for line in told if "left_out" not in line)
            assert {line["way"] for line in told if "left_out" in line} == {"opacus per-sample", "opacus ghost"}
    (rounds,) = (line for line in lines if line["cell"] == "rounds-350m" and "rounds" in line)
    assert {"load", "compute", "transport", "noise", "optimizer"} <= set(rounds["seconds"])
    page = (tmp_path / "README.md").read_text()
    assert "## 7b-lora" in page
    assert "It is not complete (failed): RuntimeError: the driver is gone." in page
    assert "It is not complete (skipped): ray is not installed here; --packages names a folder with it." in page
    assert "Left out, opacus is not installed here; --packages names a folder with it: 4x1 opacus per-sample" in page
    assert "Not begun: clips, 350m, 124m, 350m-128k, 350m-long, slices-350m." in page
    assert "| 4x1 | loop | – | 5 |" in page
    assert "| direct | " in page
    for name in here:
        assert CELLS[name].meaning[:60] in page.replace("\n", " ")
    assert (tmp_path / "times.png").stat().st_size > 10_000


def test_a_later_run_does_what_is_missing(here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that ended well are left out, and so are parts of others that are complete on a device of this name."""
    known: Lines = [
        {"cell": "rounds-350m", "ended": "finished", "seconds": 1},
        {"cell": "124m", "started": True, "device": "CPU", "torch": "2"},
        {"cell": "124m", "complete": "4x1 nearest"},
        {"cell": "124m", "complete": "4x1 rivals"},
        {"cell": "124m", "ended": "out of time", "why": "it was stopped", "seconds": 1},
        {"cell": "350m", "started": True, "device": "another", "torch": "2"},
        {"cell": "350m", "complete": "4x1 further"},
        {"cell": "ceilings", "ended": "skipped", "why": "torch is not installed here", "seconds": 1},
    ]
    before = tmp_path / "before.jsonl"
    before.write_text("".join(json.dumps(line) + "\n" for line in known) + '{"cell": "cut off in the mid')
    monkeypatch.setattr(ways, "TURNS", {"nearest": ways.nearest, "further": ways.further})
    arguments = "--cells rounds-350m,ceilings,350m,124m --cases 4x1"
    lines = run(f"{arguments} --resume {before}", tmp_path, monkeypatch)
    assert lines[: len(known)] == known
    assert here == ["ceilings", "350m", "124m"]
    new = lines[len(known) :]
    assert [line["complete"] for line in new if line["cell"] == "350m" and "complete" in line] == [
        "4x1 nearest", "4x1 further",
    ]  # fmt: skip
    assert [line["complete"] for line in new if line["cell"] == "124m" and "complete" in line] == ["4x1 further"]
    assert {line["ended"] for line in endings(lines).values()} == {"finished"}
    again = tmp_path / "lines.jsonl"
    here.clear()
    assert run(f"{arguments} --resume {again}", tmp_path, monkeypatch) == lines
    assert here == []


def test_what_a_cell_leaves_of_its_share_goes_to_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, shares = [0.0], {}

    def cell_of_ten_seconds(name: str, options: Any, share: float, left: float, path: Path) -> None:
        shares[name] = share, left
        now[0] += 10

    monkeypatch.setattr(benchmark, "run_cell", cell_of_ten_seconds)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run("--minutes 1.1 --cells ceilings,350m,124m,clips,7b-lora,1.1b-lora,slices-350m", tmp_path, monkeypatch)
    weights = {name: CELLS[name].share for name in ("ceilings", "350m", "124m", "clips", "7b-lora", "1.1b-lora")}
    whole = sum(weights.values()) + CELLS["slices-350m"].share
    assert shares["ceilings"] == (max(10, 66 * weights["ceilings"] / whole), 66)
    assert shares["350m"] == (pytest.approx(56 * weights["350m"] / (whole - weights["ceilings"])), 56)
    assert list(shares) == [*list(weights)]  # then too little is left
    assert shares["1.1b-lora"][1] == 16


def test_a_cell_ends_by_itself_when_its_share_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    """What was not begun is told, and no part of it counts as complete."""
    setting = ways.Setting(size_of(CELLS["1.1b-lora"], True)[1], CPU, compiling=False)
    over = findings(0)
    ways.steps(setting, over, "", "", None)
    assert over.cut
    assert said(capsys) == []
    assert measure([Way("a", 1, lambda: None)], CPU, over, case="4x4") == []
    (line,) = said(capsys)
    assert line == {"cell": "350m", "case": "4x4", "way": "a", "micro_batch": 1, "left_out": "no time was left"}
    over.complete("4x4 nearest")
    assert said(capsys) == []


def test_a_process_that_dies_or_lasts_too_long_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    assert benchmark.run_process([sys.executable, "-c", child], path, 1.0) is None
    pid = int(path.read_text())
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)
    assert benchmark.run_process([sys.executable, "-c", "raise SystemExit(7)"], path, 60) == 7
    for code, ended, why in (
        (None, "out of time", "it was stopped"),
        (-9, "failed", "its process ended with code -9"),
    ):
        monkeypatch.setattr(benchmark, "run_process", lambda *_, code=code: code)
        lines = run("--cells clips", tmp_path, monkeypatch)
        assert (lines[-1]["ended"], lines[-1]["why"]) == (ended, why)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_some_ways_alone_leave_the_others_to_a_later_run(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run("--cells 350m --cases 4x1 --ways non-private", tmp_path, monkeypatch)
    assert endings(lines)["350m"]["ended"] == "in part"
    assert not any("complete" in line for line in lines)
    assert {line["way"] for line in lines if "way" in line} == {"non-private"}


def test_a_cell_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run("--cells ceilings", tmp_path, monkeypatch)
    assert [line["cell"] for line in lines] == ["ceilings"] * 3
    assert (lines[0]["device"], lines[-1]["ended"]) == ("CPU", "finished")
    assert lines[1].keys() == {"cell", "copy_gb_per_second", "bfloat16_tflops", "product_size"}


def test_a_name_that_no_cell_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run("--cells ceilings,350", tmp_path, monkeypatch)


def test_no_clip_check_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape, smaller and its gradients formed in the same ways, in float32 and in bfloat16.

    What is known is told on the way.
    """
    halves = tuple(
        replace(size, width=size.width // 2, length=size.length // 2, vocabulary=size.vocabulary // 4)
        for size in checks.SHAPES
    )
    monkeypatch.setattr(checks, "SHAPES", halves)
    monkeypatch.setattr(checks, "TOLD_EVERY", 3)
    checks.clips(CPU, findings(), 8)
    *before, line = said(capsys)
    assert [told["checks"] for told in before] == [3, 6]
    assert line["checks"] == 8
    assert line["number_failed"] == 0
    assert line["failed"] == []
    assert 1 - 2**-7 < line["largest_reach"] <= 1
    assert 0 < line["largest_float32_error"] < 1e-5
    assert line["against_float64"] == 3  # of the four in float32, all but the one whose base is bfloat16


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_copies", {"reach": 1 + 1e-7}),
        ("_copies", {"reach": 0.9}),
        ("_copies", {"reach": float("nan")}),
        ("_against_float64", 1e-4),
        ("_against_float64", float("nan")),
    ],
)
def test_a_clip_that_does_not_hold_is_found(name: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SHAPES", checks.SHAPES[:1])
    monkeypatch.setattr(checks, "_copies", lambda *a: {"reach": 0.999})
    monkeypatch.setattr(checks, "_against_float64", lambda *a: 1e-7)
    assert [line["held"] for line in clip_checks(CPU, 1)] == [True]
    monkeypatch.setattr(checks, name, lambda *a: wrong)
    assert [line["held"] for line in clip_checks(CPU, 1)] == [False]


def test_a_way_that_fails_is_told_of_and_the_quickest_size_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def slow() -> None:
        torch.randn(400, 400) @ torch.randn(400, 400)

    def too_large() -> None:
        raise torch.OutOfMemoryError

    def broken() -> None:
        raise ValueError("no such layer\nat all")

    def nothing() -> None:
        pass

    tried = [
        Way("a", 1, too_large),
        Way("a", 2, slow),
        Way("a", 3, nothing),
        Way("b", 1, too_large),
        Way("c", 1, broken),
    ]
    (best,) = measure(tried, CPU, findings(), case="4x4")
    assert (best.name, best.tokens, len(best.seconds)) == ("a", 3, 5)
    lines = {(line["way"], line["micro_batch"]): line for line in said(capsys)}
    assert lines["a", 1]["left_out"] == lines["b", 1]["left_out"] == "out of memory"
    assert lines["c", 1]["left_out"] == "ValueError: no such layer"
    assert (lines["a", 2]["steps"], lines["a", 3]["steps"]) == (1, 5)


SLICES = {"cell": "slices-350m", "slice_way": "not compiled", "micro_batch": 8}


def way(name: str, micro_batch: int, milliseconds: float, steps: int) -> dict[str, Any]:
    return {
        "cell": "350m", "case": "64x4", "way": name, "tokens": 1000, "micro_batch": micro_batch, "steps": steps,
        "milliseconds": milliseconds, "spread": 0.0, "peak_mib": 10,
    }  # fmt: skip


def test_the_page_shows_what_was_measured_in_turns_and_what_was_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single step stands only where nothing better is known, and a later line replaces an earlier one."""
    failed = {"cell": "350m", "case": "64x4", "way": "ours", "micro_batch": 20, "left_out": "out of memory"}
    lines = [
        {"cell": "350m", "started": True, "device": "GPU", "torch": "2"},
        failed,
        way("ours", 10, 55.0, 1),
        way("ours", 10, 60.0, 5),
        way("ours", 20, 58.0, 1),
        way("non-private", 10, 40.0, 5),
        way("loop", 0, 400.0, 1),
        {"cell": "350m", "case": "64x4", "kernels_of": "ours", "kernels": 99},
        {"cell": "clips", "checks": 7, "asked": 9, "failed": [], "number_failed": 0, "largest_reach": 0.99998,
         "against_float64": 3, "largest_float32_error": 2e-7},
        SLICES | {"processes": 1, "tokens_per_second": 100, "peak_mib": 1},
        SLICES | {"processes": 2, "tokens_per_second": 150, "peak_mib": 2},
        SLICES | {"processes": 4, "left_out": "out of memory"},
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.gpu.plot", raising=False)
    page = write_page(lines, tmp_path).read_text()
    assert "| 64x4 | ours | 10 | 5 | 60.0 | 16,667 | 1.50 | – | 10 | 99 |" in page
    assert "| 64x4 | loop | – | 1 | 400.0 | 2,500 | 10.00 | – | 10 | – |" in page
    assert "7 checks of 9, 0 failed: copies of one user reached 0.9999800 clip norms a copy at most." in page
    assert "3 sums in float32 were off those of float64 by 2.0e-07 of their norm at most." in page
    assert "It did not come to an end." in page
    assert "ours at 20" not in page
    assert "| not compiled | 2 | 8 | 150 | 1.50 | 2 |" in page
    assert "Left out, out of memory: not compiled, 4 processes at 8 tokens." in page
    assert "There is no plot: matplotlib is not installed here." in page
    assert not (tmp_path / "times.png").exists()
