"""What reading data may take of the machine: cores, and memory as people write it."""

import os
import re

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def memory_bytes(size: str) -> int:
    """Bytes of a size such as "1GB", "1.5 GiB" or "500MB", as `DataConfig.memory_limit` takes it."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]+)\s*", size)
    assert found is not None
    return int(float(found[1]) * UNITS[found[2].lower()])
