"""Folders that every node needs: found at the same path, or carried there once, whole and checked."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from ray.cluster_utils import Cluster

from fedsim.engine import carried
from fedsim.engine.carried import PLACE, Folder, NotHere, _answer, _digest, _looked, _Receiver, carry, files_of, placed
from fedsim.engine.cluster import join_or_start, leave
from fedsim.engine.environment import Whereabouts
from fedsim.engine.ray_grid import RayGrid
from fedsim.errors import Failure, InvalidInput

ABSENT = "/absent/store"
"""Where the driver, as the tests have it, has a folder, and no other node."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "tokens.bin").write_bytes(os.urandom(100_000))
    (folder / "empty").touch()
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(carried, "CHUNK_BYTES", 30_000)
    return folder


@pytest.fixture
def joined(cluster: Cluster) -> Iterator[None]:
    made = join_or_start(cluster.address, workers=0, cpus_per_worker=0, object_store_bytes=None, log_to_driver=False)
    yield
    if made:
        leave()


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name, _ in files_of(folder)}


def looking_app() -> ClientApp:
    app = ClientApp()

    @app.query("look")
    def look(message: Message, context: Context) -> Message:
        path = str(context.run_config["data.path"])
        seen = {"path": path, "files": sorted(name for name, _ in files_of(Path(path))), "cwd": os.getcwd()}
        return Message(RecordDict({"seen": ConfigRecord(seen)}), reply_to=message)

    return app


@pytest.mark.usefixtures("joined")
def test_what_is_there_is_not_carried(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "_send", None)
    (folder,) = carry({"data.path": (str(store), store)}, Whereabouts.of_this_process())
    assert folder.on_this_node(store) == str(store)
    assert not folder.digest


def test_what_is_not_there_is_carried_and_found_again(
    cluster: Cluster, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in range(2):
        with RayGrid(
            looking_app,
            {"data.path": ABSENT},
            workers=2,
            cpus_per_worker=4,
            address=cluster.address,
            folders={"data.path": store},
        ) as grid:
            replies = list(grid.send_and_receive([Message(RecordDict(), node, "query.look") for node in (1, 2)]))
        monkeypatch.setattr(carried, "_send", None)  # the second time nothing is sent
        (place,) = {str(reply.content.config_records["seen"]["path"]) for reply in replies}
        assert Path(place).parent == tmp_path / "cache" / PLACE, run
        assert content(Path(place)) == content(store)
        assert {str(reply.content.config_records["seen"]["cwd"]) for reply in replies} == {os.getcwd()}
    assert (tmp_path / "cache" / PLACE).stat().st_mode & 0o077 == 0
    assert len(list((tmp_path / "cache" / PLACE).iterdir())) == 1


@pytest.mark.usefixtures("joined")
def test_what_is_too_large_is_refused_by_node_path_and_what_to_do(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "MOST_BYTES", 1000)
    address = ray.util.get_node_ip_address()
    with pytest.raises(InvalidInput, match=rf"data.path is '{ABSENT}'.*Node {address}.*rsync"):
        carry({"data.path": (ABSENT, store)}, Whereabouts.of_this_process())


@pytest.mark.usefixtures("joined")
def test_a_node_that_cannot_write_it_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / PLACE).write_text("in the way")
    with pytest.raises(Failure, match=rf"data.path \({ABSENT}\) could not be sent to node .*File exists"):
        carry({"data.path": (ABSENT, store)}, Whereabouts.of_this_process())


def test_a_damaged_copy_is_not_taken(store: Path, tmp_path: Path) -> None:
    folder = Folder("data.path", ABSENT, files_of(store), "digest")
    copy = tmp_path / "cache" / PLACE / "digest"
    copy.mkdir(parents=True)
    (copy / "manifest.json").write_text("{}")
    assert folder.on_this_node(tmp_path / "cache") is None
    with pytest.raises(NotHere, match=rf"has no data.path at {ABSENT}: copy it there"):
        placed({"data.path": ABSENT}, (folder,), Whereabouts.of_this_process())


@pytest.mark.usefixtures("joined")
def test_what_is_broken_off_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "_digest", lambda path, files: "another")
    with pytest.raises(Failure, match="what arrived is not what was sent"):
        carry({"data.path": (ABSENT, store)}, Whereabouts.of_this_process())
    assert list((tmp_path / "cache" / PLACE).iterdir()) == []


def sent(store: Path) -> Folder:
    files = files_of(store)
    return Folder("data.path", ABSENT, files, _digest(store, files))


