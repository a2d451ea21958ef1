"""The catalogue of changes that break a guarantee: each can be made, and its runner tells killed from survived."""

import ast
import json
from pathlib import Path

import pytest

import benchmarks.mutants.__main__ as runner
from benchmarks.mutants.catalogue import ROOT, Mutant, mutants
from benchmarks.mutants.trial import failed_tests
from fedsim.errors import InvalidInput

ROOMS = {
    "accountant", "bounding", "charging", "clipping", "noise",
    "resuming", "sampling", "seeding", "statement", "summing",
}  # fmt: skip


def test_each_change_can_be_made_and_is_one() -> None:
    all_of_them = mutants()
    assert len(all_of_them) >= 100
    assert {one.room for one in all_of_them} == ROOMS
    assert {one.room for one in all_of_them if one.short} == ROOMS
    assert len({one.name for one in all_of_them}) == len(all_of_them)
    for one in all_of_them:
        changed = one.changed(ROOT)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse((ROOT / one.file).read_text(encoding="utf-8")))
        assert one.noticed_by
        for test in one.noticed_by:
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), one.name
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), one.name


def test_text_that_is_gone_is_named() -> None:
    lost = Mutant(room="noise", breaks="x", file="fedsim/clip.py", was="no such text", becomes="", noticed_by=())
    with pytest.raises(InvalidInput, match="0 times in fedsim/clip"):
        lost.changed(ROOT)


def test_failed_tests_are_read_from_what_pytest_prints(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("F\nFAILED tests/test_a.py::test_b[x-1] - assert 0\nERROR tests/test_c.py - E\n", encoding="utf-8")
    assert failed_tests(log) == ("tests/test_a.py::test_b[x-1]", "tests/test_c.py")


@pytest.mark.parametrize("noticed", [True, False])
def test_a_change_is_killed_where_a_test_fails(
    noticed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = "test_the_bound_follows_the_largest_scale" if noticed else "test_clips_travel_as_json"
    change = Mutant(
        room="clipping",
        breaks="the bound forgets scales",
        file="fedsim/clip.py",
        was="return self.norm * max(self.scales.values(), default=1.0)",
        becomes="return self.norm",
        noticed_by=(f"tests/test_clip.py::{test}",),
    )
    before = (ROOT / change.file).read_text(encoding="utf-8")
    monkeypatch.setattr(runner, "mutants", lambda: [change])
    assert runner.Mutants(processes=1).run() == (0 if noticed else 1)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) | {"mutants": 1, "killed": int(noticed)} == json.loads(lines[-1])
    assert any(line.startswith("survives: clipping") for line in lines) is not noticed
    assert (ROOT / change.file).read_text(encoding="utf-8") == before
