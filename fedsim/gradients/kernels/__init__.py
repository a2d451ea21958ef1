"""Kernels for what a GPU should do in one go: weighted products, norms and losses of bfloat16 factors.

Each has a counterpart in plain torch beside its caller, which the tests compare it with and which does the work
elsewhere: on a CPU, for other dtypes, without Triton. With TRITON_INTERPRET=1 they run on CPU tensors, for tests.
"""

import functools
import os
from types import ModuleType

import torch


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernels may take these tensors: bfloat16, rows of the last axis contiguous, and Triton there."""
    return all(
        t.dtype == torch.bfloat16 and t.stride(-1) == 1 and (t.is_cuda or _interpreted()) for t in tensors
    ) and (_module("weighted") is not None)


def weighted_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor) -> None:
    """`weighted.weighted_product`, for tensors that are `usable`."""
    _of("weighted").weighted_product(target, left, right, factors)


def gram_norms(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gram.gram_norms`, for tensors that are `usable`."""
    found: tuple[torch.Tensor, torch.Tensor] = _of("gram").gram_norms(left, right)
    return found


def loss_gradient_(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss.loss_gradient_`, for tensors that are `usable`."""
    found: tuple[torch.Tensor, torch.Tensor] = _of("loss").loss_gradient_(logits, labels)
    return found


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _module(name: str) -> ModuleType | None:
    """A module of kernels; None where Triton is not installed. Triton is large, so it is imported when it is used."""
    import importlib

    try:
        return importlib.import_module(f"fedsim.gradients.kernels.{name}")
    except ImportError:
        return None


def _of(name: str) -> ModuleType:
    module = _module(name)
    assert module is not None  # callers ask `usable` first
    return module
