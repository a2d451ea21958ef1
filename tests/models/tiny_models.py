"""A tiny default model's configuration, public text that every Python has, and where real test data lies."""

import argparse
import collections
import json
from pathlib import Path

import pytest

from fedsim.models.config import SmallModelConfig

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY = SmallModelConfig(layers=2, width=32, heads=2, context=32, vocabulary_size=400, steps=30, batch_rows=8)


def public_texts() -> list[str]:
    """Docstrings of three modules."""
    modules = (argparse, collections, json)
    found = [item.__doc__ for module in modules for item in vars(module).values() if isinstance(item.__doc__, str)]
    return [text for text in found if text.strip()]


def shared_data(name: str) -> Path:
    """A file or folder of real test data; without it the test is skipped."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path
