"""Correlated noise beside whatever else a run can have: it trains, resumes bit for bit, and states the same ε."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import charges, crashed, weights
from safetensors.numpy import load_file
from small_runs import ROUNDS, trained

from fedsim.config import EngineConfig, NoiseConfig, OptimizerConfig
from fedsim.privacy.ledger import NOTHING, read_entries

KINDS: dict[str, dict[str, Any]] = {
    "els": {"plan": {"algorithm": "els", "group_size": 2}},
    "quantile": {"plan": {"clip_quantile": 0.5, "clip_count_std": 2.0}},
    "layer-noise": {"plan": {"mechanism": "layer-noise"}},
    "adaptive-noise": {"plan": {"mechanism": "adaptive-noise", "clip_quantile": 0.5, "clip_count_std": 2.0}},
    "local-steps": {"plan": {"local_steps": 2, "group_size": 2}},
    "exact": {"engine": EngineConfig(kind="local", workers=2, exact=True)},
    "lora": {"model": {"lora_rank": 2}},
    "average": {"optimizer": OptimizerConfig(average="tail", schedule="linear", warmup_rounds=2)},
    "momentum": {"optimizer": OptimizerConfig(name="momentum", learning_rate=1e-2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_crashes_ends_as_one_that_does_not(small_run, tmp_path: Path, monkeypatch, kind: str) -> None:
    common, changes = small_run(""), dict(KINDS[kind])
    changes["plan"] = dataclasses.replace(common.plan, bands="3", **changes.get("plan", {}))
    if "model" in changes:
        changes["model"] = dataclasses.replace(common.model, **changes["model"])
    whole = trained(small_run(tmp_path / "whole", **changes))
    trained(crashed(small_run(tmp_path / "run", **changes), monkeypatch))
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/model").rglob("*.safetensors")]
    assert files
    for file in files:
        # The header names the ledger, and a crashed run's has more charges.
        ours, theirs = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert whole["bands"] == 3
    statements = [json.loads((tmp_path / name / "privacy.json").read_text()) for name in ("whole", "run")]
    assert statements[0]["epsilon"] == statements[1]["epsilon"]
    assert "correlated over 3 rounds" in statements[1]["in_words"]
    charged = [entry.event for entry in read_entries(tmp_path / "run/ledger.jsonl")]
    assert [event.group for event in charged if event != NOTHING] == [round % 3 for round in range(ROUNDS)]


def test_the_learning_rate_that_ran_is_in_the_summary_and_the_metrics(small_run, tmp_path: Path) -> None:
    plan = dataclasses.replace(small_run("").plan, noise_multiplier=None, epsilon=8.0, bands="3")
    summary = trained(small_run(tmp_path, plan=plan, optimizer=OptimizerConfig(learning_rate=2e-3)))
    promised = json.loads((tmp_path / "bands.json").read_text())["forecasts"]
    (larger,) = (one["release_ratio"] for one in promised if one["bands"] == 3)
    assert larger > 1.1
    assert summary["learning_rate"] == 2e-3
    assert summary["peak_learning_rate"] == pytest.approx(2e-3 * larger)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["learning_rate"] == summary["peak_learning_rate"]


@pytest.mark.parametrize("exact", [False, True])
def test_secure_noise_can_be_correlated(small_run, tmp_path: Path, monkeypatch, exact: bool) -> None:
    plan = dataclasses.replace(small_run("").plan, bands="3", clip_quantile=0.5, clip_count_std=2.0)
    config = small_run(
        tmp_path,
        plan=plan,
        noise_seed=None,
        noise=NoiseConfig(secure=True),
        engine=EngineConfig(kind="local", workers=1, exact=exact),
    )
    summary = trained(crashed(config, monkeypatch))
    assert summary["rounds"] == ROUNDS
    assert charges(tmp_path / "ledger.jsonl") == list(range(ROUNDS))
    assert weights(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
