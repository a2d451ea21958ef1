"""The benchmark of growing populations, on small ones: what it prints, and what it leaves."""

import json
from pathlib import Path

import pytest

from benchmarks.growth import measure
from benchmarks.growth.__main__ import GrowthBenchmark, summary
from fedsim.data.store import UserStore

ONE = {"start_seconds": 0.5, "start_mib": 3.0, "round_mib": 0.3}


def test_it_ends_with_what_is_looked_for_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = GrowthBenchmark(users=(4000,), rounds=1, folder=tmp_path).run()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == result
    assert {"round_ratio", "start_seconds", "start_mib"} <= set(line)
    assert [(one["users"], one["algorithm"]) for one in line["found"]] == [(4000, "uls"), (4000, "els")]
    assert all(one["round_seconds"] > 0 and one["round_mib"] > 0 for one in line["found"])
    assert list(tmp_path.iterdir()) == []


def test_the_ratio_is_the_worse_algorithms_from_fewest_to_most(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {
        ("uls", 10): 1.0,
        ("els", 10): 2.0,
        ("uls", 20): 9.0,
        ("els", 20): 9.0,
        ("uls", 30): 1.1,
        ("els", 30): 3.0,
    }
    found = [
        {"users": users, "algorithm": name, "round_seconds": spent, **ONE} for (name, users), spent in seconds.items()
    ]
    assert summary(found)["round_ratio"] == 1.5
    assert "MISSED" in capsys.readouterr().out


def test_its_stores_are_stores(tmp_path: Path) -> None:
    measure.write(tmp_path / "store", 1000)
    store = UserStore.open(tmp_path / "store", verify=True)
    assert (store.num_users, store.num_rows) == (1000, 3000)
    assert store.split("train").size_counts is not None
    assert store.split("train").num_users == 900
