"""A process that computes over and over keeps the memory that it freed."""

import os
import subprocess
import sys

import pytest

from fedsim.memory import reuse_freed_memory

FAULTS = """
import resource, sys
import torch
from flwr.clientapp import ClientApp
from fedsim.engine.resident import ResidentClient

if "resident" in sys.argv:
    ResidentClient(ClientApp(), {}, 1, 1)

def allocated_and_freed():
    for size in (5, 40, 50):  # MiB
        torch.ones(size * 2**18)

allocated_and_freed()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    allocated_and_freed()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    """Page faults of a process of its own that allocates and frees the same twenty times, after the first."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments], check=True, capture_output=True, text=True, env=_untouched()
    )
    return int(done.stdout)


def _untouched() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc's allocator")
def test_a_resident_client_does_not_have_its_pages_made_anew() -> None:
    pages = 95 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults() > 10 * pages, "this C library keeps freed memory by itself, so that the test shows nothing"
    # Once more at most: a small block that stays at the end of the first time's memory has the heap grow past it.
    assert faults("resident") < pages


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "131072")
    assert not reuse_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    assert not reuse_freed_memory()
