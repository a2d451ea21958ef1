"""How much memory a process has needed at most, and that it keeps what it frees."""

import ctypes
import os
import platform
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The most bytes of main memory that this process ever held at once; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the process was before it became this program
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


REUSED_BLOCK = 64 * 2**20
"""Bytes of a block up to which its memory is kept for others when it is freed. What fills larger ones takes so long
that new pages do not count."""
REUSED_MEMORY = 256 * 2**20
"""Freed bytes at the end of the heap that a process keeps at most."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def reuse_freed_memory() -> bool:
    """Have this process keep memory that it frees for what it allocates next, where its C library is glibc.

    Left to itself glibc gives what a pass took back to the system after each one, and the next pass has every page of
    it made anew and filled with zeros, one fault a page: a fifth of the processor time of small models' gradients.
    Kept are no more than REUSED_MEMORY, of blocks of no more than REUSED_BLOCK. Whoever has set MALLOC_TRIM_THRESHOLD_
    or MALLOC_MMAP_THRESHOLD_ in the environment is left alone.

    Returns:
        Whether it does so now.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, REUSED_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, REUSED_MEMORY))
