"""What a run goes on from: the charges of the runs that its model comes from, carried over into its own ledger.

Whoever has the model that training goes on to has what the earlier training released too, so the ε of the whole is
that of all charges composed (composition holds where later releases depend on earlier ones). Each earlier run is one
line of the new ledger, closed in itself: its turns and blocks are of its own draw, and are not merged with others'.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedsim.errors import InvalidInput
from fedsim.hugging_face import hub_file
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import shown_above
from fedsim.privacy.check import charged, counted
from fedsim.privacy.events import Adjacency, Composed, Event, from_json, to_json
from fedsim.privacy.ledger import NOTHING, Ledger, LedgerDamaged, LedgerEntry, merged, read_entries
from fedsim.privacy.unprotected import Unprotected

LEDGER, STATEMENT, MODEL = "ledger.jsonl", "privacy.json", "model"
ADAPTERS = "adapter_model.safetensors"
MARK = "privacy_ledger"
"""Where an exported model names the digest of its ledger, in its config.json, or for adapters, which have none, in the
header of their weights: a copy without the ledger is noticed."""
PRECISION = 1e-3
"""Share of ε below which what is left of a budget is no more than what calibration and bounds leave unused."""
SAME_PEOPLE, OTHER_PEOPLE = "earlier run", "earlier run, of other people"
"""Purposes of the lines of earlier runs: charged to the same people, or noted at no charge because somebody says that
none of these people is in the data now."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The runs that a run goes on from; none by default.

    Attributes:
        entries: A line for the ledger each, oldest first.
        not_covered: What their statements do not cover, sentences.
    """

    entries: tuple[LedgerEntry, ...] = ()
    not_covered: tuple[str, ...] = ()

    @classmethod
    def of_model(
        cls,
        path: str,
        *,
        adjacency: Adjacency,
        others: bool = False,
        mark: str | None = None,
        cached: bool = True,
        revision: str | None = None,
    ) -> Self:
        """The runs that a model comes from; none where it comes from no run of ours.

        Args:
            path: The model's folder, the folder of the run that made it, or a name on the hub.
            adjacency: The change of the data that is to stay hidden from now on.
            others: Whether somebody says that nobody of the earlier runs is in the data now.
            mark: What a model from the hub says at MARK (`mark_of`). Of folders it is read here.
            cached: Whether the hub does not answer: names then stand for what this machine has of them.
            revision: Of a name on the hub.

        Raises:
            InvalidInput: When ledger or statement are missing, are not what was written, or are of another adjacency.
        """
        folder = Path(path).expanduser()
        if folder.is_dir():
            holder, mark = _holder(folder), mark_of(folder / MODEL) or mark_of(folder)
            name = holder.parent.name if holder.name == MODEL else holder.name
        else:
            name = path
        ledger, statement = _accounting(path, cached, revision)
        there = [one.name for one in (ledger, statement) if one.is_file()]
        if not there and mark is None:
            return cls()
        if len(there) < 2:
            raise _without_accounting("model.path", path, there)
        return cls._read(path, name or path, ledger, statement, mark, adjacency, others)

    @classmethod
    def _read(
        cls, path: str, name: str, ledger: Path, statement: Path, mark: str | None, adjacency: Adjacency, others: bool
    ) -> Self:
        try:
            entries = read_entries(ledger)
            said = json.loads(statement.read_text(encoding="utf-8"))
            hidden, private = Adjacency(said["adjacency"]), bool(said["private"])
            stated, not_covered = from_json(said["event"]), tuple(map(str, said["not_covered"]))
        except (LedgerDamaged, OSError, ValueError, KeyError, TypeError) as error:
            said_so = f"{error.args[0]} is missing." if isinstance(error, KeyError) else str(error)
            raise _refused(path, f"Reading them said: {said_so}") from None
        if mark is not None and mark != digest_of(ledger):
            raise _refused(path, f"{LEDGER} is another than the model was exported with.")
        if _cases(counted(stated)) != _cases(charged(entry.event for entry in entries)):
            raise _refused(path, f"{STATEMENT} counts other charges than {LEDGER} holds.")
        if hidden is not adjacency:
            hint = "Guarantees of different changes do not add up."
            raise InvalidInput("plan.adjacency", adjacency.value, f"{hidden.value}, as in {path}", hint)
        lines = [_line(one, others) for one in map(_read_line, entries) if one is not None]
        own: Event = own_event(entries)
        if not private:
            own = Composed(events=(own, Unprotected()))
        last = _Line(name, own, digest_of(ledger))
        return cls(entries=(*lines, _line(last, others)), not_covered=not_covered)

    def upon(self, base: Self) -> Self:
        """What adapters come from, with what their base comes from: first what of that theirs does not tell.

        Args:
            base: The runs of their base.
        """
        known = {one.ledger for one in map(_read_line, self.entries) if one is not None} - {""}
        further = [entry for entry in base.entries if (line := _read_line(entry)) and line.ledger not in known]
        not_covered = dict.fromkeys((*base.not_covered, *self.not_covered) if further else self.not_covered)
        return type(self)(entries=(*further, *self.entries), not_covered=tuple(not_covered))

    @classmethod
    def in_ledger(cls, entries: Sequence[LedgerEntry], not_covered: tuple[str, ...] = ()) -> Self:
        """The earlier runs that a ledger tells of."""
        return cls(entries=tuple(one for one in entries if _read_line(one) is not None), not_covered=not_covered)

    @property
    def names(self) -> tuple[str, ...]:
        """What the runs are called, oldest first."""
        return tuple(one.name for one in map(_read_line, self.entries) if one is not None)

    @property
    def others(self) -> bool:
        """Whether somebody says that their people are not those of the data now."""
        return any(entry.purpose == OTHER_PEOPLE for entry in self.entries)

    @property
    def event(self) -> Composed:
        """What is charged to the people of the data now: nothing, where they are others."""
        return merged(entry.event for entry in self.entries)

    @property
    def all_events(self) -> Composed:
        """What the runs released, whoever the people are."""
        return merged(one.event for one in map(_read_line, self.entries) if one is not None)

    @property
    def digest(self) -> str:
        """Tells apart runs by what they go on from; hexadecimal, empty where that is nothing."""
        if not self.entries:
            return ""
        events = [to_json(one.event) for one in map(_read_line, self.entries) if one is not None]
        return hashlib.sha256(json.dumps(events, sort_keys=True).encode()).hexdigest()

    def require_room(self, epsilon: float, delta: float, adjacency: Adjacency) -> float:
        """Refuse to go on where nothing of the budget is left.

        Returns:
            Certified upper bound on the ε that is spent already.

        Raises:
            InvalidInput: When that is not below epsilon by more than PRECISION.
        """
        spent = epsilon_bounds(self.event, delta, adjacency=adjacency).upper
        if spent * (1 + PRECISION) >= epsilon and math.isfinite(epsilon):
            *most, last = self.names
            runs = f"{', '.join(most)} and {last}" if most else last
            hint = "The limit is of the whole: training cannot take back what was released before it."
            if math.isinf(spent):
                give = "give" if most else "gives"
                allowed = f"inf: {runs} {give} no guarantee, and so does what goes on from there"
                raise InvalidInput("plan.epsilon", epsilon, allowed, hint)
            have = "have" if most else "has"
            allowed = f"above {shown_above(spent)}, what {runs} {have} spent of the same people at δ = {delta:g}"
            raise InvalidInput("plan.epsilon", epsilon, allowed, hint)
        return spent

    def carry_into(self, ledger: Ledger) -> None:
        """Write the lines at the head of a new ledger, or what of them a crash kept from being written.

        Raises:
            InvalidInput: When the ledger begins with other charges.
        """
        for entry, present in zip(self.entries, ledger.entries, strict=False):
            if entry != present:
                allowed = f"a ledger that begins with the charges of {self.names[0]}"
                raise InvalidInput("ledger", str(ledger.path), allowed, "Put the ledger back.")
        for entry in self.entries[len(ledger) :]:
            ledger.charge(entry.event, round=entry.round, purpose=entry.purpose, note=entry.note)

    def to_values(self) -> dict[str, Any]:
        """As JSON values; of_values reads them."""
        lines = [
            {"purpose": entry.purpose, "note": entry.note, "event": to_json(entry.event)} for entry in self.entries
        ]
        return {"lines": lines, "not_covered": list(self.not_covered)}

    @classmethod
    def of_values(cls, values: dict[str, Any] | None) -> Self:
        """What to_values wrote; nothing of None."""
        if values is None:
            return cls()
        entries = [
            LedgerEntry(round=0, purpose=line["purpose"], note=line["note"], event=from_json(line["event"]))
            for line in values["lines"]
        ]
        return cls(entries=tuple(entries), not_covered=tuple(values["not_covered"]))


def own_event(entries: Sequence[LedgerEntry]) -> Composed:
    """What a ledger holds of its own run, without the runs that it went on from."""
    return merged(entry.event for entry in entries if entry.purpose not in (SAME_PEOPLE, OTHER_PEOPLE))


def accounting_beside(
    adapters: str, base: str, *, marks: Mapping[str, str | None], cached: bool, revision: str | None = None
) -> tuple[Path, ...]:
    """Ledger and statement of adapters on their base: theirs, or those of the base; nothing where there are none.

    Args:
        adapters: Folder, or name on the hub.
        base: The same of their base.
        marks: What the two say at MARK (`mark_of`).
        cached: Whether the hub does not answer.
        revision: Of a base on the hub.

    Raises:
        InvalidInput: One is marked as a run's and is without them; or the base has some of which those of the adapters
            do not tell.
    """
    found = []
    for place in (adapters, base):
        files = _accounting(place, cached, revision if place == base else None)
        there = [path.name for path in files if path.is_file()]
        if len(there) < len(files) and (there or marks.get(place) is not None):
            raise _without_accounting("path", place, there)
        if len(there) == len(files):
            found.append(files)
    if len(found) == 2:
        lines = map(_read_line, read_entries(found[0][0]))
        if digest_of(found[1][0]) not in {one.ledger for one in lines if one is not None}:
            hint = f"Their base, {base}, spent something else. Train on from the adapters as they are instead."
            raise InvalidInput("path", adapters, f"adapters whose {LEDGER} tells of what their base spent", hint)
    return found[0] if found else ()


def mark_of(folder: Path) -> str | None:
    """What a model in a folder says at MARK, in its configuration or in the header of its adapters' weights."""
    said: list[Any] = []
    from safetensors import SafetensorError, safe_open  # accounting alone does without

    with suppress(OSError, SafetensorError), safe_open(folder / ADAPTERS, framework="numpy") as weights:
        said.append((weights.metadata() or {}).get(MARK))
    with suppress(OSError, ValueError, AttributeError):
        said.append(json.loads((folder / "config.json").read_text(encoding="utf-8")).get(MARK))
    return next((str(mark) for mark in said if mark is not None), None)


