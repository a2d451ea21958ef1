"""What computes here, by name and version, and what of it must not differ between processes."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.engine.same_versions import VersionsDiffer, require_same_versions
from fedsim.versions import ABSENT, PACKAGES, versions

ROOT = Path(__file__).resolve().parents[1]


def test_versions_are_those_of_the_packages_without_importing_them() -> None:
    found = versions()
    assert set(found) == {"python", "platform", *PACKAGES}
    assert found["numpy"] == np.__version__
    assert found["python"] == platform.python_version()
    script = "import sys, fedsim.versions; fedsim.versions.versions(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "flwr", "ray"} & set(run.stdout.split())


def test_a_package_that_is_not_installed_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.versions.PACKAGES", ("numpy", "no-such-package"))
    assert versions()["no-such-package"] == ABSENT


def test_another_platform_is_no_difference_and_another_package_is() -> None:
    here = versions()
    require_same_versions(here, {**here, "platform": "another kernel"}, "worker 3")
    with pytest.raises(VersionsDiffer, match=r"scipy is .* on the driver and 1.0 on worker 3"):
        require_same_versions(here, {**here, "scipy": "1.0"}, "worker 3")
    with pytest.raises(VersionsDiffer, match=r"ray is .* and absent on worker 3"):
        require_same_versions(here, {name: value for name, value in here.items() if name != "ray"}, "worker 3")
