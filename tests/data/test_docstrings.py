import ast
import inspect
import sys
import textwrap

import pytest

from fedsim.data import docstrings as embedded
from fedsim.data.config import DataConfig
from fedsim.data.docstring_reader import docstrings_of
from fedsim.data.ingest import open_or_build
from fedsim.data.sources import public_texts
from fedsim.errors import InvalidInput

SOURCE = '''
"""Of the module."""
x = """no docstring"""
def f(a):
    r"""Of f.

        Indented.
    """
    def inner():
        'Of inner.'
    return """no"""
async def g(): """Of g."""
if x:
    class C:
        """Of C."""
        def m(self):
            x = 1
            """Too late."""
        def n(self): """Of C.n."""
else:
    def f():
        f"""No {x} docstring."""
try:
    pass
except ValueError:
    def h(): """Of h."""
finally:
    def i(): """  """
match x:
    case 1:
        def j(): """Of j."""
with x:
    def k(): b"""Bytes."""
'''


def test_what_counts_as_a_docstring() -> None:
    expected = ["Of the module.", "Of f.\n\nIndented.", "Of inner.", "Of g.", "Of C.", "Of C.n.", "Of h.", "Of j."]
    assert sorted(docstrings_of(SOURCE.encode())) == sorted(expected)


def test_agreement_with_the_standard_way() -> None:
    for module in (ast, inspect, textwrap):
        source = inspect.getsource(module)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        assert sorted(docstrings_of(source.encode())) == sorted(text for text in found if text)


def test_source_that_this_python_cannot_parse_is_passed_over() -> None:
    assert docstrings_of(b'"""Doc."""\nprint "old"\n') == []
    assert docstrings_of(b'"""\xff"""') == []


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """An installed package with modules, tests and a module that fails when imported."""
    folder = tmp_path / "site" / "talkative"
    (folder / "sub").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "__init__.py").write_text('"""Of the package."""\nraise RuntimeError("imported")\n')
    (folder / "sub" / "deep.py").write_text('"""Of deep."""\ndef f():\n    """Of deep.f."""\n')
    (folder / "silent.py").write_text("x = 1\n")
    (folder / "tests" / "test_it.py").write_text('"""A test."""\n')
    monkeypatch.syspath_prepend(str(folder.parent))
    return "talkative"


def test_modules_are_users_and_nothing_is_imported(package, tmp_path, tokenizer) -> None:
    config = DataConfig(packages=(package,), validation_fraction=0, test_fraction=0)
    store = open_or_build(config, tokenizer, tmp_path / "cache")
    assert sorted(store.user_ids()) == ["talkative", "talkative.sub.deep"]
    assert store.num_rows == 3
    assert package not in sys.modules


def test_docstrings_are_read_once(package, tmp_path, monkeypatch) -> None:
    library = embedded.find_library(package)
    told = []
    first = embedded.docstrings(library, tmp_path, lambda done, total: told.append((done, total)))
    assert told[-1] == (3, 3)
    monkeypatch.setattr(embedded, "_read", None)
    assert embedded.docstrings(library, tmp_path) == first


def test_a_package_that_is_not_installed_is_named(tmp_path, tokenizer) -> None:
    for name in ("no_such_package", "not-a-name", "textwrap"):
        with pytest.raises(InvalidInput, match=r"data\.packages.*installed package"):
            open_or_build(DataConfig(packages=(name,)), tokenizer, tmp_path)


def test_public_text_is_the_standard_library(tmp_path, monkeypatch) -> None:
    library = embedded.find_library(embedded.STANDARD_LIBRARY)
    small = [file for file in embedded._python_files(library.folder) if file.parent.name in ("json", "wsgiref")]
    monkeypatch.setattr(embedded, "_python_files", lambda folder: iter(small))
    texts = list(public_texts(tmp_path))
    assert any("JSON (JavaScript Object Notation)" in text for text in texts)
    assert "site-packages" in embedded.NOT_READ


def test_a_cache_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk" / "__init__.py").write_text('"""A docstring."""\n')
    (tmp_path / "file").write_text("where a folder should be")
    library = embedded.Library(name="talk", version="1", folder=tmp_path / "talk")
    with pytest.raises(InvalidInput, match="FEDSIM_CACHE"):
        embedded.docstrings(library, tmp_path / "file")
