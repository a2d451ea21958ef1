"""The server's step: how often it goes over the vector, and what it does to vectors that are not finite."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fedsim.config import OptimizerConfig
from fedsim.optimizer import ServerOptimizer

SIZE = 4099


def made(values: np.ndarray, **changes: object) -> ServerOptimizer:
    return ServerOptimizer(values, OptimizerConfig(**{"learning_rate": 0.1, **changes}), 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_a_step_and_its_check_are_two_passes(rule: str) -> None:
    """Parameters and state are in no cache where they are large: each further pass costs as much as the first."""
    optimizer, mean = made(np.ones(SIZE, dtype=np.float32), name=rule), np.ones(SIZE, dtype=np.float32)
    optimizer.step(mean)  # makes the state
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        optimizer.step(mean)
        assert optimizer.finite
    # The fused step names no shapes, as its arguments are lists; whatever is done to the vector beside it does.
    beside = {event.name for event in recorded.events() if [SIZE] in event.input_shapes}
    assert beside - {"aten::lift_fresh", "aten::to", "aten::detach"} == {"aten::sum"}
    assert any("fused" in event.name for event in recorded.events())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(bad: float) -> None:
    values = np.ones(SIZE, dtype=np.float32)
    assert made(values).finite
    values[[7, 9]] = bad, -bad
    assert not made(values).finite


def test_values_whose_sum_overflows_are_finite() -> None:
    assert made(np.full(SIZE, 3e38, dtype=np.float32)).finite


def test_the_servers_vector_is_the_callers_and_takes_other_values_in_place() -> None:
    values = np.zeros(SIZE, dtype=np.float32)
    optimizer = made(values, name="sgd")
    optimizer.step(np.ones(SIZE, dtype=np.float32))
    assert np.shares_memory(optimizer.parameters, values)
    assert np.shares_memory(optimizer.vector, values)
    np.testing.assert_allclose(values, -0.1)
    optimizer.assign(np.full(SIZE, 5, dtype=np.float32))
    assert (values == 5).all()
    assert isinstance(optimizer.result_on_host, np.ndarray)


def test_fused_steps_are_those_of_the_plain_rules() -> None:
    rng = np.random.default_rng(0)
    for rule, plain in (
        ("sgd", lambda p: torch.optim.SGD([p], lr=0.1)),
        ("momentum", lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam([p], lr=0.1)),
    ):
        start = rng.standard_normal(SIZE).astype(np.float32)
        expected = torch.from_numpy(start.copy())
        optimizer, reference = made(start, name=rule), plain(expected)
        for _ in range(4):
            mean = rng.standard_normal(SIZE).astype(np.float32)
            optimizer.step(mean.copy())
            expected.grad = torch.from_numpy(mean)
            reference.step()
            again = made(optimizer.parameters.copy(), name=rule)
            again.load_state(optimizer.state())
            optimizer = again
        np.testing.assert_allclose(optimizer.parameters, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_mean_may_lie_anywhere_in_memory(name: Literal["sgd", "momentum", "adam"]) -> None:
    means = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    moved = []
    for columns in (means, np.ascontiguousarray(means.T).T):
        optimizer = ServerOptimizer(np.zeros(300, dtype=np.float32), OptimizerConfig(name=name), 3)
        for mean in columns.T:
            optimizer.step(mean if columns is means else np.ascontiguousarray(mean))
        moved.append(optimizer.parameters)
    np.testing.assert_array_equal(*moved)
