"""Where a running Ray cluster is, and whether Ray answers there: found out in seconds, which Ray takes minutes for."""

import os
import socket
import threading

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import find_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]  # made by protobuf
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from fedsim.engine.environment import HERE
from fedsim.errors import InvalidInput

ANSWERS_WITHIN = 7.0
"""Seconds that whoever listens at an address has for saying that it is Ray."""
LOOKS_WITHIN = 2.0
"""Seconds to find out why nobody did."""
AUTO, BY_CLIENT = "auto", "ray://"
FORMS = "host:port of a running Ray cluster's head, ray://host:port, auto, or local to start Ray here"


def joined_address(address: str | None) -> str | None:
    """The address to give to Ray; None where Ray is to be started on this machine.

    Args:
        address: As a person gave it: None or "local" for this machine; "host:port" of a cluster's head; "ray://host:port"
            of its server for drivers on other machines; "auto" for the cluster that RAY_ADDRESS names, or else the one
            that `ray start` began here last.

    Raises:
        InvalidInput: It has none of these forms, no cluster is known, or Ray does not answer there: in ten seconds.
    """
    if address is None or address == HERE:
        return None
    found = _known() if address == AUTO else address
    place = found.removeprefix(BY_CLIENT)
    host, colon, port = place.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        told = "" if found == address else f"RAY_ADDRESS is {found!r}."
        raise InvalidInput("engine.address", address, FORMS, told)
    if (reason := _silence(place, host.strip("[]"), int(port), by_client=found.startswith(BY_CLIENT))) is not None:
        hint = f"{reason} Start one with `ray start --head` there, or leave the address out to start Ray here."
        raise InvalidInput("engine.address", address, "the address of a running Ray cluster", hint)
    return found


def _known() -> str:
    """The address that "auto" stands for, in Ray's own order."""
    named = os.environ.get("RAY_ADDRESS")
    if named and named != AUTO:
        return named
    if found := find_bootstrap_address(None):
        return str(found)
    hint = "No `ray start` has run on this machine, and RAY_ADDRESS is not set: name the head's host:port."
    raise InvalidInput("engine.address", AUTO, "left out, or given on a node of a running Ray cluster", hint)


def _silence(place: str, host: str, port: int, *, by_client: bool) -> str | None:
    """Why Ray cannot be spoken to there, as a sentence; None where it can."""
    channel = init_grpc_channel(place, [("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWERS_WITHIN)
        if not by_client:
            asked = NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            asked.CheckAlive(CheckAliveRequest(), timeout=LOOKS_WITHIN)
        return None
    except grpc.FutureTimeoutError:
        return f"Nothing at {place} answers as Ray does in {ANSWERS_WITHIN:g} s: {_reason(host, port)}."
    except grpc.RpcError as refusal:
        told = refusal.details() if isinstance(refusal, grpc.Call) else str(refusal)
        return f"What listens at {place} is no head of a Ray cluster ({told})."
    finally:
        channel.close()


def _reason(host: str, port: int) -> str:
    """What the system says of a plain connection. Names are looked up without a limit: so in a thread of its own."""
    said = [f"no connection in {LOOKS_WITHIN:g} s; a firewall may swallow it, or the host may be down"]

    def look() -> None:
        try:
            socket.create_connection((host, port), timeout=LOOKS_WITHIN).close()
            said.append("something else listens there")
        except TimeoutError:
            pass
        except OSError as error:
            said.append(error.strerror or str(error))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(LOOKS_WITHIN)
    return said[-1]
