"""A frozen base is one piece of memory for all processes of a machine: pages of its file that nobody wrote to."""

import re
from pathlib import Path

import numpy as np
import pytest

from clients.computing import Computing
from clients.worker import Worker
from fedsim.clip import Clip
from fedsim.gradients import clipped_sum
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.fingerprint import weights_fingerprint
from fedsim.models.load import load_model
from fedsim.rows import TokenRows


def mappings(of: Path) -> list[tuple[range, int]]:
    """Where this process has mapped a file, and how many bytes of it are pages of its own by now."""
    found: list[tuple[range, int]] = []
    named = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            named = line.endswith(str(of))
            if named:
                found.append((range(int(head[1], 16), int(head[2], 16)), 0))
        elif named and (own := re.match(r"(?:Private_Dirty|Anonymous): +(\d+) kB", line)):
            found[-1] = (found[-1][0], found[-1][1] + 1024 * int(own[1]))
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="there is no /proc/self/smaps here")
def test_a_frozen_base_is_read_where_its_file_is_mapped_and_never_written_to(story_llama: str) -> None:
    """Through loading, fingerprints, gradients and evaluation in a worker; adapters are each process's own."""
    loaded = load_model(ModelConfig(path=story_llama, lora_rank=2))
    worker = Worker(loaded.model, loaded.objective, None, Computing())  # type: ignore[arg-type]
    rows = TokenRows.from_lists(np.random.default_rng(0).integers(3, 500, (6, 20)).tolist())
    weights_fingerprint(worker.model)
    worker.layout.load(worker.model, worker.layout.flatten(worker.model).numpy() + np.float32(0.01))
    clipped_sum(worker.model, rows, np.arange(6), Clip(norm=1.0), objective=loaded.objective)
    evaluate(worker.model, rows, loaded.objective)
    mapped = mappings(Path(story_llama) / "model.safetensors")
    for name, parameter in worker.model.named_parameters():
        own = [bytes for addresses, bytes in mapped if parameter.data_ptr() in addresses]
        assert own == ([] if parameter.requires_grad else [0]), name
