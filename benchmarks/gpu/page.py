"""The benchmark's lines as a page: what each cell means, and what it found."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import fill

from benchmarks.gpu.cells import CELLS, Cell
from benchmarks.gpu.findings import FINISHED, Line, endings
from fedsim.phases import PHASES

BASELINE, COMPILED = "non-private", "non-private, compiled"
COLUMNS = (
    "case", "way", "micro-batch", "steps", "ms", "tokens/s", "over non-private", "over compiled", "memory, MiB",
    "kernels",
)  # fmt: skip
EXPLANATION = """\
`python -m benchmarks.gpu --minutes 9 --out DIR` writes this page from `lines.jsonl`. Cells stand in order of worth;
each was a process of its own with a share of the time. With `--resume DIR/lines.jsonl` a later run does what is
missing.

A case is the units of a step by the rows of each: `64x4` are 64 users with four rows of the model's full length,
`64x1` with one, `256x1` as many examples as example-level sampling clips. `ragged-64x16` are 64 users as uneven as
people are, of 1 to 16 rows, whose numbers and lengths are log-normal; the other ragged cases have one row each, of
such lengths.

- `ours` is the clipped sum as it comes: compiled for a model of 67 million parameters or more, which `not compiled` is
  without. `size chosen` leaves the micro-batch to the library.
- `loop` is the obvious way, user after user with plain autograd.
- `non-private` is the ordinary step in bfloat16 autocast, `fused loss` the same with our chunked loss, `compiled` the
  ordinary one under `torch.compile`, whose ragged rows are padded to the longest.
- `opacus per-sample` holds the gradients of every row and clips users; `opacus ghost` takes two backward passes and
  knows no users: with several rows a user it clips rows and is timed only. In both a micro-batch holds whole users.

Times are by the device's clock, the median of as many steps as the table says, taken in turns, after one to warm up.
Ways are tried at several micro-batches (in tokens, padding included), of which the quickest is shown. Memory is the
peak above what was there before the step, the model and its like. "Over non-private" and "over compiled" are times
over those of these ways, so less is better.
"""


def write_page(lines: list[Line], out: Path) -> Path:
    """README.md and, with matplotlib, times.png in `out`; returns the page's path."""
    text = ["# The clipped sum on a GPU", "", EXPLANATION]
    ended = endings(lines)
    by_cell: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_cell[line.get("cell", "")].append(line)
    for name, cell in CELLS.items():
        if name in by_cell:
            text += _section(name, cell, by_cell[name], ended.get(name))
    if missing := [name for name in CELLS if name not in by_cell]:
        text += [f"Not begun: {', '.join(missing)}.", ""]
    text += _picture(by_cell, out)
    page = out / "README.md"
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    return page


def _picture(by_cell: dict[str, list[Line]], out: Path) -> list[str]:
    try:
        from benchmarks.gpu.plot import plot
    except ModuleNotFoundError as error:
        return [f"There is no plot: {error.name} is not installed here. `--minutes 0 --resume` draws it elsewhere."]
    if not plot(by_cell, out / "times.png"):
        return []
    return ["![Times over those of the step without privacy, rounds by phase, slices of a device](times.png)", ""]


def _section(name: str, cell: Cell, lines: list[Line], ended: Line | None) -> list[str]:
    text = [f"## {name}", "", fill(cell.meaning, 119), ""]
    devices = dict.fromkeys(f"{line['device']}, torch {line['torch']}" for line in lines if "started" in line)
    if devices:
        text += [f"On {'; '.join(devices)}.", ""]
    if ended is None:
        text += ["It did not come to an end.", ""]
    elif ended["ended"] != FINISHED:
        text += [f"It is not complete ({ended['ended']}): {ended['why']}.", ""]
    bodies = {"ceilings": _ceilings, "clips": _clips, "steps": _steps, "rounds": _rounds, "slices": _slices}
    text += bodies[cell.kind](lines)
    return text


def _ceilings(lines: list[Line]) -> Iterator[str]:
    for line in _last(lines, "copy_gb_per_second"):
        n = line["product_size"]
        yield (
            f"A copy moves {line['copy_gb_per_second']:,} GB/s, read and written; a product of {n} x {n} bfloat16 "
            f"matrices runs at {line['bfloat16_tflops']:.3g} TFLOP/s."
        )
        yield ""


def _clips(lines: list[Line]) -> Iterator[str]:
    for line in _last(lines, "checks"):
        yield (
            f"{line['checks']} checks of {line['asked']}, {line['number_failed']} failed: copies of one user reached "
            f"{line['largest_reach']:.7f} clip norms a copy at most."
        )
        if line["against_float64"]:
            yield (
                f"{line['against_float64']} sums in float32 were off those of float64 by "
                f"{line['largest_float32_error']:.1e} of their norm at most."
            )
        for failed in line["failed"]:
            yield f"- Failed: {failed}"
        yield ""


