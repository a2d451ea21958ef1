"""What adapters come from, and their base: each run counted once, from folders and from the hub."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from test_earlier import IN_TURNS, earlier, finished

from fedsim.config import PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.sources import Source
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.earlier import Earlier
from fedsim.privacy.events import Composed
from fedsim.privacy.ledger import NOTHING, read_entries
from fedsim.resources import accounting_of, earlier_runs


@pytest.mark.parametrize("others", [False, True])
def test_adapters_and_their_base_are_both_counted_and_none_of_them_twice(tmp_path: Path, others: bool) -> None:
    """Whoever has the adapters has their base, whether or not their ledger knew of it."""
    base = earlier(finished(tmp_path / "x", after=earlier(finished(tmp_path / "w"))), others=others)
    known = finished(tmp_path / "y", after=base, adapters=True)
    strange = finished(tmp_path / "z", IN_TURNS, adapters=True)  # of the same plan as another, and yet another run
    alike = finished(tmp_path / "v", adapters=True, steps=3)
    shutil.move(tmp_path / "x", tmp_path / "moved")
    base = earlier(tmp_path / "moved", others=others)
    assert earlier(known, others=others).upon(base).names == ("w", "x", "y")
    for folder in (strange, alike):
        both = earlier(folder, others=others).upon(base)
        assert both.names == ("w", "moved", folder.name)
        assert both.others is others
        parts = [earlier(folder).all_events, earlier(tmp_path / "moved").all_events]
        assert epsilon_bounds(both.all_events, 1e-5) == epsilon_bounds(Composed(events=tuple(parts)), 1e-5)
        assert (both.event == NOTHING) is others
        ledger = finished(tmp_path / f"after-{folder.name}", after=both) / "ledger.jsonl"
        assert Earlier.in_ledger(read_entries(ledger)).names == both.names
    nothing = Earlier()
    assert nothing.upon(base) == base
    assert base.upon(nothing) == base


def test_lines_of_earlier_versions_are_read_and_their_base_counted_once_more(tmp_path: Path) -> None:
    """They noted a name alone, by which nothing is known again for certain: the bound is above then, never below."""
    base = earlier(finished(tmp_path / "x"))
    older = dataclasses.replace(base, entries=(dataclasses.replace(base.entries[0], note="x"),))
    assert older.names == ("x",)
    assert older.event == base.event
    assert earlier(finished(tmp_path / "y", after=older)).upon(base).names == ("x", "x", "y")


@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_named_on_the_hub_is_counted_with_what_lies_beside_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    on_hub = finished(tmp_path / "x", adapters=adapters) / "model"
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    asked: list[tuple[str, str, str | None]] = []

    def fetched(name: str, file: str, *, cached: bool, revision: str | None = None) -> Path | None:
        asked.append((name, file, revision))
        found = (tmp_path / "base" if name == "someone/base" else on_hub) / file
        return found if found.is_file() else None

    def of_name(place: str, name: str, cached: bool, revision: str | None = None) -> str | None:
        found = fetched(place, name, cached=cached, revision=revision)
        return None if found is None else str(found)

    monkeypatch.setattr("fedsim.privacy.earlier.hub_file", fetched)
    monkeypatch.setattr("fedsim.resources.file_of", of_name)
    config = RunConfig(model=ModelConfig(path="someone/tuned"), plan=PlanConfig(epsilon=1000.0, delta=1e-5))
    plain = Source(base="someone/tuned")
    source = Source(base="someone/base", adapters="someone/tuned", revision="v2") if adapters else plain
    found = earlier_runs(config, source)
    assert found.names == ("someone/tuned",)
    assert found.event == earlier(tmp_path / "x").event
    assert {revision for name, _, revision in asked if name == "someone/base"} <= {"v2"}
    assert {revision for name, _, revision in asked if name == "someone/tuned"} == {None}
    if adapters:
        assert accounting_of(source) == (on_hub / "ledger.jsonl", on_hub / "privacy.json")
    for name in ("ledger.jsonl", "privacy.json"):
        (on_hub / name).unlink()
    with pytest.raises(InvalidInput, match="put it back"):
        earlier_runs(config, source)
    if adapters:
        with pytest.raises(InvalidInput, match="put it back"):
            accounting_of(source)
