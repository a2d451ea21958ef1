"""Running a page's blocks in a folder, as its reader would, and comparing what they print with what the page shows."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from page_blocks import ROOT, Block

NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
_PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" != "-m experiments.run" ]; then
    exec {python} "$@"
fi
if [ -f "$FEDSIM_DOCS_SMALLER/$3" ]; then
    set -- "$@" $(cat "$FEDSIM_DOCS_SMALLER/$3")
fi
exec {python} {warm} "$@"
"""
READERS = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
"""A reader's environment: as it was before libraries that are imported here have added to it."""
_PARTED = "@@ block {} @@"


@dataclass(kw_only=True)
class Reader:
    """Somebody who tries one page's blocks, one after the other.

    Attributes:
        folder: Where, outside the repository; it is made.
        warm: What stands behind Python's name where a command of fedsim is to be run.
        finished: Trains the run whose folder hidden code finds as $FINISHED_RUN, when it is first asked for.
    """

    folder: Path
    warm: Sequence[str]
    finished: Callable[[], Path]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: str = ""

    def try_out(self, block: Block) -> None:
        """Run it, and compare what it shows; AssertionError says what differs, with the page's line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if block.language == "python":
            with contextlib.chdir(self.folder):
                self._python(block)
        elif block.language == "text":
            self._compare(block, block.text.splitlines(), self.printed)
        else:
            self._shell(block)

    def _python(self, block: Block) -> None:
        for hidden in block.marks.get("given", ()):
            exec(compile(hidden, block.place, "exec"), self.names)
        self.printed = ""
        lines = block.text.splitlines()
        for node in ast.parse(block.text).body:
            written = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                if isinstance(node, ast.Expr):
                    value = eval(compile(ast.Expression(node.value), block.place, "eval"), self.names)
                    said.write("" if value is None else repr(value))
                else:
                    exec(compile(ast.Module([node], []), block.place, "exec"), self.names)
            self.printed += said.getvalue()
            if (shown := re.search(r"# → (.*)$", written)) is not None:
                self._compare(block, [shown[1]], said.getvalue())
        for hidden in block.marks.get("then", ()):
            exec(compile(hidden, block.place, "exec"), self.names)

    def _shell(self, block: Block) -> None:
        commands, shown = commands_of(block)
        hidden = block.marks.get("given", ())
        parts = [*commands, *block.marks.get("then", ())]
        script = "\n".join(
            ["set -e -o pipefail", *hidden, *(f"echo '{_PARTED.format(i)}'\n{c}" for i, c in enumerate(parts))]
        )
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=ROOT if block.in_clone else self.folder,
            env=self._environment(block, "FINISHED_RUN" in script),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        expected = int(block.marks.get("exit", ("0",))[0])
        assert done.returncode == expected, f"{block.place} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        _, *printed = re.split(_PARTED.format(r"\d+"), done.stdout)
        self.printed = "".join(printed[: len(commands)])
        for lines, said in zip(shown, printed, strict=False):
            self._compare(block, lines, said)

    def _environment(self, block: Block, asks_for_a_run: bool) -> dict[str, str]:
        programs = self.folder.parent / f"{self.folder.name}-programs"
        smaller = programs / f"smaller-{block.line}"
        smaller.mkdir(parents=True, exist_ok=True)
        for line in block.marks.get("smaller", ()):
            command, _, options = line.partition(" ")
            (smaller / command).write_text(options, encoding="utf-8")
        wrapped = {"python": _PYTHON.format(python=shlex.quote(sys.executable), warm=shlex.join(self.warm))}
        wrapped["fedsim"] = f'#!/usr/bin/env bash\nexec {shlex.quote(str(programs))}/python -m experiments.run "$@"\n'
        for name, text in wrapped.items():
            (programs / name).write_text(text, encoding="utf-8")
            (programs / name).chmod(0o755)
        return {
            **READERS,
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)]),
            "FEDSIM_DOCS_SMALLER": str(smaller),
            **({"FINISHED_RUN": str(self.finished())} if asks_for_a_run else {}),
        }

    def _compare(self, block: Block, lines: Sequence[str], printed: str) -> None:
        missing = first_missing(lines, printed, varies="varies" in block.marks)
        assert missing is None, f"{block.place} shows what is not printed:\n{missing}\nPrinted:\n{printed[-4000:]}"


def commands_of(block: Block) -> tuple[list[str], list[list[str]]]:
    """The commands of a shell block, and the lines that the page shows below each."""
    if block.language == "bash":
        return [block.text], [[]]
    commands: list[str] = []
    shown: list[list[str]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            commands.append(line[2:])
            shown.append([])
        elif commands and not shown[-1] and commands[-1].endswith("\\"):
            commands[-1] += f"\n{line}"
        else:
            assert shown, f"{block.place} begins with output; commands stand after '$ '"
            shown[-1].append(line)
    return commands, shown


def first_missing(lines: Sequence[str], printed: str, *, varies: bool) -> str | None:
    """The first line that is shown and not printed after those before it; None where all are.

    Blanks and line breaks do not count, nor do a table's frames: a terminal breaks lines where it likes. `…` stands
    for anything. Of numbers as many digits count as are shown; with `varies` there must be some number.
    """
    rest = _plain(printed)
    for line in lines:
        wanted = _plain(line)
        if not wanted.strip("… "):
            continue
        pattern = "".join(
            f"({NUMBER})" if re.fullmatch(NUMBER, part) else ".*?".join(map(re.escape, part.split("…")))
            for part in re.split(f"({NUMBER})", wanted)
        )
        numbers = [part for part in re.split(f"({NUMBER})", wanted) if re.fullmatch(NUMBER, part)]
        for found in re.finditer(pattern, rest):
            if varies or all(map(_same, numbers, found.groups())):
                rest = rest[found.end() :]
                break
        else:
            return line
    return None


def _same(shown: str, printed: str) -> bool:
    """Whether a number is the one shown, to the digits that are shown."""
    if shown == printed:
        return True
    if "." not in shown or "e" in shown.lower() + printed.lower():
        return False
    digits = len(shown.partition(".")[2])
    return f"{float(printed.replace(',', '').replace('−', '-')):.{digits}f}" == shown.replace(",", "").replace(
        "−", "-"
    )


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[│┃╭╮╰╯─━┏┓┗┛┡┩┳┻╇┴└┘├┤┼]", " ", text).split())
