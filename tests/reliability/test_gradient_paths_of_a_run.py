"""Which way gradients took stands in a run's folder and its report, and is said on the terminal, once."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import trained

from experiments.report.run import write_report
from fedsim.config import RunConfig
from fedsim.gradients import tape


@pytest.mark.parametrize("way", ["fast", "loop", "reference", "exact"])
def test_a_run_says_which_way_its_gradients_took(
    small_run: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, way: str
) -> None:
    """By the folder, the summary, the report and one line on the terminal."""
    config = small_run(tmp_path)
    config = dataclasses.replace(config, plan=dataclasses.replace(config.plan, rounds=3))
    if way == "loop":
        refuse = tape.RowsMixedError("layers were forbidden to be told apart", "of 7 rows of user 3")
        monkeypatch.setattr(tape.Tape, "called", lambda *_, **__: (_ for _ in ()).throw(refuse))
    if way == "reference":
        config = dataclasses.replace(config, gradients="reference")
    if way == "exact":
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, exact=True))
    summary = trained(config)
    expected = {
        "fast": "Gradients: all 10 layers fast",
        "loop": "Gradients: unit after unit, because layers were forbidden to be told apart; about ",
        "reference": "Gradients: unit after unit, because the reference path was asked for; about ",
        "exact": "Gradients: unit after unit, because exact sums take each unit's update by itself; about ",
    }[way]
    (said,) = summary["gradients"]
    assert said.startswith(expected)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Gradients: ")]
    assert lines == [said]
    (written,) = json.loads((tmp_path / "paths.json").read_text(encoding="utf-8"))["gradients"]
    assert written["in_words"] == said
    assert written["workers"] == 1
    assert {layers["way"] for layers in written["layers"]} == {"fast" if way == "fast" else "loop"}
    assert {layers["name"] for layers in written["layers"]} >= {"transformer.wte", "transformer.h.*.attn.c_attn"}
    report = write_report(tmp_path).read_text(encoding="utf-8")
    assert expected.partition(";")[0].replace("'", "&#39;") in report
    assert "transformer.h.*.attn.c_attn" in report
    for file in tmp_path.glob("*.json*"):
        assert "user 3" not in file.read_text(encoding="utf-8"), file
