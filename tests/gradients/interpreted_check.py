"""The check of the kernels on a device; `test_kernels` runs this in Triton's interpreter."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim.gradients import kernels
from fedsim.gradients.kernels import check

CPU = torch.device("cpu")


def plain_products(
    targets: list[torch.Tensor], pairs: list[tuple[torch.Tensor, torch.Tensor]], factors: torch.Tensor, programs: int
) -> None:
    """What `weighted_products` does, and many times as fast as in the interpreter."""
    for target, (left, right) in zip(targets, pairs, strict=True):
        target += ((factors.view(-1, 1, 1) * left).double().transpose(1, 2) @ right.double()).sum(0)


def off_by_a_little(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel of that name be right but for a 2⁻¹⁴ of what it gives; the products of the others are plain."""

    def wrong(*arguments: Any) -> Any:
        added = function.__name__ == "weighted_products"
        before = arguments[0][0].clone() if added else None
        given = function(*arguments)
        if added:
            arguments[0][0].add_(arguments[0][0] - before, alpha=2.0**-14)
            return None
        return given[0] * (1 + 2.0**-14), given[1]

    monkeypatch.setattr(check, "weighted_products", plain_products)
    monkeypatch.setattr(check, function.__name__, wrong)


def test_kernels_that_are_right_have_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """As what uses them finds, which is remembered: in the interpreter a check takes seconds."""
    with caplog.at_level(logging.WARNING):
        assert kernels.usable(torch.zeros(1, 2, 3, dtype=torch.bfloat16)), caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [("weighted_products", "weighted sum"), ("gram_norms_of", "squared norm"), ("loss_gradient_", "a loss")],
)
def test_a_kernel_that_is_off_by_more_than_a_clip_allows_for_is_found(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_by_a_little(getattr(check, name), monkeypatch)
    assert words in check.fault_of(CPU)


def test_a_device_that_cannot_run_them_is_left_to_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    assert kernels.usable(half)

    def lacking(*arguments: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(check, "weighted_products", lacking)
    monkeypatch.setattr(kernels, "_right_on", functools.cache(kernels._right_on.__wrapped__))
    with caplog.at_level(logging.WARNING):
        assert not kernels.usable(half)
        assert not kernels.usable(half)
    assert [record.message for record in caplog.records] == [
        "Sums on cpu are computed without kernels of our own, which is slower: RuntimeError: out of resource: shared "
        "memory"
    ]


def test_a_factor_that_is_the_same_for_every_token_is_copied() -> None:
    torch.manual_seed(0)
    left = torch.randn(2, 1, 24).to(torch.bfloat16).expand(2, 40, 24)
    right = torch.randn(2, 40, 16).to(torch.bfloat16)
    assert left.stride(1) == 0
    target, expected = torch.zeros(24, 16), (left.double().transpose(1, 2) @ right.double()).sum(0)
    kernels.weighted_products([target], [(left, right)], torch.ones(2))
    assert float((target - expected).norm()) < 1e-6 * float(expected.norm())
    from fedsim.gradients.kernels.tables import aligned

    assert 0 not in aligned(left).stride()


def test_a_label_beyond_the_vocabulary_has_no_loss() -> None:
    logits = torch.randn(2, 30).to(torch.bfloat16)
    losses, _ = kernels.loss_gradient_(logits, torch.tensor([30, 3]))
    assert losses.isnan().tolist() == [True, False]


def test_a_device_to_which_nothing_can_be_brought_has_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    assert check.fault_of(CPU) == "RuntimeError: out of order"
