"""What makes a device give the same bits for the same work: sums as integers are worth nothing without."""

import os

import torch

from fedsim.errors import InvalidInput

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
"""With which NVIDIA's cuBLAS repeats itself (its documentation, "Results reproducibility"), the quicker one first."""


def compute_repeatably(device: torch.device, threads: int) -> None:
    """Make this process compute the same bits from the same numbers, on a device of one kind; before it is used.

    On a CPU sums inside a matrix product depend on the number of threads alone. On a GPU kernels that add in the order
    in which they happen to finish are replaced; an operation that has no other kernel then fails, and says so.

    Args:
        device: Where this process computes.
        threads: Threads on a CPU.

    Raises:
        InvalidInput: The environment asks for a workspace with which cuBLAS does not repeat itself.
    """
    torch.set_num_threads(threads)
    if device.type != "cuda":
        return
    found = os.environ.setdefault(WORKSPACE, REPEATABLE_WORKSPACES[0])  # read when CUDA starts
    if found not in REPEATABLE_WORKSPACES:
        hint = "--engine.exact promises the same bits each time: unset it."
        raise InvalidInput(WORKSPACE, found, " or ".join(REPEATABLE_WORKSPACES), hint)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
