"""Driver and workers must run the same code: refuse a cluster that does not, and say what differs where."""

from collections.abc import Mapping

from fedsim.errors import Failure
from fedsim.versions import ABSENT, PACKAGES

COMPARED = ("python", *PACKAGES)
"""Not the platform: a cluster's nodes may well run another kernel."""


class VersionsDiffer(Failure):
    """Some worker runs other versions than the driver."""


def require_same_versions(driver: Mapping[str, str], worker: Mapping[str, str], where: str) -> None:
    """Compare what `fedsim.versions.versions` returned in two processes.

    A local build tag ("2.11.0+cu130" against "2.11.0") counts as a difference: sums could differ by it.

    Raises:
        VersionsDiffer: Names each package with the driver's and the worker's version, and the worker.
    """
    pairs = {name: (driver.get(name, ABSENT), worker.get(name, ABSENT)) for name in COMPARED}
    differences = [
        f"{name} is {here} on the driver and {there} on {where}"
        for name, (here, there) in sorted(pairs.items())
        if here != there
    ]
    if differences:
        raise VersionsDiffer("; ".join(differences) + ". Install the same versions on every node.")