def digest_of(ledger: Path) -> str:
    """SHA-256 of a ledger's file, hexadecimal."""
    return hashlib.sha256(ledger.read_bytes()).hexdigest()


@dataclass(frozen=True)
class _Line:
    """An earlier run: its name, what it released, and the digest of its ledger, by which it is known again."""

    name: str
    event: Event
    ledger: str


def _line(run: _Line, others: bool) -> LedgerEntry:
    named: dict[str, Any] = {"run": run.name, "ledger": run.ledger}
    if not others:
        note = json.dumps(named, ensure_ascii=False)
        return LedgerEntry(round=0, purpose=SAME_PEOPLE, event=run.event, note=note)
    note = json.dumps(named | {"event": to_json(run.event)}, ensure_ascii=False)
    return LedgerEntry(round=0, purpose=OTHER_PEOPLE, event=NOTHING, note=note)


def _read_line(entry: LedgerEntry) -> _Line | None:
    """The earlier run that an entry tells of; None for charges of the run itself."""
    if entry.purpose not in (SAME_PEOPLE, OTHER_PEOPLE):
        return None
    try:
        noted = json.loads(entry.note)
        name, ledger = noted["run"], noted.get("ledger", "")
    except (ValueError, TypeError, KeyError):  # earlier versions noted the name alone
        name, ledger = entry.note, ""
    return _Line(name, entry.event if entry.purpose == SAME_PEOPLE else from_json(noted["event"]), ledger)


