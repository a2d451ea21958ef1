"""Addresses of clusters: what is none, and what does not answer, is a sentence within ten seconds."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from ray.cluster_utils import Cluster

from fedsim.engine import address
from fedsim.engine.address import joined_address
from fedsim.errors import InvalidInput


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.ANSWERS_WITHIN + address.LOOKS_WITHIN < 10
    monkeypatch.setattr(address, "ANSWERS_WITHIN", 1.0)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Somebody listens, and never says a word."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield int(one.getsockname()[1])


@pytest.fixture
def strange_port() -> Iterator[int]:
    """Somebody answers who is not Ray."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_closed_port(form: str, closed_port: int, quickly: None) -> None:
    with pytest.raises(InvalidInput, match=rf"^engine.address is '.*{closed_port}'.*refused.*ray start --head"):
        joined_address(form.format(closed_port))


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_port_that_swallows_what_it_is_sent(form: str, silent_port: int, quickly: None) -> None:
    with pytest.raises(InvalidInput, match="something else listens there"):
        joined_address(form.format(silent_port))


def test_a_port_of_something_else(strange_port: int) -> None:
    with pytest.raises(InvalidInput, match=rf"127.0.0.1:{strange_port} is no head of a Ray cluster"):
        joined_address(f"127.0.0.1:{strange_port}")


def test_a_name_that_nobody_has(quickly: None) -> None:
    with pytest.raises(InvalidInput, match=r"Nothing at nobody.invalid:6379 answers"):
        joined_address("nobody.invalid:6379")


@pytest.mark.parametrize(
    "given", ["head", "head:", ":6379", "head:x", "head:70000", "ray://head", "http://head:6379/"]
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(InvalidInput, match="it must be host:port of a running"):
        joined_address(given)


@pytest.mark.parametrize("given", [None, "local"])
def test_here(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joined_address(given) is None


def test_auto_is_what_the_environment_names(
    cluster: Cluster, closed_port: int, quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    assert joined_address("auto") == cluster.address
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    with pytest.raises(InvalidInput, match=rf"engine.address is 'auto'.*Nothing at 127.0.0.1:{closed_port}"):
        joined_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(InvalidInput, match="RAY_ADDRESS is 'local'"):
        joined_address("auto")


def test_auto_where_no_ray_was_started(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(InvalidInput, match="RAY_ADDRESS is not set"):
        joined_address("auto")


def test_a_cluster_that_runs(cluster: Cluster) -> None:
    assert joined_address(cluster.address) == cluster.address
