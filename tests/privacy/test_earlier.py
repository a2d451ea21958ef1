"""What a run goes on from: found beside the model, as it was written, and counted as a whole."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from stated import ULS, stated

from fedsim.config import PlanConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.sources import find_source
from fedsim.plan import Plan
from fedsim.privacy.accountant import delta_bounds, delta_bounds_at, epsilon_bounds
from fedsim.privacy.check import charged, counted
from fedsim.privacy.earlier import MARK, Earlier, digest_of, own_event
from fedsim.privacy.events import Adjacency, Composed, Event, OfBlock, RandomAllocatedGaussian, Repeated, to_json
from fedsim.privacy.ledger import NOTHING, Ledger, merged, read_entries
from fedsim.privacy.unprotected import Unprotected
from fedsim.release import LEFT
from fedsim.sampling import CyclicPoisson
from fedsim.seeds import Seeds
from fedsim.statement import REPRODUCIBLE_NOISE, privacy_statement
from server.training import require_charged

ADD_OR_REMOVE = Adjacency.ADD_OR_REMOVE_ONE_USER
IN_TURNS = dataclasses.replace(ULS, sampling=CyclicPoisson(groups=2))


def finished(
    folder: Path, plan: Plan = ULS, steps: int = 4, after: Earlier | None = None, adapters: bool = False, **statement
) -> Path:
    """The folder of a finished run, without training it; of a run that left adapters, say."""
    after = Earlier() if after is None else after
    folder.mkdir(parents=True)
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        after.carry_into(ledger)
        for round in range(steps if plan.noise_multiplier else 0):
            ledger.charge(plan.charge(round), round=round)
        whole = stated(plan, own_event(ledger.entries), steps=steps, earlier=after, **statement)
    values = whole.to_json()
    (folder / "privacy.json").write_text(json.dumps(values))
    (folder / "config.json").write_text("{}")
    shutil.copytree(folder, folder / "model")
    mark = {MARK: digest_of(folder / "ledger.jsonl")}
    if adapters:
        (folder / "model/config.json").unlink()
        save_file({"lora_A": np.zeros(2)}, folder / "model/adapter_model.safetensors", metadata=mark)
    else:
        (folder / "model/config.json").write_text(json.dumps(mark))
    return folder


def earlier(folder: Path, *, others: bool = False) -> Earlier:
    return Earlier.of_model(str(folder), adjacency=ADD_OR_REMOVE, others=others)


def without_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().rsplit(b"\n", 2)[0] + b"\n")


def changed(path: Path) -> None:
    assert b'"noise_multiplier": 1.5' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier": 1.5', b'"noise_multiplier": 9.0'))


def both_alike(path: Path) -> None:
    """Ledger and statement cut short so that they agree: the model alone tells."""
    without_last_line(path)
    said = json.loads((path.parent / "privacy.json").read_text())
    said["event"] = to_json(merged(entry.event for entry in read_entries(path)))
    (path.parent / "privacy.json").write_text(json.dumps(said))


def both_gone(path: Path) -> None:
    path.unlink()
    (path.parent / "privacy.json").unlink()


def statement_gone(path: Path) -> None:
    (path.parent / "privacy.json").unlink()


@pytest.mark.parametrize("harm", [without_last_line, changed, both_alike, Path.unlink, both_gone, statement_gone])
@pytest.mark.parametrize("form", [".", "model", "copy"])
@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_not_as_it_was_written_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], form: str, adapters: bool
) -> None:
    run = finished(tmp_path / "x", adapters=adapters)
    folder = shutil.copytree(run / "model", tmp_path / "copy") if form == "copy" else run / form
    assert earlier(folder).event == merged(entry.event for entry in read_entries(run / "ledger.jsonl"))
    harm(folder / "ledger.jsonl")
    if form == "model" and harm is both_gone:
        assert earlier(folder).names == ("x",)  # the run's own ledger lies above
        return
    with pytest.raises(InvalidInput, match=r"model\.path"):
        earlier(folder)


def test_a_shortened_ledger_of_older_adapters_is_told_by_their_statement(tmp_path: Path) -> None:
    run = finished(tmp_path / "x")
    (run / "model/config.json").unlink()  # adapters have none, and some have no mark in their weights
    assert earlier(run / "model").names == ("x",)
    without_last_line(run / "model/ledger.jsonl")
    with pytest.raises(InvalidInput, match="counts other charges than"):
        earlier(run / "model")


def test_any_other_model_has_no_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert earlier(tmp_path) == Earlier()
    assert Earlier.of_model("someone/model", adjacency=ADD_OR_REMOVE) == Earlier()


def test_a_model_from_the_hub_that_was_trained_here_needs_its_ledger() -> None:
    with pytest.raises(InvalidInput, match="put it back"):
        Earlier.of_model("someone/model", adjacency=ADD_OR_REMOVE, mark="0" * 64)


def test_the_model_is_in_its_run_folder(tmp_path: Path) -> None:
    run = finished(tmp_path / "x")
    for folder in (run, run / "model"):
        (run / "model/model.safetensors").touch()
        assert find_source(str(folder)).base == str(run / "model")


def test_each_run_is_closed_in_itself(tmp_path: Path) -> None:
    """Turns and blocks of two runs are two draws: nobody is in the same group of both for certain."""
    first = finished(tmp_path / "x", IN_TURNS)
    second = finished(tmp_path / "y", IN_TURNS, after=earlier(first))
    found = earlier(second)
    assert found.names == ("x", "y")
    twice = epsilon_bounds(Repeated(event=IN_TURNS.event(4), count=2), 1e-5)
    assert epsilon_bounds(found.event, 1e-5).upper == pytest.approx(twice.upper, rel=1e-3)
    block = RandomAllocatedGaussian(rounds_per_block=2, noise_multiplier=1.0)
    for place in range(2):
        with Ledger.open(tmp_path / f"{place}.jsonl") as ledger:
            ledger.charge(OfBlock(event=block, block=0), round=0)
            closed = own_event(ledger.entries)
        with Ledger.open(tmp_path / "both.jsonl") as ledger:
            ledger.charge(closed, round=0, purpose="earlier run")
    assert Ledger.open(tmp_path / "both.jsonl").event() == Composed(events=(Repeated(event=block, count=2),))


def test_the_second_method_counts_turns_of_several_runs_apart(tmp_path: Path) -> None:
    uneven = finished(tmp_path / "x", IN_TURNS, steps=3)  # one group has two rounds, one has one
    again = finished(tmp_path / "y", IN_TURNS, steps=3, after=earlier(uneven))
    entries = read_entries(finished(tmp_path / "z", ULS, after=earlier(again)) / "ledger.jsonl")
    cases = charged(entry.event for entry in entries)
    assert sorted(case[IN_TURNS.step_event()] for case in cases) == [2, 3, 4]
    assert sorted(
        map(sorted, (case.values() for case in counted(merged(entry.event for entry in entries))))
    ) == sorted(map(sorted, (case.values() for case in cases)))


def test_the_whole_is_composed_and_not_summed(tmp_path: Path) -> None:
    first = finished(tmp_path / "x")
    whole = json.loads((finished(tmp_path / "y", after=earlier(first)) / "privacy.json").read_text())
    assert whole["epsilon"]["upper"] == epsilon_bounds(ULS.event(8), 1e-5).upper
    assert whole["steps"] == 4
    assert whole["earlier"] == {"runs": ["x"], "people": "same", "event": to_json(merged([ULS.event(4)]))}
    assert "The models of this run and of what it went on from (x) together are" in whole["in_words"]
    assert "--ledger ledger.jsonl" in whole["recompute"]


def test_a_run_without_noise_leaves_no_guarantee(tmp_path: Path) -> None:
    bare = finished(tmp_path / "x", dataclasses.replace(ULS, noise_multiplier=0.0))
    found = earlier(bare)
    assert epsilon_bounds(found.event, 1e-5).lower == math.inf
    assert delta_bounds(found.event, 3.0).lower == 1.0
    assert delta_bounds_at(found.event, [1.0])[0] == [1.0]
    with pytest.raises(InvalidInput, match=r"plan\.epsilon.*x gives no guarantee"):
        found.require_room(1e9, 1e-5, ADD_OR_REMOVE)
    assert found.require_room(math.inf, 1e-5, ADD_OR_REMOVE) == math.inf
    private = finished(tmp_path / "y", after=found)
    said = json.loads((private / "privacy.json").read_text())
    assert not said["private"]
    assert "NO privacy guarantee" in said["in_words"]
    assert "The model that it went on from was trained without a guarantee" in said["in_words"]
    assert Unprotected() in _parts(earlier(private).event)


def _parts(event: Event) -> set[Event]:
    parts = {event}
    for part in getattr(event, "events", [getattr(event, "event", None)]):
        parts |= _parts(part) if isinstance(part, Event) else set()
    return parts


def test_other_people_are_somebodys_word_and_the_next_run_counts_them_again(tmp_path: Path) -> None:
    found = earlier(finished(tmp_path / "x"), others=True)
    assert found.event == NOTHING
    second = finished(tmp_path / "y", after=found)
    said = json.loads((second / "privacy.json").read_text())
    assert said["epsilon"]["upper"] == epsilon_bounds(ULS.event(4), 1e-5).upper
    assert "whoever ran this says that nobody whose data was used there" in said["in_words"]
    assert said["earlier"]["people"] == "others"
    assert epsilon_bounds(earlier(second).event, 1e-5) == epsilon_bounds(ULS.event(8), 1e-5)
    assert earlier(second, others=True).event == NOTHING


def test_other_people_are_spoken_of_where_there_was_a_run_alone() -> None:
    with pytest.raises(InvalidInput, match="earlier-people"):
        RunConfig(earlier_people="others").earlier_runs()


def test_a_spent_budget_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "x")
    spent = epsilon_bounds(ULS.event(4), 1e-5).upper

    def at(epsilon: float) -> RunConfig:
        return RunConfig(model=ModelConfig(path=str(run)), plan=PlanConfig(epsilon=epsilon))

    assert at(spent + 0.1).earlier_runs().names == ("x",)
    for limit in (spent / 2, spent, spent * 1.0002):  # what calibration to a limit leaves of it is nothing
        with pytest.raises(InvalidInput, match=r"plan\.epsilon.*has spent of the same people"):
            at(limit).earlier_runs()


def test_noise_is_found_such_that_the_whole_meets_the_target(tmp_path: Path) -> None:
    before = earlier(finished(tmp_path / "x")).event
    spent = epsilon_bounds(before, 1e-5).upper
    plan = ULS.calibrate(spent + 1, before=before)
    whole = epsilon_bounds(Composed(events=(before, plan.event())), 1e-5).upper
    assert spent + 0.99 < whole <= spent + 1
    assert plan.noise_multiplier > ULS.calibrate(spent + 1).noise_multiplier


def test_guarantees_of_different_changes_do_not_add_up(tmp_path: Path) -> None:
    run = finished(tmp_path / "x")
    with pytest.raises(InvalidInput, match=r"plan\.adjacency.*add-or-remove-one-user, as in"):
        Earlier.of_model(str(run), adjacency=Adjacency.REPLACE_ONE_USER)


def test_what_an_earlier_statement_does_not_cover_is_not_covered(tmp_path: Path) -> None:
    found = earlier(finished(tmp_path / "x", seeds_given=("noise",), noise_origin="secure"))
    said = privacy_statement(
        ULS, ULS.event(3), sizes={"w": 3}, steps=3, versions={}, earlier=found, noise_origin="secure-exact"
    )
    assert said.not_covered[0] == REPRODUCIBLE_NOISE
    assert any("sums are rounded in floating point" in sentence for sentence in said.not_covered)
    assert len(set(said.not_covered)) == len(said.not_covered)


def test_lines_that_a_crash_kept_from_being_written_follow(tmp_path: Path) -> None:
    second = finished(tmp_path / "y", after=earlier(finished(tmp_path / "x")))
    found = Earlier.of_values(json.loads(json.dumps(earlier(second).to_values())))
    assert found == earlier(second)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        dataclasses.replace(found, entries=found.entries[:1]).carry_into(ledger)
        found.carry_into(ledger)
        found.carry_into(ledger)
        assert Earlier.in_ledger(ledger.entries, found.not_covered) == found
    with Ledger.open(tmp_path / "another.jsonl") as ledger:
        ledger.charge(ULS.step_event(), round=0)
        with pytest.raises(InvalidInput, match="begins with the charges of x"):
            found.carry_into(ledger)


def test_neither_earlier_runs_nor_notes_stand_for_the_charge_of_a_round(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        earlier(finished(tmp_path / "x")).carry_into(ledger)
        ledger.charge(NOTHING, round=0, purpose=LEFT)
        with pytest.raises(InvalidInput, match="Put the ledger back"):
            require_charged(ledger, rounds=1, entries=2)
        ledger.charge(ULS.step_event(), round=0)
        require_charged(ledger, rounds=1, entries=3)
        with pytest.raises(InvalidInput, match="Put the ledger back"):  # a checkpoint saw one charge more
            require_charged(ledger, rounds=1, entries=4)


def test_the_same_seeds_draw_anew_in_a_run_that_goes_on(tmp_path: Path) -> None:
    first = finished(tmp_path / "x")
    second = finished(tmp_path / "y", after=earlier(first))
    config = RunConfig(sampling_seed=1, noise_seed=2)
    drawn = [Seeds.drawn(config, one.digest) for one in (Earlier(), earlier(first), earlier(second))]
    assert (drawn[0].sampling, drawn[0].noise) == (1, 2)
    assert len({seeds.sampling for seeds in drawn}) == len({seeds.noise for seeds in drawn}) == 3