def _holder(folder: Path) -> Path:
    """Where the ledger of a model or run folder lies, or should."""
    inside = any((folder / name).exists() for name in (LEDGER, STATEMENT))
    above = folder.resolve().parent
    if not inside and folder.resolve().name == MODEL and any((above / name).exists() for name in (LEDGER, STATEMENT)):
        return above
    return folder


def _accounting(path: str, cached: bool, revision: str | None) -> tuple[Path, Path]:
    """Where ledger and statement of a model lie, or should: beside it, or on the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _holder(folder) / LEDGER, _holder(folder) / STATEMENT
    found = (hub_file(path, one, cached=cached, revision=revision) for one in (LEDGER, STATEMENT))
    ledger, statement = (file or Path(path) / name for file, name in zip(found, (LEDGER, STATEMENT), strict=True))
    return ledger, statement


def _without_accounting(field: str, path: str, there: Sequence[str]) -> InvalidInput:
    missing = " and ".join(one for one in (LEDGER, STATEMENT) if one not in there)
    hint = "Without it nothing can be stated of a model that goes on from this one: put it back."
    return InvalidInput(field, path, f"a result with its {missing}, which a run left there", hint)


def _cases(found: list[Any]) -> set[frozenset[Any]]:
    return {frozenset(case.items()) for case in found}


def _refused(path: str, reason: str) -> InvalidInput:
    return InvalidInput("model.path", path, f"a result whose {LEDGER} and {STATEMENT} are what was written", reason)