def _rounds(lines: list[Line]) -> Iterator[str]:
    found = _last(lines, "in_words")
    if not found:
        return
    phases = [phase for phase in PHASES if any(phase in line["seconds"] for line in found)]
    yield f"| engine | parameters | users | round, ms | {' | '.join(phases)} |"
    yield f"| {' | '.join(['---'] * (4 + len(phases)))} |"
    for line in found:
        each = {phase: 1e3 * line["seconds"].get(phase, 0.0) / line["rounds"] for phase in phases}
        columns = " | ".join(f"{each[phase]:,.1f}" for phase in phases)
        whole = f"{sum(each.values()):,.1f}"
        yield f"| {line['engine']} | {line['parameters']:,} | {line['users']} | {whole} | {columns} |"
    yield ""
    yield f"Milliseconds a round. Gradients are {1 - found[-1]['beyond_gradients']:.0%} of it."
    yield ""


def _slices(lines: list[Line]) -> Iterator[str]:
    found = slices_found(lines)
    if found:
        yield "| passes | processes | micro-batch | tokens/s, together | over one process | memory, MiB |"
        yield "| --- | --- | --- | --- | --- | --- |"
    for line in found:
        alone = [x["tokens_per_second"] for x in found if x["processes"] == 1 and x["slice_way"] == line["slice_way"]]
        ratio = f"{line['tokens_per_second'] / max(alone):.2f}" if alone else "–"
        yield (
            f"| {line['slice_way']} | {line['processes']} | {line['micro_batch']} | {line['tokens_per_second']:,} | "
            f"{ratio} | {line['peak_mib']:,} |"
        )
    yield ""
    yield from _left_out(lines, "{slice_way}, {processes} processes at {micro_batch} tokens")


def slices_found(lines: Iterable[Line]) -> list[Line]:
    """Throughputs, the last of each kind."""
    last = {(x["slice_way"], x["processes"], x["micro_batch"]): x for x in lines if "tokens_per_second" in x}
    return list(last.values())


def _steps(lines: list[Line]) -> Iterator[str]:
    times = best_ways(lines)
    kernels = {(line["case"], line["kernels_of"]): line["kernels"] for line in lines if "kernels_of" in line}
    if times:
        yield f"| {' | '.join(COLUMNS)} |"
        yield f"| {' | '.join(['---'] * len(COLUMNS))} |"
    for (case, way), line in times.items():
        ratios = " | ".join(_ratio(line, times.get((case, other))) for other in (BASELINE, COMPILED))
        yield (
            f"| {case} | {way} | {line['micro_batch'] or '–'} | {line['steps']} | {line['milliseconds']:,.1f} | "
            f"{1e3 * line['tokens'] / line['milliseconds']:,.0f} | {ratios} | {line['peak_mib']:,} | "
            f"{kernels.get((case, way), '–')} |"
        )
    yield ""
    yield from _left_out(lines, "{case} {way} at {micro_batch}")


def best_ways(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """By case and way, the quickest micro-batch: of those measured in turns, if there are any."""
    last = {(x["case"], x["way"], x["micro_batch"]): x for x in lines if "milliseconds" in x}
    best: dict[tuple[str, str], Line] = {}
    for (case, way, _), line in last.items():
        known = best.get((case, way))
        if known is None or _order(line) < _order(known):
            best[case, way] = line
    return dict(sorted(best.items(), key=lambda item: [case for case, _, _ in last].index(item[0][0])))


def _order(line: Line) -> tuple[bool, float]:
    return line["steps"] == 1, line["milliseconds"]


def _ratio(line: Line, other: Line | None) -> str:
    return f"{line['milliseconds'] / other['milliseconds']:.2f}" if other else "–"


def _last(lines: list[Line], key: str) -> list[Line]:
    """The last line that has the key."""
    return [line for line in lines if key in line][-1:]


def _left_out(lines: list[Line], form: str) -> Iterator[str]:
    """What was left out, by reason; what a later run made good is not told."""
    reasons: dict[str, str] = {}
    for line in lines:
        if "way" in line or "slice_way" in line:
            reasons[form.format(**line)] = line.get("left_out", "")
    by_reason: dict[str, list[str]] = defaultdict(list)
    for what, reason in reasons.items():
        by_reason[reason].append(what)
    for reason, left in by_reason.items():
        if reason:
            yield f"Left out, {reason}: {'; '.join(left)}."
            yield ""
