"""Rounds whose vectors are tensors on the workers' device: what they release, and that nothing copies them about.

Where there is no GPU the tensors are a CPU's, which the server then does not turn into numpy arrays.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mock_training import PARAMETERS, mock_clients, sum_of_units, training, uls_plan

from fedsim.clip import Clip
from fedsim.engine.replies import norm_within
from fedsim.engine.work import Gathered, Vector, Work
from fedsim.privacy.mechanisms import MECHANISMS, GaussianNoise, NoiseSource
from fedsim.randomness import StreamNoise
from fedsim.release import Release, device_noise
from fedsim.release.device_noise import DeviceNoise
from server import optimizer
from server.identity import Seeds
from server.training import Training

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose vectors stay tensors."""
    monkeypatch.setattr(optimizer, "_vector", lambda tensor: tensor)
    return torch.device(request.param)


def test_noise_added_on_a_device_has_the_bits_of_the_hosts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever pieces it is brought there, drawn ahead or not."""
    host = np.ones(1000, dtype=np.float32)
    StreamNoise(3, "noise", 1).add_normal(host, 2.0)
    for piece, ahead in ((1 << 26, False), (64, False), (999, True)):
        monkeypatch.setattr(device_noise, "PIECE", piece)
        source, total = DeviceNoise(StreamNoise(3, "noise", 1)), torch.ones(1000, device=device)
        if ahead:
            list(source.draw_ahead([(1000, 2.0)], np.float32, 1 << 20))
        source.add_normal(total, 2.0)
        np.testing.assert_array_equal(total.cpu().numpy(), host)


PLANNED = ("noise_multiplier", "mechanism", "sampling_probability")


def on(device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Training:
    """A run whose parameters, sums and noise are on a device; its workers check that they are."""

    def total(request: Work) -> Vector:
        assert isinstance(request.parameters, torch.Tensor)
        assert request.parameters.device.type == device.type
        return torch.from_numpy(sum_of_units(request)).to(device)

    plan_of = {name: changes.pop(name) for name in PLANNED if name in changes}
    run = training(folder, uls_plan(**plan_of), clients=mock_clients(total), **changes)
    round = run.job.round
    flat = torch.zeros(PARAMETERS, device=device)
    round.optimizer = optimizer.ServerOptimizer(flat, round.optimizer._config, run.plan.steps)
    round.release = Release(run.plan, {"parameters": PARAMETERS}, round.seeds.noise, device=device)
    if run.plan.mechanism.name == "gaussian":
        monkeypatch.setattr(Release, "on_device", True)
    return run


@pytest.mark.parametrize("rule", [{}, {"name": "adam"}, {"name": "momentum", "average": "tail"}])
def test_a_run_on_a_device_ends_as_one_on_the_host(
    rule: dict[str, Any], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, so that no ledger is needed; after going on from its state too."""
    rule = {"learning_rate": 0.5, **rule}
    host = training(tmp_path / "host", uls_plan(noise_multiplier=0.0), epsilon=np.inf, **rule)
    monkeypatch.undo()
    expected = host.run().parameters
    monkeypatch.setattr(optimizer, "_vector", lambda tensor: tensor)
    made = [
        on(device, tmp_path / name, monkeypatch, noise_multiplier=0.0, epsilon=np.inf, **rule) for name in ("a", "b")
    ]
    made[0].round += 1
    made[0].job.round.run(0, made[0].job.gather)
    kept = made[0].state()
    assert all(isinstance(array, np.ndarray) for array in kept.arrays.values())
    made[1].load_state(kept)
    for run in made:
        outcome = run.run()
        assert isinstance(outcome.parameters, np.ndarray)
        np.testing.assert_allclose(outcome.parameters, expected, atol=1e-6)


def test_a_run_on_a_device_has_the_noise_of_the_host(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = Seeds(sampling=1, noise=2)
    one = on(device, tmp_path / "a", monkeypatch, seeds=seeds).run().parameters
    monkeypatch.undo()
    host = training(tmp_path / "b", uls_plan(), seeds=seeds).run().parameters
    np.testing.assert_allclose(one, host, atol=1e-6)
    without = training(tmp_path / "c", uls_plan(noise_multiplier=0.0), epsilon=np.inf).run().parameters
    assert (host - without).std() > 0.1


def test_a_round_of_nobody_on_a_device_still_releases_noise(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of no reply is the host's, whatever the others are."""
    run = on(device, tmp_path, monkeypatch, sampling_probability=1e-9)
    assert run.run().parameters.std() == pytest.approx(np.sqrt(3) / run.plan.normaliser, rel=0.02)


def test_exact_sums_of_a_device_are_released_on_the_host(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = on(device, tmp_path / "a", monkeypatch)
    host = training(tmp_path / "b", run.plan)
    monkeypatch.undo()
    for one, tensors in ((run, True), (host, False)):
        round = one.job.round
        round.exact = True
        round.release = Release(one.plan, {"parameters": PARAMETERS}, 2, exact=True, device=round.optimizer.device)

        def gather(request: Work, *rest: Any, tensors: bool = tensors, **following: Any) -> Gathered:
            total = np.rint(sum_of_units(request) / request.resolution).astype(np.int64)
            return Gathered(
                total=torch.from_numpy(total) if tensors else total, statistics={"clipped_units": 0.0},
                units=len(request.units), messages=1, failures=(), seconds=0.0, compute_seconds=0.0,
            )  # fmt: skip

        round.run(0, gather)
    np.testing.assert_array_equal(run.job.round.parameters, host.job.round.parameters)


def test_noise_that_is_not_gaussian_is_added_on_the_host(
    device: torch.device, tmp_path: Path, monkeypatch: Any
) -> None:
    """That of a run on the host: here Laplace noise, on sums that are on the device."""
    mechanism = MECHANISMS.build("randomised-laplace")
    one = on(device, tmp_path / "a", monkeypatch, mechanism=mechanism).run().parameters
    monkeypatch.undo()
    host = training(tmp_path / "b", uls_plan(mechanism=mechanism)).run().parameters
    np.testing.assert_allclose(one, host, atol=1e-6)


class OwnNoise(GaussianNoise):
    """Adds what only arrays can be added to, for all anybody knows."""

    def add(self, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        super().add(total, clip, source)


def test_where_noise_is_added_on_a_device() -> None:
    """Gaussian noise of a seed for float32 sums, and only where the device is none of the host's."""
    cuda = torch.device("cuda")

    def made(seed: int | None = 1, exact: bool = False, device: torch.device = cuda, **changes: Any) -> Release:
        return Release(uls_plan(**changes), {"all": 10}, seed, exact=exact, device=device)

    assert made().on_device
    assert made(mechanism=MECHANISMS.build("adaptive-noise")).on_device
    elsewhere = [made(None), made(exact=True), made(device=torch.device("cpu"))]
    elsewhere.append(made(mechanism=MECHANISMS.build("randomised-laplace")))
    elsewhere.append(made())
    elsewhere[-1].noise = OwnNoise(1.0, {"all": 10})
    assert not any(release.on_device for release in elsewhere)


def test_norms_of_tensors_are_those_of_arrays() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert norm_within(torch.from_numpy(values), 1.0) == pytest.approx(norm_within(values, 1.0), rel=1e-12)
    assert not np.isfinite(norm_within(torch.tensor([1.0, torch.nan]), 1.0))
