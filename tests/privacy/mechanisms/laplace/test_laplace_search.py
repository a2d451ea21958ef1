"""The offline search, and the file that others can check."""

import json
from pathlib import Path

import pytest

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.laplace.search import NoiseTarget, read_noise_file, search_noise, usefulness


@pytest.mark.parametrize("query", ["number", "l1-vector"])
def test_what_is_found_meets_the_target_and_is_no_worse_than_laplace(query: str, tmp_path: Path) -> None:
    target = NoiseTarget(epsilon=0.3, delta=1e-2, query=query, within=2.0)  # type: ignore[arg-type]
    found = search_noise(target, generations=2)
    assert found.delta <= target.delta
    assert found.delta == pytest.approx(target.delta, rel=1e-3)
    assert found.usefulness >= found.laplace_usefulness > 0
    assert found.usefulness == usefulness(found.law, 2.0)
    found.write(tmp_path / "noise.json")
    again = read_noise_file(tmp_path / "noise.json")
    assert (again.law, again.target, again.delta) == (found.law, found.target, found.delta)


def test_several_releases_are_bounded_by_renyi(tmp_path: Path) -> None:
    found = search_noise(NoiseTarget(epsilon=1.0, delta=1e-5, releases=50, within=20.0), generations=1)
    assert found.delta <= 1e-5


def test_a_file_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.json"
    search_noise(NoiseTarget(epsilon=0.5, delta=1e-2, query="l1-vector"), generations=1).write(path)
    values = json.loads(path.read_text())
    values["target"]["epsilon"] = 0.4
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidInput, match="true to its target"):
        read_noise_file(path)
    for broken in ("", "{}", json.dumps(values | {"law": [["gamma", 1.0, 2.0]]})):
        path.write_text(broken)
        with pytest.raises(InvalidInput):
            read_noise_file(path)
    with pytest.raises(InvalidInput, match="readable"):
        read_noise_file(tmp_path / "absent.json")
