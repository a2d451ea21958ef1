"""The import rules of ARCHITECTURE.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FORBIDDEN = {
    "fedsim/privacy": {"torch", "flwr", "ray", "transformers", "fedsim.gradients", "fedsim.data", "fedsim.models"},
    "fedsim/gradients": {"flwr", "ray", "transformers", "peft", "fedsim.privacy", "fedsim.data", "fedsim.models"},
    "fedsim/data": {"flwr", "ray", "fedsim.privacy", "fedsim.gradients", "fedsim.models"},
    "fedsim/models": {"flwr", "ray", "fedsim.privacy"},
    "fedsim/engine": {"fedsim.privacy", "fedsim.gradients", "fedsim.data", "fedsim.models"},
    "fedsim": {"server", "clients", "experiments", "benchmarks"},
    "clients": {"server", "experiments", "benchmarks"},
    "server": {"clients", "experiments", "benchmarks"},
    "experiments": {"benchmarks"},
}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_stay_within_the_rules(folder: str) -> None:
    broken = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module in sorted(imported_modules(path))
        for name in FORBIDDEN[folder]
        if module == name or module.startswith(name + ".")
    ]
    assert not broken, "\n".join(broken)
