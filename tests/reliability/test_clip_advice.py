"""What the alarm says of a clip norm that clips everybody is so."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from small_runs import trained

from fedsim.config import RunConfig


def outcome(config: RunConfig, folder: Path, name: Literal["sgd", "adam"], clip_norm: float, rate: float) -> Any:
    plan = dataclasses.replace(config.plan, clip_norm=clip_norm)
    optimizer = dataclasses.replace(config.optimizer, name=name, learning_rate=rate)
    summary = trained(dataclasses.replace(config, plan=plan, optimizer=optimizer, output=str(folder)))
    assert "clips-everyone" in {alarm["alarm"] for alarm in summary["alarms"]}
    return summary["test_loss_after"]


def test_a_clip_norm_that_clips_everybody_does_nothing_under_adam_and_scales_steps_elsewhere(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_run("")
    adam = [outcome(config, tmp_path / f"adam-{clip}", "adam", clip, 1e-3) for clip in (0.01, 0.1)]
    assert adam[0] == pytest.approx(adam[1], abs=1e-4)
    sgd = [outcome(config, tmp_path / f"sgd-{clip}", "sgd", clip, 1.0) for clip in (0.01, 0.1)]
    assert abs(sgd[0] - sgd[1]) > 1e-2
    assert outcome(config, tmp_path / "sgd-rate", "sgd", 0.01, 10.0) == pytest.approx(sgd[1], abs=1e-4)
