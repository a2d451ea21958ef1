"""Fuzzers of what is read from a disk: only the errors that are meant to come out of it do."""

import contextlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import fuzzing
from hypothesis import strategies as st

from fedsim.config import RunConfig, from_flat, from_nested, to_flat
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.errors import InvalidInput
from fedsim.privacy.events import Gaussian, PoissonSubsampledGaussian
from fedsim.privacy.ledger import Ledger, LedgerDamaged, TornLine, _encode, read_entries
from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint, CheckpointDamaged

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
anything = st.recursive(
    scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part, max_size=3)
)
edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "repeat"]), st.binary(max_size=6)),
    min_size=1,
    max_size=3,
)


def edited(content: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """What a bad disk or a curious person makes of a file."""
    for where, how, new in changes:
        place = int(where * len(content))
        if how == "flip":
            content = content[:place] + new + content[place + len(new) :]
        elif how == "cut":
            content = content[:place]
        elif how == "insert":
            content = content[:place] + new + content[place:]
        else:
            content = content[: place + 40] + content[place:]
    return content


def configuration(folder: Path) -> Callable[..., None]:
    """Flat and nested configurations of known and unknown names with values of any kind."""
    names = [*sorted(to_flat(RunConfig())), "plan", "plan.epsilon.more", "noise-seed", "resume", "../x"]

    @fuzzing(st.dictionaries(st.sampled_from(names) | st.text(max_size=10), anything, max_size=4), anything)
    def fuzz(flat: dict[str, Any], nested: Any) -> None:
        try:
            config = from_flat(RunConfig, flat)
        except InvalidInput:
            pass
        else:
            assert repr(from_flat(RunConfig, to_flat(config))) == repr(config)
        with pytest.raises(InvalidInput):
            from_nested(RunConfig, {"plan": nested, "nonsense": 1})

    return fuzz


def ledger(folder: Path) -> Callable[..., None]:
    """Edited ledgers: never a charge that was not made, never one lost without a word unless the end was cut off."""
    path = folder / "ledger.jsonl"
    with Ledger.open(path) as whole:
        for round in range(4):
            whole.charge(PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.0), round=round)
        entries = whole.entries
    content = path.read_bytes()

    @fuzzing(edits)
    def fuzz(changes: list[tuple[float, str, bytes]]) -> None:
        changed = edited(content, changes)
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TornLine)
                with Ledger.open(path) as opened:
                    found = opened.entries
        except LedgerDamaged:
            return
        assert found == entries[: len(found)]
        assert len(found) == 4 or content.startswith(changed[: changed.rfind(b"\n") + 1])
        assert read_entries(path) == found

    return fuzz


def charges(folder: Path) -> Callable[..., None]:
    """Ledger lines with right checksums and events of any kind."""
    path = folder / "charges.jsonl"
    with Ledger.open(path) as empty:
        empty.charge(Gaussian(noise_multiplier=1.0), round=0)
    lines = path.read_bytes().splitlines(keepends=True)
    kinds = st.sampled_from(["gaussian", "poisson-subsampled-gaussian", "repeated", "composed", "none"])
    events = anything | st.fixed_dictionaries(
        {"kind": kinds, "noise_multiplier": anything, "count": anything, "events": anything}
    )

    @fuzzing(st.fixed_dictionaries({"event": events}, optional={"round": anything, "purpose": anything}))
    def fuzz(values: dict[str, Any]) -> None:
        try:
            line, _ = _encode(values, "")
        except ValueError:
            return
        path.write_bytes(lines[0] + line)
        with contextlib.suppress(LedgerDamaged):
            read_entries(path)

    return fuzz


def checkpoint(folder: Path) -> Callable[..., None]:
    """Edited checkpoints: the one that was written, or none."""
    arrays = {"parameters": np.arange(50, dtype=np.float32), "optimizer/step": np.array(3.0)}
    path = checkpoints.write(folder / "checkpoints", Checkpoint(round=3, arrays=arrays, values={"seconds": 1.5}))
    contents = {name: (path / name).read_bytes() for name in (checkpoints.ARRAYS, checkpoints.MANIFEST)}

    @fuzzing(st.sampled_from(sorted(contents)), edits, st.booleans())
    def fuzz(name: str, changes: list[tuple[float, str, bytes]], repair: bool) -> None:
        for each, content in contents.items():
            (path / each).write_bytes(content)
        (path / name).write_bytes(edited(contents[name], changes))
        if repair and name == checkpoints.ARRAYS:  # as somebody would who can compute checksums
            manifest = json.loads(contents[checkpoints.MANIFEST])
            manifest.pop("checksum")
            size = (path / name).stat().st_size
            manifest["arrays"] = {"bytes": size, "sha256": checkpoints._file_checksum(path / name)}
            manifest["checksum"] = checkpoints._checksum(manifest)
            (path / checkpoints.MANIFEST).write_text(json.dumps(manifest))
        try:
            found = checkpoints.read(path)
        except CheckpointDamaged:
            return
        assert found.round == 3
        if not repair:
            for each, array in arrays.items():
                np.testing.assert_array_equal(found.arrays[each], array)

    return fuzz


class Letters:
    """One token a character."""

    vocab_size = 256
    eos_token_id = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("latin-1", "replace")) for text in texts]


def ingest(folder: Path) -> Callable[..., None]:
    """Files of every format with any content: a store, or a sentence about what is wrong."""
    records = st.lists(
        st.fixed_dictionaries({"user_id": anything, "text": anything | st.text(min_size=5)}) | anything, max_size=5
    )
    good = b'{"user_id": "a", "text": "some words"}\n{"user_id": "b", "text": "other words"}\n'

    @fuzzing(st.sampled_from(["jsonl", "csv", "parquet", "jsonl.gz"]), records | st.binary(max_size=200) | edits)
    def fuzz(suffix: str, content: Any) -> None:
        path = folder / f"data.{suffix}"
        if isinstance(content, list) and content and isinstance(content[0], tuple):
            content = edited(good, content)
        elif isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content).encode()
        path.write_bytes(content)
        name = f"store-{time.monotonic_ns()}"
        config = DataConfig(source="files", path=str(path), validation_fraction=0, test_fraction=0, minimum_tokens=2)
        try:
            store = build_store(config, Letters(), folder / name, cache=folder / "cache")
        except InvalidInput:
            return
        for user in range(store.num_users):
            start, stop = store.rows_of(user)
            assert stop > start
            assert len(store.take(np.arange(start, stop))) == stop - start

    return fuzz
