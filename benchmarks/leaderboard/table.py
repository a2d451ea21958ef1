"""The table: for each task and tier of ε its rows, the least loss first."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.leaderboard.entry import Entry
from benchmarks.leaderboard.tasks import TASKS, Task
from experiments.report.markdown import table
from fedsim.privacy.bounds import shown_above

BEGIN, END = "<!-- the leaderboard -->", "<!-- the end of the leaderboard -->"
"""Between these lines of the page stands what `table --page` wrote."""
COLUMNS = ("", "held-out loss", "± 95 %", "runs", "user-level ε, certified", "who", "date", "one command", "entry")


def tables(entries: Mapping[Path, Entry]) -> str:
    """Markdown of all tasks.

    Args:
        entries: By file; the table links each by its name, in the folder `leaderboard` beside the page.
    """
    return "\n\n".join(
        part
        for task in TASKS.values()
        for part in _of_task(task, {path: one for path, one in entries.items() if one.task == task.name})
    )


def _of_task(task: Task, entries: Mapping[Path, Entry]) -> Iterator[str]:
    kept = task.figures
    yield f"### {task.name}"
    users = sum(kept.users_by_rows.values())
    yield (
        f"{task.text[0].upper()}{task.text[1:]}; {task.base}. δ = {task.delta:g}; {users:,} training users; the loss "
        f"is that of {kept.test_rows:,} rows of {kept.test_users:,} test users, "
        f"{kept.base_loss:.3f} before training."
    )
    if not entries:
        yield "There is no entry yet."
    for tier in task.tiers:
        rows = {path: one for path, one in entries.items() if task.tier(one.epsilon) == tier}
        if rows:
            yield f"ε ≤ {tier:g}:"
            yield table(COLUMNS, [_row(path, rows[path]) for path in sorted(rows, key=lambda p: rows[p].loss)])


def _row(path: Path, entry: Entry) -> Sequence[str]:
    return [
        f"[{entry.title}]({entry.link})" if entry.link else entry.title,
        f"{entry.loss:.4f}",
        "–" if entry.half_width is None else f"{entry.half_width:.4f}",
        str(len(entry.runs)),
        shown_above(entry.epsilon),
        entry.who,
        entry.date,
        "yes" if entry.arguments is not None else f"no: {entry.words}",
        f"[{path.stem}](leaderboard/{path.name})",
    ]
