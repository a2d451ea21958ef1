"""What a run goes on from: the charges of the runs that its model comes from, carried over into its own ledger.

Whoever has the model that training goes on to has what the earlier training released too, so the ε of the whole is
that of all charges composed (composition holds where later releases depend on earlier ones). Each earlier run is one
line of the new ledger, closed in itself: its turns and blocks are of its own draw, and are not merged with others'.
"""

import hashlib
import json
import math
from collections.abc import Sequence
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
MARK = "privacy_ledger"
"""Where the config.json of an exported model names the digest of its ledger: a copy without the ledger is noticed."""
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
        cls, path: str, *, adjacency: Adjacency, others: bool = False, mark: str | None = None, cached: bool = True
    ) -> Self:
        """The runs that a model comes from; none where it comes from no run of ours.

        Args:
            path: The model's folder, the folder of the run that made it, or a name on the hub.
            adjacency: The change of the data that is to stay hidden from now on.
            others: Whether somebody says that nobody of the earlier runs is in the data now.
            mark: What the configuration of a model from the hub says at MARK. Of folders it is read here.
            cached: Whether the hub does not answer: names then stand for what this machine has of them.

        Raises:
            InvalidInput: When ledger or statement are missing, are not what was written, or are of another adjacency.
        """
        folder = Path(path).expanduser()
        if folder.is_dir():
            holder, mark = _holder(folder), _mark_in(folder)
            name = holder.parent.name if holder.name == MODEL else holder.name
            ledger, statement = holder / LEDGER, holder / STATEMENT
        else:
            name = path
            ledger, statement = (hub_file(path, one, cached=cached) or Path(path) / one for one in (LEDGER, STATEMENT))
        there = [one.name for one in (ledger, statement) if one.is_file()]
        if not there and mark is None:
            return cls()
        if len(there) < 2:
            missing = " and ".join(one for one in (LEDGER, STATEMENT) if one not in there)
            hint = "Without it nothing can be stated of a model that goes on from this one: put it back."
            raise InvalidInput("model.path", path, f"a result with its {missing}, which a run left there", hint)
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
        lines = [_line(one.name, one.event, others) for one in map(_read_line, entries) if one is not None]
        own: Event = own_event(entries)
        if not private:
            own = Composed(events=(own, Unprotected()))
        return cls(entries=(*lines, _line(name, own, others)), not_covered=not_covered)

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


def accounting_beside(*places: str) -> tuple[Path, ...]:
    """Ledger and statement of the first of some models' folders that has them; nothing where none has."""
    for place in places:
        holder = _holder(Path(place))
        files = (holder / LEDGER, holder / STATEMENT)
        if all(path.is_file() for path in files):
            return files
    return ()


def digest_of(ledger: Path) -> str:
    """SHA-256 of a ledger's file, hexadecimal."""
    return hashlib.sha256(ledger.read_bytes()).hexdigest()


@dataclass(frozen=True)
class _Line:
    name: str
    event: Event


def _line(name: str, event: Event, others: bool) -> LedgerEntry:
    if not others:
        return LedgerEntry(round=0, purpose=SAME_PEOPLE, event=event, note=name)
    note = json.dumps({"run": name, "event": to_json(event)}, ensure_ascii=False)
    return LedgerEntry(round=0, purpose=OTHER_PEOPLE, event=NOTHING, note=note)


def _read_line(entry: LedgerEntry) -> _Line | None:
    """The earlier run that an entry tells of; None for charges of the run itself."""
    if entry.purpose == SAME_PEOPLE:
        return _Line(entry.note, entry.event)
    if entry.purpose == OTHER_PEOPLE:
        noted = json.loads(entry.note)
        return _Line(noted["run"], from_json(noted["event"]))
    return None


def _holder(folder: Path) -> Path:
    """Where the ledger of a model or run folder lies, or should."""
    inside = any((folder / name).exists() for name in (LEDGER, STATEMENT))
    above = folder.resolve().parent
    if not inside and folder.resolve().name == MODEL and any((above / name).exists() for name in (LEDGER, STATEMENT)):
        return above
    return folder


def _mark_in(folder: Path) -> str | None:
    """What the model's own configuration says at MARK."""
    for path in (folder / MODEL / "config.json", folder / "config.json"):
        try:
            mark = json.loads(path.read_text(encoding="utf-8")).get(MARK)
        except (OSError, ValueError, AttributeError):
            continue
        if mark is not None:
            return str(mark)
    return None


def _cases(found: list[Any]) -> set[frozenset[Any]]:
    return {frozenset(case.items()) for case in found}


def _refused(path: str, reason: str) -> InvalidInput:
    return InvalidInput("model.path", path, f"a result whose {LEDGER} and {STATEMENT} are what was written", reason)
