"""What trackers wrote, read back by their own means."""

import json
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
PATIENCE = 60.0  # seconds


@dataclass
class Found:
    """What a tracker holds of a run.

    Attributes:
        numbers: Of each round, by name, the last value that it was told.
        times: How often it shows each of them.
        options: What it was told of the configuration.
        summary: What it was told at the end.
        status: How it says that the run ended, where it says so.
    """

    numbers: dict[int, dict[str, float]] = field(default_factory=dict)
    times: Counter[tuple[int, str]] = field(default_factory=Counter)
    options: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    status: str = ""

    def note(self, round: int, name: str, value: float) -> None:
        if name.startswith("summary/"):
            self.summary[name.removeprefix("summary/")] = value
        else:
            self.numbers.setdefault(round, {})[name] = value
            self.times[round, name] += 1


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No accounts, no settings, and trackio's database in a folder of the test."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    try:
        import trackio
    except ImportError:
        return home
    for module in (trackio.utils, trackio.sqlite_storage, trackio):
        monkeypatch.setattr(module, "TRACKIO_DIR", home / "trackio")
    return home


def found_by(tracker: str, folder: Path, home: Path) -> Found:
    """What a tracker holds of the run in a folder."""
    reader = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}[tracker]
    return reader(home if tracker == "trackio" else folder)


def files_of(tracker: str, folder: Path, home: Path) -> list[Path]:
    """Every file that a tracker wrote, whole."""
    if tracker == "wandb":
        _wandb_runs(folder)
    places = {
        "tensorboard": folder / "tensorboard",
        "wandb": folder / "wandb",
        "mlflow": folder / "mlflow.db",
        "trackio": home / "trackio",
    }
    place = places[tracker]
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def _tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = Found()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.note(event.step, name, event.value)
    for name in (one for one in events.Tags()["tensors"] if one.startswith("summary/")):
        words = events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
        found.summary[name.removeprefix("summary/").removesuffix("/text_summary")] = words
    data = HParamsPluginData()
    data.ParseFromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    for name, value in data.session_start_info.hparams.items():
        found.options[name] = getattr(value, value.WhichOneof("kind"))
    return found


def _wandb(folder: Path) -> Found:
    found = Found()
    for records in _wandb_runs(folder):
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found.options |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
            elif kind == "history":
                items = {_key(one): json.loads(one.value_json) for one in record.history.item}
                for name, value in items.items():
                    if not name.startswith("_") and name != "round":
                        found.note(items["round"], name, value)
            elif kind == "summary":
                # The library keeps the last of each metric there by itself, under nested keys.
                named = {one.key: one.value_json for one in record.summary.update if one.key and one.key[0] != "_"}
                found.summary |= {name: json.loads(value) for name, value in named.items()}
            elif kind == "exit":
                found.status = str(record.exit.exit_code)
    return found


def _wandb_runs(folder: Path) -> list[list[Any]]:
    """The records of every run in a folder, in order, once all are whole.

    The library's `finish` returns before its other process has written the file out: at times none of it is there.
    """
    until = time.monotonic() + PATIENCE
    while True:
        runs = [list(_wandb_records(path)) for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]
        if runs and all(run and run[-1].WhichOneof("record_type") == "exit" for run in runs):
            return runs
        assert time.monotonic() < until, f"after {PATIENCE:.0f} s the files in {folder / 'wandb'} are still not whole"
        time.sleep(0.05)


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _wandb_records(path: Path) -> Iterator[Any]:
    """What an offline file holds so far.

    As LevelDB's logs: blocks of 32 KiB after 7 bytes, in each chunks of (checksum, length, kind).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, block, whole = path.read_bytes(), 7, 1 << 15, b""
    while place + 7 <= len(data):
        if (left := block - place % block) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        chunk = data[place + 7 : place + 7 + length]
        place += 7 + length
        if len(chunk) < length:
            return  # the rest is still being written
        whole = chunk if kind in (1, 2) else whole + chunk  # whole or first, middle or last
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record


def _mlflow(folder: Path) -> Found:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "fedsim")
    (run,) = client.search_runs([experiment.experiment_id])
    found = Found(options=dict(run.data.params), status=run.info.status)
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.note(metric.step, name, metric.value)
    words = {name: value for name, value in run.data.tags.items() if name.startswith("summary/")}
    found.summary |= {name.removeprefix("summary/"): value for name, value in words.items()}
    return found


def _trackio(home: Path) -> Found:
    found = Found()
    with sqlite3.connect(home / "trackio" / "fedsim.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            found.note(step, name, value)
    assert len(configs) == 1
    found.options = json.loads(configs[0][0])
    return found
