"""The round benchmark on a machine that has neither Flower nor Ray, nor what only preparing data needs."""

import json
import subprocess
import sys

from fedsim.phases import Times

ABSENT = ("flwr", "ray", "duckdb", "datasets", "dp_accounting", "tyro", "cryptography")
PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from benchmarks.round import main
main()
"""


def test_real_rounds_run_in_one_process_with_torch_alone() -> None:
    options = ["--engine", "direct", "--size", "tiny", "--users", "3", "--rounds", "1"]
    program = PROGRAM.format(absent=set(ABSENT))
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words, share, line = done.stdout.splitlines()
    found = json.loads(line)
    times = Times.from_json(found)
    assert times.in_words() in words
    assert times.rounds == 1
    assert found["parameters"] > 1_000_000
    assert {"load", "compute", "transport", "noise", "optimizer", "sampling", "charge", "other"} == set(times.seconds)
    assert 0 < found["beyond_gradients"] < 1
    assert f"{100 * found['beyond_gradients']:.1f} %" in share
