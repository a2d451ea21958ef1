"""The rules of ARCHITECTURE.md: who may import whom, how large a room is, and that its tree is the tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsim", "clients", "server", "experiments")

FORBIDDEN = {
    "fedsim/privacy": {"torch", "flwr", "ray", "transformers"},
    "fedsim/sampling": {"torch", "flwr", "ray", "transformers", "fedsim.gradients", "fedsim.data"},
    "fedsim/plan": {"torch", "flwr", "ray", "transformers", "pyarrow"},
    "fedsim/gradients": {"flwr", "ray", "transformers", "peft"},
    "fedsim/data": {"flwr", "ray"},
    "fedsim/models": {"flwr", "ray", "fedsim.privacy"},
    "fedsim/engine": {"fedsim.privacy", "fedsim.gradients", "fedsim.data"},
    "clients": {"server", "experiments", "benchmarks"},
    "server": {"clients", "experiments", "benchmarks"},
    "experiments": {"benchmarks"},
}
"""What a room must do without, wherever in it an import stands."""

FLOORS = (
    ("fedsim.errors",),
    (
        "fedsim.validation",
        "fedsim.rows",
        "fedsim.randomness",
        "fedsim.registry",
        "fedsim.suggestions",
        "fedsim.schedule",
        "fedsim.phases",
        "fedsim.secure_noise",
        "fedsim.gradient_paths",
        "fedsim.memory",
    ),
    ("fedsim.clip", "fedsim.versions", "fedsim.terminal", "fedsim.cache", "fedsim.hugging_face", "fedsim.disk"),
    ("fedsim.privacy", "fedsim.gradients", "fedsim.data"),
    ("fedsim.sampling", "fedsim.models", "fedsim.engine"),
    ("fedsim.plan",),
    ("fedsim.planner", "fedsim.statement", "fedsim.release", "fedsim.config"),
    ("fedsim.resources", "fedsim.optimizer", "fedsim.seeds"),
    ("clients", "server"),
    ("experiments",),
)
"""From the ground up: a room imports from the floors below it, from itself, and from no room beside it."""


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(module: str) -> tuple[str, int] | None:
    """A module's room and its floor."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return room, floor
    return None


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_rooms_do_without_what_is_not_theirs(folder: str) -> None:
    broken = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files(folder)
        for module in sorted(imported_modules(path))
        for name in FORBIDDEN[folder]
        if module == name or module.startswith(name + ".")
    ]
    assert not broken, "\n".join(broken)


def test_no_import_runs_upward_or_sideways() -> None:
    broken = []
    for path in files(*PACKAGES):
        own = room_of(module_of(path))
        if own is None:
            assert module_of(path) == "fedsim", f"{module_of(path)} has no floor: give it one"
            continue
        for module in imported_modules(path):
            other = room_of(module)
            if other is not None and other[0] != own[0] and other[1] >= own[1]:
                broken.append(f"{module_of(path)} (floor {own[1]}) imports {module} (floor {other[1]})")
    assert not broken, "\n".join(sorted(broken))


def test_no_circle_of_imports() -> None:
    modules = {module_of(path): path for path in files(*PACKAGES)}
    graph = {name: {found for found in imported_modules(path) if found in modules} for name, path in modules.items()}
    done: set[str] = set()

    def circle(name: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in way:
            return (*way[way.index(name) :], name)
        if name in done:
            return None
        for following in sorted(graph[name] - {name}):
            if (found := circle(following, (*way, name))) is not None:
                return found
        done.add(name)
        return None

    for name in sorted(modules):
        found = circle(name, ())
        assert found is None, " → ".join(found or ())


def test_nothing_is_imported_for_types_alone() -> None:
    guarded = [str(path) for path in files(*PACKAGES) if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]
    assert not guarded


ALGORITHM = re.compile(r'"(uls|els)"|UlsPlan|ElsPlan')
KNOWS_ALGORITHMS = ("fedsim/plan/", "fedsim/config/", "experiments/sweep/", "experiments/report/")
"""The plan defines the algorithms; configuration, sweep axes and reports name them."""


def test_what_algorithms_do_differently_stands_in_the_plan_alone() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(*PACKAGES)
        if not str(path.relative_to(ROOT)).startswith(KNOWS_ALGORITHMS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ALGORITHM.search(line)
    ]
    assert len(lines) <= 8, "\n".join(lines)


def test_rooms_stay_small() -> None:
    long = [f"{path.relative_to(ROOT)}: {count}" for path, count in lengths() if count > 350]
    assert not long
    for folder in ("fedsim/gradients", "server"):
        own = [path for path in files(folder) if path.parent == ROOT / folder]  # a folder below is a room of its own
        assert len(own) <= 12, folder


def lengths() -> Iterator[tuple[Path, int]]:
    for path in files(*PACKAGES, "tests", "benchmarks"):
        yield path, len(path.read_text(encoding="utf-8").splitlines())


def test_the_tree_in_the_document_is_the_tree() -> None:
    document = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = document.split("## The tree", 1)[1].split("```", 2)[1]
    named = set(tree_paths(tree))
    present = {str(path.relative_to(ROOT)) for path in files(*PACKAGES) if path.name != "__init__.py"}
    assert named - present == set(), "named, but not there"
    assert present - named == set(), "there, but not named"


def tree_paths(tree: str) -> Iterator[str]:
    """Paths of the Python files in an indented tree: folders end with a slash, a line's first word is its name."""
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        if not line.strip():
            continue
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = [folder for folder in folders if folder[0] < indent]
        if name.endswith("/"):
            folders.append((indent, name))
        elif name.endswith(".py"):
            yield "".join(folder for _, folder in folders) + name
