"""Driver and workers must run the same code: refuse a cluster that does not, and say what differs where."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fedsim", "numpy", "torch", "flwr", "ray")


class VersionsDiffer(RuntimeError):
    """Some worker runs other versions than the driver."""


def versions() -> dict[str, str]:
    """Python's and the relevant packages' versions in this process ("absent" where not installed); imports none."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def require_same_versions(driver: Mapping[str, str], worker: Mapping[str, str], where: str) -> None:
    """Compare what `versions` returned in two processes.

    A local build tag ("2.11.0+cu130" against "2.11.0") counts as a difference: sums could differ by it.

    Raises:
        VersionsDiffer: Names each package with the driver's and the worker's version, and the worker.
    """
    differences = [
        f"{name} is {driver.get(name, 'absent')} on the driver and {worker.get(name, 'absent')} on {where}"
        for name in sorted(driver.keys() | worker.keys())
        if driver.get(name, "absent") != worker.get(name, "absent")
    ]
    if differences:
        raise VersionsDiffer("; ".join(differences) + ". Install the same versions on every node.")
