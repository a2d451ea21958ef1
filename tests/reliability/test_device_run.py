"""A whole run in its worker's process, on a device that is not the host's: trained, interrupted, gone on with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from second_device import any_device
from small_runs import trained

import clients.app
from fedsim.config import OptimizerConfig
from fedsim.resources import open_resources
from server import app
from server.round import Round


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


KINDS: dict[str, dict[str, Any]] = {
    "adam, averaged": {"optimizer": OptimizerConfig(name="adam", learning_rate=0.01, average="exponential")},
    "exact": {"exact": True},
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_device_is_the_hosts(
    kind: str, small_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses at each measurement and the exported weights; interrupted at a checkpoint and gone on with."""
    config = small_run(tmp_path / "there", optimizer=OptimizerConfig(name="sgd", learning_rate=0.5))
    changes = dict(KINDS[kind])
    engine = dataclasses.replace(config.engine, precision="float32", exact=changes.pop("exact", False))
    plan = dataclasses.replace(config.plan, rounds=4, gradients_per_round=8)
    config = dataclasses.replace(config, plan=plan, engine=engine, **changes)
    open_resources(config)  # made on the host, once
    run, places = Round.run, set()

    def interrupted(self: Round, number: int, *gather: Any) -> Any:
        vector = self.optimizer.vector
        places.add(vector.device if isinstance(vector, torch.Tensor) else "host")
        if number == 2:
            raise Interrupted
        return run(self, number, *gather)

    clients.app._worker.cache_clear()
    with any_device() as device:
        with monkeypatch.context() as patched:
            patched.setattr(Round, "run", interrupted)
            with pytest.raises(Interrupted):
                trained(config)
        assert places == {device}
        trained(dataclasses.replace(config, resume=str(tmp_path / "there")))

    clients.app._worker.cache_clear()
    for module in (clients.worker, app):
        monkeypatch.setattr(module, "computing_device", lambda: torch.device("cpu"))
    trained(dataclasses.replace(config, output=str(tmp_path / "host")))
    clients.app._worker.cache_clear()
    found, expected = lines(tmp_path / "there"), lines(tmp_path / "host")
    assert [line["round"] for line in found] == [line["round"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["epsilon"] == other["epsilon"]
        assert one.keys() == other.keys()
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    weights, others = (load_file(tmp_path / name / "model/model.safetensors") for name in ("there", "host"))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        np.testing.assert_allclose(tensor.numpy(), others[name].numpy(), rtol=1e-2, atol=1e-3)
