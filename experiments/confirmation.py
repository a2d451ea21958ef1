"""`account --check`: what a folder states, against its own ledger and a second method for ε."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from json import dumps
from pathlib import Path
from typing import Any

from fedsim.errors import Failure, InvalidInput
from fedsim.privacy.bounds import shown_above
from fedsim.privacy.check import BoundCheck, NotCheckable, Verdict, charged, confirm, counted
from fedsim.privacy.events import Adjacency, Event, from_json
from fedsim.privacy.ledger import NOTHING, LedgerDamaged, read_entries
from fedsim.privacy.splits import HELD_OUT, OfSplit
from fedsim.registry import import_module

PRIVACY, LEDGER, CONFIG, SUMMARY = "privacy.json", "ledger.jsonl", "config.json", "summary.json"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        verdict: What came of it.
        sentence: The same in words.
        figures: Numbers behind it.
    """

    verdict: Verdict
    sentence: str
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Statement:
    """What a run's privacy.json claims.

    Attributes:
        delta: δ.
        lower, upper: Bounds on ε.
        adjacency: The change that stays hidden.
        event: What was released.
        words: The paragraph for people.
        of_splits: Bounds on ε of training and of held-out users, where these are told apart.
    """

    delta: float
    lower: float
    upper: float
    adjacency: Adjacency
    event: Event
    words: str
    of_splits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def confirm_folder(folder: Path, modules: tuple[str, ...], *, as_json: bool) -> int:
    """Check a run's folder, or every run of a comparison or sweep, and print a sentence for each thing looked at.

    Args:
        folder: The folder.
        modules: Modules of somebody's own to import, for their kinds of release.
        as_json: Print one JSON object instead.

    Returns:
        0, when all that is stated is confirmed.

    Raises:
        InvalidInput: When there is no run in the folder, or a file of it cannot be read.
        Failure: When something is contradicted, or cannot be told.
    """
    for module in modules:
        import_module("modules", module, module)
    start = time.perf_counter()
    found: dict[str, list[Finding]] = {}
    for run in _runs(folder):
        found[str(run)] = findings = []
        for finding in _findings(run):
            findings.append(finding)
            if not as_json:
                print(f"{run}: {finding.verdict.value}: {finding.sentence}")
        if not findings and not as_json:
            print(f"{run}: states no guarantee")
    seconds = time.perf_counter() - start
    verdict = _together([finding.verdict for findings in found.values() for finding in findings])
    if as_json:
        print(dumps(_described(found, verdict, seconds), ensure_ascii=False, allow_nan=False))
    if verdict is not Verdict.CONFIRMED:
        what = "is contradicted" if verdict is Verdict.CONTRADICTED else "could not be confirmed"
        bad = [finding.sentence for findings in found.values() for finding in findings if finding.verdict is verdict]
        raise Failure(f"what {folder} states {what}: {bad[0] if bad else 'it states no guarantee'}.")
    if not as_json:
        print(f"confirmed in {seconds:.1f} s by a contour integral: a numerical check, which certifies nothing itself")
    return 0


def _runs(folder: Path) -> list[Path]:
    """The folder, if it is a run's, or those below it that are."""
    if (folder / PRIVACY).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{PRIVACY}") if path.parent.suffix != ".partial")
    if not found:
        raise InvalidInput("check", str(folder), f"the folder of a run, comparison or sweep, with {PRIVACY} in it")
    return found


def _findings(run: Path) -> Iterator[Finding]:
    """What there is to say of one run, as it is found."""
    statement = _statement(run / PRIVACY)
    if statement is None:
        return
    try:
        entries = read_entries(run / LEDGER)
    except LedgerDamaged as damage:
        yield Finding(Verdict.CONTRADICTED, f"{LEDGER} is not what was written: line {damage.line}, {damage.reason}")
        return
    cases = charged(entry.event for entry in entries)
    count = sum(entry.event != NOTHING for entry in entries)
    same = _as_set(counted(statement.event)) == _as_set(cases)
    yield _compared(f"{PRIVACY} counts what the {count} charges of {LEDGER} hold", same)
    yield from _beside(run, statement)
    yield from _bounds(statement, cases)
    for split, (lower, upper) in statement.of_splits.items():
        mine = [one.event for one in entries if not isinstance(one.event, OfSplit) or one.event.split == split]
        yield from _bounds(replace(statement, lower=lower, upper=upper), charged(mine), f"for {split} users ")
        shown = f"it is {shown_above(upper)}" if split == HELD_OUT else f"ε is {shown_above(upper)}"
        yield _compared(f"its words say of {split} users that {shown}", shown in statement.words)
    if statement.of_splits:
        largest = max(upper for _, upper in statement.of_splits.values())
        yield _compared("its ε is at least that of either split", largest <= statement.upper)


