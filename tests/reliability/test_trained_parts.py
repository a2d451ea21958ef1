"""Runs that train a part of the weights: they resume as what they are, and what they leave is trained on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import crashed
from safetensors.numpy import load_file
from small_runs import ROUNDS, trained

from fedsim.config import RunConfig, from_flat
from fedsim.errors import InvalidInput
from fedsim.resources import open_resources

PARTS: dict[str, dict[str, Any]] = {
    "adapters": {
        "lora_rank": 2,
        "lora_targets": (r".*attn\.c_.*", "c_fc"),
        "rank_pattern": ("c_proj=3",),
        "modules_to_save": ("ln_f",),
        "use_rslora": True,
        "lora_init": "orthonormal",
    },
    "bias": {"trainable": ("bias",)},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_trains_a_part_resumes_and_is_trained_on(small_run, tmp_path: Path, monkeypatch, part: str) -> None:
    model = dataclasses.replace(small_run("").model, **PARTS[part])
    trained(small_run(tmp_path / "whole", model=model))
    again = crashed(small_run(tmp_path / "run", model=model), monkeypatch)
    for other in ({"lora_alpha": 3.0}, {"use_rslora": False} if model.lora_rank else {"trainable": ()}):
        with pytest.raises(InvalidInput, match="as in the run that goes on"):
            trained(dataclasses.replace(again, model=dataclasses.replace(model, **other)))
    trained(again)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/model").rglob("*.safetensors")]
    assert files
    for file in files:
        # The header names the ledger, and a crashed run's has more charges.
        ours, theirs = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    written = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert from_flat(RunConfig, written).model == model
    on = small_run(
        tmp_path / "on",
        model=model.reading(str(tmp_path / "run")),
        plan=dataclasses.replace(small_run("").plan, rounds=2),
    )
    assert open_resources(on).loaded.layout == open_resources(small_run("", model=model)).loaded.layout
    assert trained(on)["rounds"] == 2
    first, *_ = measured(on.output)
    *_, last = measured(again.output)
    assert (last["round"], first["round"]) == (ROUNDS, 0)
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-5)


def measured(output: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output or "") / "metrics.jsonl").read_text().splitlines()]


def test_weights_that_are_not_named_stay_as_they_were(small_run, tmp_path: Path) -> None:
    model = dataclasses.replace(small_run("").model, trainable=("bias",))
    config = small_run(tmp_path, model=model, plan=dataclasses.replace(small_run("").plan, rounds=2))
    before = open_resources(config).loaded.model.state_dict()
    trained(config)
    after = load_file(tmp_path / "model" / "model.safetensors")
    moved = {name for name, values in after.items() if (before[name].numpy() != values).any()}
    assert moved == {name for name in after if name.endswith(".bias")}