def received(folder: Folder, store: Path) -> _Receiver:
    """A receiver that has been given everything."""
    receiver = _Receiver(folder, Whereabouts.of_this_process())
    receiver.make_room()
    for name, _ in folder.files:
        receiver.begin(name)
        receiver.append((store / name).read_bytes())
    return receiver


@pytest.mark.parametrize("before", ["nothing", "damaged", "whole"])
def test_nodes_that_share_a_cache_finish_at_once(store: Path, tmp_path: Path, before: str) -> None:
    folder = sent(store)
    place = tmp_path / "cache" / PLACE / folder.digest
    for _ in range(10):
        receivers = [received(folder, store) for _ in range(4)]
        if before != "nothing":
            received(folder, store).finish()
        if before == "damaged":
            (place / "deep" / "tokens.bin").write_bytes(bytes(100_000))
            (place / "manifest.json").unlink()
        with (place / "deep" / "tokens.bin").open("rb") if before == "whole" else open(os.devnull) as opened:
            together, failures = threading.Barrier(len(receivers)), []

            def finish(receiver: _Receiver, together: threading.Barrier, failures: list[OSError]) -> None:
                together.wait()
                try:
                    receiver.finish()
                except OSError as failure:
                    failures.append(failure)

            threads = [threading.Thread(target=finish, args=(one, together, failures)) for one in receivers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for receiver in receivers:
                receiver.give_up()
            assert not failures
            assert content(place) == content(store)
            if before == "whole":  # what another run's workers read is still what lies there
                assert os.path.samestat(os.fstat(opened.fileno()), (place / "deep" / "tokens.bin").stat())
        assert list(place.parent.iterdir()) == [place]
        shutil.rmtree(place)


def test_what_a_killed_receiver_left_goes_and_what_is_being_received_stays(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, driver, place = sent(store), Whereabouts.of_this_process(), tmp_path / "cache" / PLACE
    alive = received(folder, store)
    (living,) = place.iterdir()
    code = (
        "import os, sys, pickle; folder, driver = pickle.load(sys.stdin.buffer)\n"
        "from fedsim.engine.carried import _Receiver\n"
        "receiver = _Receiver(folder, driver); receiver.make_room(); receiver.begin('manifest.json')\n"
        "receiver.append(b'text'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps((folder, driver)), check=False)
    assert len(list(place.iterdir())) == 2
    (without_lock := place / "digest.earlier.partial").mkdir()  # as earlier versions left them
    assert not _looked(folder, driver)
    assert set(place.iterdir()) == {living, without_lock}
    monkeypatch.setattr(carried, "STALE_SECONDS", -1.0)
    assert not _looked(folder, driver)
    assert set(place.iterdir()) == {living}
    alive.finish()
    assert content(place / folder.digest) == content(store)
    assert _looked(folder, driver)
    assert list(place.iterdir()) == [place / folder.digest]


def test_a_damaged_copy_of_the_right_sizes_is_sent_again(store: Path, tmp_path: Path) -> None:
    folder, driver = sent(store), Whereabouts.of_this_process()
    received(folder, store).finish()
    (tmp_path / "cache" / PLACE / folder.digest / "manifest.json").write_text("[]")
    assert not _looked(folder, driver)
    received(folder, store).finish()
    assert _looked(folder, driver)


def test_a_node_that_does_not_answer_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(reply: object, timeout: float | None = None) -> None:
        assert timeout is not None, "waits for ever"
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "get", never)
    with pytest.raises(Failure, match=r"node 10\.0\.0\.7 did not answer within 600 s .* data\.path"):
        _answer(None, sent(store), "10.0.0.7")


def test_a_node_without_the_base_of_adapters_is_refused(
    cluster: Cluster, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.simulation import required_beside  # here, or this file's workers would load torch

    (adapters := tmp_path / "adapters").mkdir()
    (store / "config.json").write_text("{}")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(store)}
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    required = required_beside(str(adapters))
    assert required["model.path"][0] == store
    monkeypatch.setattr(carried, "_lacking", lambda folder, nodes, driver: {"id": "10.0.0.7"})
    with pytest.raises(InvalidInput, match=rf"model.path is '{store}'.*Node 10.0.0.7 has none.*{adapters}/base"):
        RayGrid(looking_app, workers=1, address=cluster.address, required=required)
    (adapters / "base").mkdir()
    assert not required_beside(str(adapters))  # it is sent with them
    assert not required_beside(str(store))
