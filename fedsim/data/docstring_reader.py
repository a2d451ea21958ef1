"""Docstrings of Python files, read without importing them. Run as a script: a worker of fedsim.data.docstrings.

Reads file names, one a line, from standard input; writes one JSON list of docstrings a line, in the same order.
"""

import ast
import json
import sys
import warnings
from collections.abc import Iterator
from inspect import cleandoc


def docstrings_of(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and its functions, cleaned of indentation, in order.

    Empty where the source cannot be parsed by this Python (a module that needs a newer one).
    """
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    texts = (cleandoc(text) for text in _literals(tree))
    return [text for text in texts if text]


def _literals(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            yield first.value.value
    # Only statements can hold definitions: walking expressions would take ten times as long.
    for blocks in ("body", "handlers", "orelse", "finalbody", "cases"):
        statements = getattr(node, blocks, None)
        for statement in statements if isinstance(statements, list) else ():
            if isinstance(getattr(statement, "body", None), list) or hasattr(statement, "cases"):
                yield from _literals(statement)


def main() -> None:
    warnings.simplefilter("ignore")
    for name in sys.stdin:
        try:
            with open(name.rstrip("\n"), "rb") as file:
                texts = docstrings_of(file.read())
        except OSError:
            texts = []
        print(json.dumps(texts), flush=True)


if __name__ == "__main__":
    main()
