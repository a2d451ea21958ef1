"""What there is to compute on, on this machine and in general."""

import os
from dataclasses import dataclass
from typing import Self


def cores_here() -> int:
    """Cores of this machine that this process may use (Slurm and containers give fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Devices:
    """What there is to compute on.

    Attributes:
        cores: CPU cores.
        gpus: GPUs.
    """

    cores: int
    gpus: int

    @classmethod
    def here(cls) -> Self:
        """Of this machine."""
        import torch  # which whoever joins a cluster does without

        return cls(cores_here(), torch.cuda.device_count())
