"""Which software computes here, found without importing it."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fedsim", "numpy", "scipy", "torch", "transformers", "flwr", "ray")
ABSENT = "absent"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and the platform.

    A package that is not installed is "absent". The platform is the machine's own description: it may differ between
    processes that run the same code.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _installed(package) for package in PACKAGES},
    }


@functools.cache
def _installed(package: str) -> str:
    """Of what a process has imported, whatever is installed meanwhile."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT
