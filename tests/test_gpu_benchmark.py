"""The GPU benchmark on a CPU: its cells run, their lines have what the page is made of, and the clip holds."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import cells, checks
from benchmarks.gpu.checks import clip_checks
from benchmarks.gpu.measure import Way, measure
from benchmarks.gpu.steps import padded_batches, ragged_case, uniform_case
from benchmarks.gradient_models import SIZES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells make their own; they end with the test."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")


def run(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines that a cell writes."""
    monkeypatch.setattr(sys, "argv", ["cells", *arguments.split(), "--device", "cpu"])
    cells.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_no_clip_check_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every shape in float32 and in bfloat16."""
    (line,) = run("clips --checks 8", monkeypatch, capsys)
    assert line["checks"] == 8
    assert line["number_failed"] == 0
    assert line["failed"] == []
    assert 1 - 2**-7 < line["largest_reach"] <= 1
    assert 0 < line["largest_float32_error"] < 1e-5


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


def test_each_way_of_a_step_has_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = replace(SIZES["tiny-lora"], users=6, layers=1)
    monkeypatch.setitem(SIZES, "tiny-lora", size)
    built, *lines = run("tiny-lora --cases ragged", monkeypatch, capsys)
    assert built.keys() == {"model", "build_seconds"}
    assert [line["way"] for line in lines] == [
        "loop", "ours, size chosen", "ours", "ours, not compiled", "non-private", "non-private, fused loss",
    ]  # fmt: skip
    tokens = ragged_case(size, 6).tokens
    for line in lines:
        assert line.keys() == {
            "model", "case", "tokens", "way", "micro_batch", "milliseconds", "spread", "peak_mib", "kernels",
        }  # fmt: skip
        assert (line["model"], line["case"], line["tokens"]) == ("tiny-lora", "ragged", tokens)
        assert line["milliseconds"] > 0 <= line["spread"]
    (only,) = run("tiny-lora --cases 64x1 --ways ours", monkeypatch, capsys)[1:]
    assert (only["case"], only["way"], only["tokens"]) == ("64x1", "ours", 6 * size.length)


def test_whole_rounds_have_their_phases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = run("rounds-tiny-lora", monkeypatch, capsys)
    assert line["size"] == "tiny-lora"
    assert line["rounds"] == 6
    assert 0 < line["beyond_gradients"] < 1
    assert "compute" in line["in_words"]


def test_what_a_device_can_do_is_stated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = run("ceilings", monkeypatch, capsys)
    assert line.keys() == {"device", "torch", "copy_gb_per_second", "bfloat16_tflops"}


def test_padded_batches_hold_every_row_once() -> None:
    for case in (ragged_case(SIZES["tiny-lora"], 9), uniform_case(SIZES["tiny-lora"], 5, 2)):
        batches = padded_batches(case, 100, CPU)
        assert sum(len(batch.input_ids) for batch in batches) == len(case.rows)
        assert all(batch.input_ids.numel() <= 100 for batch in batches)


def test_a_way_without_enough_memory_is_left_out_and_the_quickest_size_is_kept() -> None:
    def slow() -> None:
        torch.randn(400, 400) @ torch.randn(400, 400)

    def too_large() -> None:
        raise torch.OutOfMemoryError

    def nothing() -> None:
        pass

    ways = [Way("a", 1, too_large), Way("a", 2, slow), Way("a", 3, nothing), Way("b", 1, too_large)]
    (best,) = measure(ways, CPU, repeats=2)
    assert (best.name, best.tokens, len(best.seconds)) == ("a", 3, 2)