def _as_set(cases: list[Counter[Event]]) -> set[frozenset[tuple[Event, int]]]:
    return {frozenset(case.items()) for case in cases}


def _beside(run: Path, statement: Statement) -> Iterator[Finding]:
    """The statement, against the run's other files."""
    stated = f"ε = {shown_above(statement.upper)}, δ = {statement.delta:g}"
    yield _compared(f"its words say {stated}", f"{stated}:" in statement.words)
    if (run / CONFIG).is_file():
        plan = _read(run / CONFIG).get("plan", {})
        same = (plan.get("delta"), plan.get("adjacency")) == (statement.delta, statement.adjacency.value)
        yield _compared(f"δ = {statement.delta:g} and {statement.adjacency.value} are those of {CONFIG}", same)
    if (run / SUMMARY).is_file():
        same = _read(run / SUMMARY).get("epsilon") == statement.upper
        yield _compared(f"{SUMMARY} names the same ε", same)


def _bounds(statement: Statement, cases: list[Counter[Event]], whose: str = "") -> Iterator[Finding]:
    """Both bounds on ε, by the second method, from what the ledger holds."""
    try:
        found = confirm(cases, statement.delta, (statement.lower, statement.upper), statement.adjacency)
    except NotCheckable as unknown:
        yield Finding(Verdict.UNDECIDED, f"the second method does not know what was released: {unknown}")
        return
    for sign, bound in (("≤", found.upper), ("≥", found.lower)):
        yield Finding(bound.verdict, whose + _in_words(sign, bound, statement.delta), _figures(bound))


def _in_words(sign: str, bound: BoundCheck, delta: float) -> str:
    claim = f"ε {sign} {bound.epsilon:.6g}"
    if bound.delta is None:
        return f"{claim}, which holds in any case"
    side = "at most" if sign == "≤" else "at least"
    return (
        f"{claim}: there the second method finds δ = {bound.delta:.9g} ± {bound.error:.1g}, "
        f"and it must be {side} {delta:g}"
    )


def _figures(bound: BoundCheck) -> dict[str, float | None]:
    error = bound.error if bound.error < float("inf") else None
    return {"epsilon": bound.epsilon, "delta": bound.delta, "error": error}


def _compared(claim: str, holds: bool) -> Finding:
    return Finding(Verdict.CONFIRMED, claim) if holds else Finding(Verdict.CONTRADICTED, f"it is not so that {claim}")


def _together(verdicts: list[Verdict]) -> Verdict:
    for verdict in (Verdict.CONTRADICTED, Verdict.UNDECIDED):
        if verdict in verdicts:
            return verdict
    return Verdict.CONFIRMED if verdicts else Verdict.UNDECIDED


def _statement(path: Path) -> Statement | None:
    """What a privacy.json claims; None where it claims nothing, as for a run without noise."""
    values = _read(path)
    try:
        if not values["private"]:
            return None
        return Statement(
            delta=float(values["delta"]),
            lower=float(values["epsilon"]["lower"]),
            upper=float(values["epsilon"]["upper"]),
            adjacency=Adjacency(values["adjacency"]),
            event=from_json(values["event"]),
            words=str(values["in_words"]),
            of_splits={
                split: (float(bounds["lower"]), float(bounds["upper"]))
                for split, bounds in values.get("private_evaluation", {"epsilon": {}})["epsilon"].items()
            },
        )
    except InvalidInput:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            "check", str(path), "a privacy statement", f"It lacks, or has otherwise: {error}."
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput("check", str(path), "a JSON file that can be read", f"{error}.") from None
    if not isinstance(values, dict):
        raise InvalidInput("check", str(path), "a JSON object")
    return values


def _described(found: dict[str, list[Finding]], verdict: Verdict, seconds: float) -> dict[str, Any]:
    """All findings, as JSON values."""
    runs = {
        run: [{"verdict": one.verdict.value, "in_words": one.sentence, **one.figures} for one in findings]
        for run, findings in found.items()
    }
    return {"kind": "check", "verdict": verdict.value, "runs": runs, "seconds": seconds}
