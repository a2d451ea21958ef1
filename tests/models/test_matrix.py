"""Models as people use them, from their files to their export: one of each kind of what is hard about them."""

import json
import math

import pytest
import torch

from benchmarks.models.command import Benchmark
from benchmarks.models.families import POSITIONS
from benchmarks.models.measure import Case, Finding, Form, all_cases, measure
from benchmarks.models.memory import PeakBytes
from benchmarks.models.table import markdown, summary
from fedsim.errors import InvalidInput

TRAIN: dict[tuple[str, Form], tuple[int | None, bool]] = {
    ("Llama, tied", "full"): (POSITIONS, True),  # one table at both ends
    ("MPT", "full"): (POSITIONS, True),  # biases instead of positions
    ("Falcon", "full"): (POSITIONS, False),  # writes to its residual stream
    ("Mixtral", "full"): (POSITIONS, False),  # experts that are parameters
    ("ModernBERT decoder", "full"): (POSITIONS, True),  # must have a padding token
    ("DeepSeek-V3", "LoRA"): (POSITIONS, True),  # whose dense layers PEFT takes for experts
    ("Llama 4", "LoRA"): (POSITIONS, True),  # routers that are linear layers and return two things
    ("Mamba", "LoRA, bfloat16"): (None, True),  # no attention; widens what its head reads
    ("OPT", "LoRA, bfloat16"): (POSITIONS, True),  # positions that begin at two
    ("RoBERTa", "classifier"): (POSITIONS - 2, True),  # positions that begin behind the padding's
    ("DistilBERT", "classifier, LoRA"): (POSITIONS, True),  # a head of two layers
    ("BART", "classifier, LoRA"): (POSITIONS, True),  # encoder and decoder; reads at the end token
    ("T5", "classifier"): (None, False),
}
"""The longest row, and whether all layers take part by rules of their own."""

REFUSED: dict[tuple[str, Form], str] = {
    ("BERT", "LoRA"): "reads in both directions",
    ("XLNet", "LoRA, bfloat16"): "random tokens said",
    ("FNet", "classifier"): "how far the row is padded",
}


@pytest.mark.parametrize("case", TRAIN, ids="/".join)
def test_it_trains_as_the_loop_does_and_its_export_computes_the_same(case: tuple[str, Form]) -> None:
    context, fast = TRAIN[case]
    found = measure(Case(family=case[0], form=case[1]))
    assert found.trains, found.refusal or found.fault
    assert found.exported
    assert found.agrees
    assert found.loop_error or found.error <= 1e-5
    assert found.context == context
    assert found.fast or not fast, (found.reference, found.generic)
    assert 0.5 < found.memory < 20


@pytest.mark.parametrize("case", REFUSED, ids="/".join)
def test_it_is_refused_in_a_sentence(case: tuple[str, Form]) -> None:
    found = measure(Case(family=case[0], form=case[1]))
    assert REFUSED[case] in found.refusal
    assert not found.fault
    assert "\n" not in found.refusal
    assert not found.exported


def test_the_command_measures_what_is_asked_for_and_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert Benchmark(only="gpt-2/full").run() == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("GPT-2/full: fast, ")
    found = json.loads(lines[-1])
    assert (found["models.rows"], found["models.fast"], found["models.exported"]) == (1, 1, 1)
    assert 0 < found["models.worst_error"] <= 1e-5


def test_a_name_that_nothing_has_is_told() -> None:
    with pytest.raises(InvalidInput, match=r"only is 'nonesuch'.*GPT-2/full"):
        Benchmark(only="nonesuch").run()


def test_a_fault_or_a_sum_that_differs_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (Finding(fault="RuntimeError: no"), Finding(error=1e-3, exported=True), Finding(error=math.nan)):
        monkeypatch.setattr("benchmarks.models.command.measure", lambda case, found=found: found)
        assert Benchmark(only="gpt-2/full").run() == 1


def test_the_table_has_every_family_in_every_form() -> None:
    cases = all_cases()
    assert len(cases) >= 60
    found = {case: Finding(error=1e-7, memory=2.0, exported=True) for case in cases}
    found[cases[0]] = Finding(refusal="a | sentence.")
    text = markdown(found)
    assert text.count("| fast, 1e-07, ×2.0") == len(cases) - 1
    assert "refused (1)" in text
    assert "1. a \\| sentence." in text
    counts = summary(found)
    assert (counts["models.rows"], counts["models.fast"], counts["models.refused"]) == (len(cases), len(cases) - 1, 1)


def test_bytes_are_counted_while_tensors_live() -> None:
    kept = torch.zeros(1000)
    with PeakBytes() as counted:
        for _ in range(3):
            view = (kept + 1).view(10, 100)
            del view
        assert counted.alive == 0
        two = [kept * 2, kept[:500], kept.add_(1), kept * 3]
    assert counted.peak == 2 * kept.nbytes
    assert len(two) == 4
