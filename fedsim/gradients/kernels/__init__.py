"""Kernels for what a GPU should do in one go: weighted products, norms and losses of bfloat16 factors.

Each has a counterpart in plain torch beside its caller, which the tests compare it with and which does the work
elsewhere: on a CPU, for other dtypes, without Triton, on a device where the kernels fail their own check. With
TRITON_INTERPRET=1 they run on CPU tensors, for tests.
"""

import functools
import logging
import os
from collections.abc import Sequence

import torch

from fedsim.gradients.kernels.tables import Pair

log = logging.getLogger(__name__)


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernels may take these tensors: bfloat16, the last axis contiguous, a device where they are right.

    The first time a device is asked for they are tried there (`check.fault_of`), and a device on which they fail, or
    are wrong, is left to plain torch with a warning.
    """
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1 or not (tensor.is_cuda or _interpreted()):
            return False
    return _right_on(tensors[0].device)


def weighted_products(targets: Sequence[torch.Tensor], pairs: Sequence[Pair], factors: torch.Tensor) -> None:
    """`weighted.weighted_products`, for tensors that are `usable`."""
    from fedsim.gradients.kernels import weighted

    with torch.cuda.device_of(factors):  # Triton launches on the device that is current
        weighted.weighted_products(targets, pairs, factors)


def gram_norms_of(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """`gram.gram_norms_of`, for tensors that are `usable`."""
    from fedsim.gradients.kernels import gram

    with torch.cuda.device_of(pairs[0][0]):
        return gram.gram_norms_of(pairs)


def loss_gradient_(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss.loss_gradient_`, for tensors that are `usable`."""
    from fedsim.gradients.kernels import loss

    with torch.cuda.device_of(logits):
        return loss.loss_gradient_(logits, labels)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _right_on(device: torch.device) -> bool:
    """Whether the kernels run on a device and are right there. Triton is large, so it is imported when it is used."""
    if device.type == "cuda" and _interpreted():
        return False  # interpreted kernels take a GPU's bfloat16 for integers
    try:
        from fedsim.gradients.kernels.check import fault_of
    except ImportError:
        return False
    with torch.cuda.device_of(torch.empty(0, device=device)):
        fault = fault_of(device)
    if fault:
        log.warning("Sums on %s are computed without kernels of our own, which is slower: %s", device, fault)
    return not fault
