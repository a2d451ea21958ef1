"""What a worker does not load before it is asked for something: each of these costs every worker seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_worker_starts_without_the_libraries_of_adapters_and_an_app_of_another_without_those_of_models() -> None:
    script = (
        "import sys, clients.answers; print('transformers' in sys.modules);"
        "import clients.app; print([one in sys.modules for one in ('transformers', 'peft', 'bitsandbytes')])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["False", "[True, False, False]"]
