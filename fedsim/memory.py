"""How much memory a process has needed at most."""

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
