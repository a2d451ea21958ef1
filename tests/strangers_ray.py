"""A Ray that somebody else has begun on this machine by `ray start`, where whoever does not look joins it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from own_ports import free_ports
from ray._raylet import GcsClient


@dataclass(frozen=True)
class Stranger:
    """One that runs.

    Attributes:
        address: Of its head.
        environment: Of a process on the same machine, which finds that Ray where Ray looks for one.
    """

    address: str
    environment: dict[str, str]

    def joined(self) -> int:
        """How many programs have joined it so far."""
        return len(GcsClient(address=self.address).get_all_job_info())


@contextmanager
def strangers_ray() -> Iterator[Stranger]:
    """A head in a temporary folder of its own, where nobody but the test looks for it; it ends with this."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's are too long for Ray's sockets
    environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    port, client_port = free_ports(2)
    start = ["start", "--head", "--port", port, "--ray-client-server-port", client_port, "--num-cpus", "2"]
    start += ["--include-dashboard", "false", "--object-store-memory", str(100 << 20)]
    try:
        subprocess.run(
            [str(Path(sys.executable).with_name("ray")), *start], env=environment, check=True, capture_output=True
        )
        yield Stranger((Path(folder) / "ray" / "ray_current_cluster").read_text().strip(), environment)
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == folder:
                    process.kill()
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
        shutil.rmtree(folder, ignore_errors=True)
