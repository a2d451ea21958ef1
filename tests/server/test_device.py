"""Rounds whose vectors are tensors on the workers' device: what they release, and that nothing copies them about.

On a device that is not the host's (a GPU's, or what acts as one), and on the host's, where the server would turn
them into numpy arrays.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mock_training import PARAMETERS, mock_clients, sum_of_units, training, uls_plan
from second_device import any_device

from fedsim import optimizer
from fedsim.clip import Clip
from fedsim.config import OptimizerConfig
from fedsim.engine.totals import norm_within
from fedsim.engine.work import Gathered, Vector, Work, on_host
from fedsim.plan import UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS, GaussianNoise, NoiseSource
from fedsim.privacy.mechanisms.banded.coefficients import on_grid, square_root_coefficients
from fedsim.randomness import StreamNoise
from fedsim.release import Release, device_noise
from fedsim.release.device_noise import DeviceNoise
from fedsim.sampling import Turns
from fedsim.seeds import Seeds
from server.training import Training


@pytest.fixture(params=["host", "another"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device whose vectors stay tensors."""
    monkeypatch.setattr(optimizer, "_vector", lambda tensor: tensor)
    if request.param == "host":
        yield torch.device("cpu")
    else:
        with any_device() as another:
            yield another


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
    if device.type != "cpu":
        assert round.release.on_device == (run.plan.mechanism.name == "gaussian")
    elif run.plan.mechanism.name == "gaussian":
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
                total=torch.from_numpy(total).to(device) if tensors else total, statistics={"clipped_units": 0.0},
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


SIZES = {"h.0.attn.weight": 700, "h.0.attn.bias": 30, "wte.weight": 1270}
BANDS: dict[str, Any] = {"sampling": Turns(), "noise_coefficients": on_grid(square_root_coefficients(3))}
KINDS: dict[str, tuple[UlsPlan, dict[str, Any]]] = {
    "gaussian": (uls_plan(), {}),
    "scales": (uls_plan(mechanism=MECHANISMS.build("matrix-noise")), {}),
    "scales that follow releases": (uls_plan(mechanism=MECHANISMS.build("adaptive-noise")), {}),
    "a clip norm that follows a count": (uls_plan(clip_quantile=0.5, clip_count_std=2.0), {}),
    "bands": (uls_plan(steps=6, **BANDS), {}),
    "exact": (uls_plan(), {"exact": True}),
    "without privacy": (uls_plan(noise_multiplier=0.0), {}),
}


def releases(plan: UlsPlan, how: dict[str, Any], device: torch.device | None) -> list[Any]:
    """Three means with what is kept of them; half of the noise drawn ahead, state handed on after the first."""
    release = Release(plan, SIZES, 1, device=device, **how)
    found: list[Any] = []
    rng = np.random.default_rng(0)
    for number in range(3):
        clip = release.clip
        total = rng.normal(size=sum(SIZES.values())).astype(np.float64 if how else np.float32)
        parameters = rng.normal(size=len(total)).astype(np.float32)
        given: Any = total if device is None else torch.from_numpy(total).to(device)
        place: Any = parameters if device is None else torch.from_numpy(parameters).to(device)
        if number != 1:
            with release.drawing_ahead(clip, number):
                mean = release.noised_mean(given, clip, number)
        else:
            mean = release.noised_mean(given, clip, number)
        release.observe(mean, place, {"units": 9.0, "clipped_units": 5.0}, number)
        found += [on_host(mean), release.clip_norm, *release.state().values()]
        if number == 0:
            following = Release(plan, SIZES, 1, device=device, **how)
            following.load_state(release.state())
            release = following
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_any_release_of_a_devices_sum_is_the_hosts(kind: str, device: torch.device) -> None:
    """Wherever its noise is added: bit for bit, and so is the state that it leaves."""
    plan, how = KINDS[kind]
    expected, found = releases(plan, how, None), releases(plan, how, device)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_sum_of_nobody_is_released_where_others_are() -> None:
    """It is an array, for no worker computed it."""
    with any_device() as device:
        release = Release(uls_plan(), SIZES, 1, device=device)
        mean = release.noised_mean(np.zeros(sum(SIZES.values()), dtype=np.float32), release.clip, 0)
        assert isinstance(mean, torch.Tensor)
        assert mean.device == device


def test_secure_noise_is_added_to_a_devices_sum(device: torch.device) -> None:
    release = Release(uls_plan(), SIZES, None, device=device)
    mean = release.noised_mean(torch.zeros(sum(SIZES.values()), device=device), release.clip, 0)
    assert np.std(mean) * release.plan.normaliser == pytest.approx(release.clip.norm, rel=0.1)


@pytest.mark.parametrize("average", ["none", "exponential", "tail"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_an_optimizer_on_a_device_steps_as_the_hosts(rule: str, average: str, device: torch.device) -> None:
    """From arrays and from the device's means, interrupted and gone on with, and from assigned parameters."""
    config = OptimizerConfig(name=rule, learning_rate=0.1, average=average, schedule="linear")
    rng = np.random.default_rng(0)
    start, *means = rng.normal(size=(5, 100)).astype(np.float32)

    def made(there: bool) -> optimizer.ServerOptimizer:
        return optimizer.ServerOptimizer(torch.tensor(start, device=device if there else "cpu"), config, len(means))

    host, one = made(False), made(True)
    for number, mean in enumerate(means):
        host.step(mean.copy())
        # Not end to end in memory, as a part of something larger.
        strided = torch.from_numpy(np.repeat(mean, 2)).to(device)[::2]
        one.step(strided if number % 2 else mean.copy())
        if number == 1:
            following = made(True)
            following.assign(one.parameters)
            following.load_state(one.state())
            one = following
        assert one.finite
        for vector in (one.vector, one.result):
            assert isinstance(vector, torch.Tensor)
            assert vector.device == device
    np.testing.assert_allclose(one.parameters, host.parameters, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.result_on_host, host.result_on_host, rtol=1e-5, atol=1e-6)
    assert one.state().keys() == host.state().keys()
    one.step(torch.full((100,), torch.inf, device=device))
    assert not one.finite


def test_norms_are_taken_where_a_sum_is(device: torch.device) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert norm_within(torch.from_numpy(values).to(device), 1.0) == pytest.approx(norm_within(values, 1.0), rel=1e-12)
