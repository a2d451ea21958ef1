"""What was found of the models, as Markdown: a row a family, a cell a form of training, reasons below."""

from benchmarks.models.families import CLASSIFIERS, DECODERS
from benchmarks.models.measure import Case, Finding, Form

LANGUAGE: dict[Form, str] = {"full": "all weights", "LoRA": "LoRA", "LoRA, bfloat16": "LoRA over bfloat16"}
CLASSIFYING: dict[Form, str] = {"classifier": "all weights", "classifier, LoRA": "LoRA"}


def markdown(findings: dict[Case, Finding]) -> str:
    """Two tables, of language models and of classifiers, and what their notes stand for."""
    notes: dict[str, int] = {}
    parts = [
        _table("language model", list(DECODERS), LANGUAGE, findings, notes),
        _table("classifier", list(CLASSIFIERS), CLASSIFYING, findings, notes),
        "\n".join(f"{number}. {note}" for note, number in notes.items()),
    ]
    return "\n\n".join(parts) + "\n"


def summary(findings: dict[Case, Finding]) -> dict[str, float | int]:
    """How many rows there are of each kind, and the worst and the usual of what was measured."""
    found = list(findings.values())
    ours = [one for one in found if one.fast]
    memory = sorted(one.memory for one in ours)
    return {
        "models.rows": len(found),
        "models.fast": len(ours),
        "models.generic": sum(one.trains and not one.reference and bool(one.generic) for one in found),
        "models.reference": sum(one.trains and bool(one.reference) for one in found),
        "models.refused": sum(bool(one.refusal) for one in found),
        "models.faults": sum(bool(one.fault) for one in found),
        "models.apart": sum(one.trains and not one.agrees for one in found),
        "models.exported": sum(one.exported for one in found),
        "models.worst_error": max((one.error for one in found if one.trains and not one.loop_error), default=0.0),
        "models.worst_half_error_over_loop": max(
            (one.error / one.loop_error for one in found if one.loop_error), default=0.0
        ),
        "models.median_memory_over_loop": memory[len(memory) // 2] if memory else 0.0,
    }


def line(case: Case, finding: Finding) -> str:
    """A case in a line of text."""
    if not finding.trains:
        return f"{case.name}: {finding.refusal or finding.fault}"
    return f"{case.name}: {_path(finding)}, {_measures(finding)}" + ("" if finding.exported else ", not exported")


def _table(
    kind: str, families: list[str], forms: dict[Form, str], findings: dict[Case, Finding], notes: dict[str, int]
) -> str:
    rows = [f"| {kind} | {' | '.join(forms.values())} | longest row |", "|---" * (len(forms) + 2) + "|"]
    for family in families:
        found = [findings[Case(family=family, form=form)] for form in forms]
        contexts = [str(one.context or "any") for one in found if one.trains] or ["–"]
        rows.append(f"| {family} | {' | '.join(_cell(one, notes) for one in found)} | {contexts[0]} |")
    return "\n".join(rows)


def _cell(finding: Finding, notes: dict[str, int]) -> str:
    if not finding.trains:
        return f"refused{_note(finding.refusal, notes)}" if finding.refusal else f"fault{_note(finding.fault, notes)}"
    why = f"Loop: {finding.reference}." if finding.reference else ""
    if finding.generic and not why:
        why = f"No rule of its own: {', '.join(finding.generic)}."
    word = "loop" if finding.reference else "generic" if finding.generic else "fast"
    return f"{word}{_note(why, notes) if why else ''}, {_measures(finding)}"


def _path(finding: Finding) -> str:
    if finding.reference:
        return f"loop ({finding.reference})"
    return f"generic ({', '.join(finding.generic)})" if finding.generic else "fast"


def _measures(finding: Finding) -> str:
    apart = f"{finding.error:.0e}" if not finding.loop_error else f"{finding.error / finding.loop_error:.1f} × loop's"
    return f"{apart}, ×{finding.memory:.1f}"


def _note(text: str, notes: dict[str, int]) -> str:
    number = notes.setdefault(text.replace("|", "\\|"), len(notes) + 1)
    return f" ({number})"
