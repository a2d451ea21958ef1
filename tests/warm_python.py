"""Python with fedsim's libraries already imported, for tests that start its command many times.

Importing PyTorch and transformers takes longer than most of these commands. So one process imports them once, and each
command is a fork of it: a process of its own all the same, with its own arguments, working directory, environment and
output. As a program, `python warm_python.py PYTHON SOCKET -m experiments.run …` asks that process for one, and is the
plain interpreter where the answer could be another: for anything but `-m experiments.run`, or where a variable that
libraries read while they are imported is not as it was there.
"""

import array
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = ["-m", "experiments.run"]
LATER = (
    "clients.app", "experiments.face.fine_tune", "experiments.report.run", "experiments.simulation",
    "fedsim.engine.local", "fedsim.models.small", "pyarrow.dataset", "server.app",
)  # fmt: skip
"""What commands import when they need it."""
EACH_ITS_OWN = ("PATH", "PYTHONPATH", "PWD", "OLDPWD", "SHLVL", "_", "FINISHED_RUN", "PYTEST_CURRENT_TEST")
"""Variables that nothing reads while it is imported, or that are heeded afterwards."""


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """What of an environment the libraries may have looked at."""
    return {name: environment[name] for name in environment if name not in EACH_ITS_OWN and name[:7] != "FEDSIM_"}


@contextmanager
def warm_python(environment: dict[str, str]) -> Iterator[list[str]]:
    """What stands before `-m experiments.run` so that a process that imported everything in that environment, and ends
    with the block, runs it."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        place = Path(folder) / "socket"
        (Path(folder) / "environment").write_text(json.dumps(read_at_import(environment)), encoding="utf-8")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(place))
            listening.listen()
            serving = subprocess.Popen(
                [sys.executable, __file__, "serve", str(listening.fileno())],
                env=environment, pass_fds=[listening.fileno()], stdin=subprocess.PIPE,
            )  # fmt: skip
        try:
            yield [__file__, sys.executable, str(place)]
        finally:
            serving.kill()
            serving.communicate()


def serve(descriptor: int) -> list[str]:
    """Fork for each command that is asked for, until standard input ends; returns in a fork, with its arguments."""
    from experiments.run import COMMANDS

    sys.path.pop(0)  # this file's folder
    for name in (*LATER, *(module for module, *_ in COMMANDS.values())):
        importlib.import_module(name)
    own = [path for path in sys.path if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none becomes a zombie
    with socket.socket(fileno=descriptor) as listening:
        while True:
            if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
                sys.exit()
            asking, _ = listening.accept()
            with asking:
                if os.fork():
                    continue
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                text, descriptors = received(asking)
                if child := os.fork():
                    _, status = os.waitpid(child, 0)
                    asking.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                    os._exit(0)
            asked = json.loads(text)
            for number, given in enumerate(descriptors):
                os.dup2(given, number)
                os.close(given)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environment"])
            looked_in = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
            sys.path[:] = [asked["folder"], *looked_in, *own]
            return list(asked["arguments"])


def received(asking: socket.socket) -> tuple[str, list[int]]:
    """What a program asks for, and its standard input, output and error."""
    text, ancillary, _, _ = asking.recvmsg(1 << 16, socket.CMSG_LEN(3 * array.array("i").itemsize))
    descriptors = array.array("i", ancillary[0][2])
    while part := asking.recv(1 << 16):
        text += part
    return text.decode(), list(descriptors)


def ask(place: str, arguments: list[str]) -> int:
    """Have a command run by the process that listens there; returns its exit code."""
    wanted = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        text = json.dumps(wanted).encode()
        standard = array.array("i", [0, 1, 2])
        sent = asking.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, standard)])
        asking.sendall(text[sent:])
        asking.shutdown(socket.SHUT_WR)
        return int(asking.recv(16) or b"1")


def program() -> None:
    """Ask for a command, or be the plain interpreter."""
    python, place, *rest = sys.argv[1:]
    imported = json.loads((Path(place).parent / "environment").read_text(encoding="utf-8"))
    if rest[:2] != COMMAND or read_at_import(dict(os.environ)) != imported:
        os.execv(python, [python, *rest])
    sys.exit(ask(place, rest[2:]))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.argv[1:] = serve(int(sys.argv[2]))
        sys.modules.pop(COMMAND[1])  # as it is not there where Python has just begun
        runpy.run_module(COMMAND[1], run_name="__main__", alter_sys=True)
    else:
        program()
