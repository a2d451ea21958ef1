"""Embedded text with users: each module of an installed package is a user, its docstrings are the user's examples.

The standard library's docstrings are public text; those of other packages stand in for private users. Packages are
read, never imported, and what was read is kept by package version.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.cache import written_to
from fedsim.data import docstring_reader
from fedsim.data.machine import cores
from fedsim.errors import InvalidInput

STANDARD_LIBRARY = "standard-library"
NOT_READ = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
"""Folders left out: other packages, tests, and parts that newer Pythons no longer have."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """Something installed whose docstrings can be read: its name, its version, and its folder."""

    name: str
    version: str
    folder: Path

    @property
    def identity(self) -> str:
        """Name, version and Python version: what decides the docstrings found."""
        return f"{self.name}-{self.version}-python{sys.version_info.major}.{sys.version_info.minor}"


def find_library(name: str) -> Library:
    """An installed package, or "standard-library".

    Raises:
        InvalidInput: If no such package is installed.
    """
    if name == STANDARD_LIBRARY:
        return Library(name=name, version=platform.python_version(), folder=Path(sysconfig.get_path("stdlib")))
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise InvalidInput("data.packages", name, "an installed package", f"Install it with: pip install {name}.")
    return Library(name=name, version=_version(name), folder=Path(found.submodule_search_locations[0]))


def _version(package: str) -> str:
    """The version of a package; that of Python for a package of the standard library."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # The distribution has another name (yaml is in PyYAML); finding it means reading all of them.
        distributions = importlib.metadata.packages_distributions().get(package)
        return importlib.metadata.version(distributions[0]) if distributions else platform.python_version()


def docstrings(
    library: Library, cache: Path, progress: Callable[[int, int], None] | None = None
) -> list[tuple[str, list[str]]]:
    """The docstrings of a library's modules, in order of the modules' names.

    Args:
        library: What to read.
        cache: Folder where the result is kept, by name and version.
        progress: Called with (files read, files) while reading; not at all when the cache has the result.

    Returns:
        Pairs (module name, its docstrings), for modules with any.

    Raises:
        InvalidInput: If the cache cannot be written.
    """
    kept = cache / "docstrings" / f"{library.identity}.parquet"
    if kept.is_file():
        table = pq.read_table(kept)
        return list(zip(table["module"].to_pylist(), table["docstrings"].to_pylist(), strict=True))
    files = list(_python_files(library.folder))
    texts = _read(files, progress)
    modules = [(_module_name(library, file), found) for file, found in zip(files, texts, strict=True) if found]
    modules.sort()
    table = pa.table({"module": [name for name, _ in modules], "docstrings": [found for _, found in modules]})
    written = kept.with_name(f"{kept.name}.{os.getpid()}")
    with written_to(cache):
        kept.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, written)
        os.replace(written, kept)
    return modules


def _python_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_READ)
        yield from (Path(place, name) for name in sorted(names) if name.endswith(".py"))


def _module_name(library: Library, file: Path) -> str:
    parts = list(file.relative_to(library.folder).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if library.name == STANDARD_LIBRARY else [library.name, *parts])


def _read(files: list[Path], progress: Callable[[int, int], None] | None) -> list[list[str]]:
    """The docstrings of each file, read by one process a core.

    The processes run a script that imports nothing of ours: it starts at once, and needs neither a guarded main
    module (as spawned pools do) nor a fork of a process that may have threads.
    """
    workers = max(1, min(cores(), 8, len(files)))
    by_size = sorted(range(len(files)), key=lambda place: -files[place].stat().st_size)
    results: list[list[str]] = [[] for _ in files]
    done, lock = 0, threading.Lock()
    failures: list[str] = []

    def work(places: list[int]) -> None:
        nonlocal done
        command = [sys.executable, "-I", docstring_reader.__file__]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        ) as p:
            names = [str(files[place]) for place in places]
            feeder = threading.Thread(target=_feed, args=(p.stdin, names))
            feeder.start()
            answered = 0
            for place, line in zip(places, p.stdout or (), strict=False):
                results[place] = json.loads(line)
                answered += 1
                with lock:
                    done += 1
                    if progress:
                        progress(done, len(files))
            feeder.join()
        if answered != len(places):
            failures.append(f"exit code {p.returncode}")

    threads = [threading.Thread(target=work, args=(by_size[start::workers],)) for start in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"a process that reads docstrings ended early ({failures[0]})")
    return results


def _feed(stream: IO[str], lines: list[str]) -> None:
    try:
        with stream:
            stream.writelines(line + "\n" for line in lines)
    except BrokenPipeError:
        pass  # The process ended early; its missing answers are noticed by the reader.
