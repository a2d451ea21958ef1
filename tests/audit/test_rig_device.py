"""An audit whose worker computes on a device that is not the host's."""

import numpy as np
import pytest
import torch
from second_device import any_device

from experiments.audit.canaries import CanaryUsers, PrescribedUpdates
from experiments.audit.rig import Rig
from fedsim.plan import UlsPlan

PLAN = UlsPlan(
    num_users=20, group_size=1, sampling_probability=0.5, clip_norm=0.5, noise_multiplier=1.0, steps=2, delta=1e-5
)


def released() -> np.ndarray:
    """The parameters after two rounds in which canaries take part."""
    updates = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    users = CanaryUsers(np.ones(20, np.int64), np.arange(20.0) % 4)
    round = (rig := Rig(PLAN, users, updates, sampling_seed=1, noise_seed=2, workers=1)).round(np.arange(15))
    for number in range(PLAN.steps):
        round.run(number, rig.gather)
    return round.parameters


def test_an_audit_on_a_device_attacks_what_the_hosts_does(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, places = PrescribedUpdates.forward, set()

    def noted(model: PrescribedUpdates, tokens: torch.Tensor) -> torch.Tensor:
        losses = forward(model, tokens)
        places.add(losses.device)
        return losses

    with monkeypatch.context() as host:
        host.setattr("clients.worker.computing_device", lambda: torch.device("cpu"))
        expected = released()
    monkeypatch.setattr(PrescribedUpdates, "forward", noted)
    with any_device() as device:
        found = released()
    assert places == {device}
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
