"""What the programs of all libraries share: the task, the rows, the model, and what is left of a training.

Needs numpy, torch and transformers alone, of whatever versions the library asks for.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

LEARNING_RATE, SEED = "--learning-rate", "--seed"


@dataclass(frozen=True)
class Task:
    """How much is computed, and for which guarantee.

    Attributes:
        epsilon, delta: What is asked of the library, in its own unit of privacy.
        steps: Steps or rounds.
        gradients: Gradient evaluations of a step.
        group_size: Rows of one user that it takes at most where it knows users.
        clip_norm: L2 bound on one clipped unit.
        learning_rate: Of Adam; of FedAvg see flower_side.py.
        seed: Of sampling and noise.
        noise_multiplier: Given where the library is told the noise; None where it finds it.
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    steps: int = 25
    gradients: int = 256
    group_size: int = 4
    clip_norm: float = 1.0
    learning_rate: float = 3e-3
    seed: int = 0
    noise_multiplier: Optional[float] = None  # noqa: UP045 (old Pythons read this too)

    @property
    def cohort(self):
        """Users of a round, where each counts for as many gradients as it may have rows."""
        return self.gradients // self.group_size


def opened():
    """The folder that this program was given, and the task in it."""
    folder = Path(sys.argv[1])
    return folder, Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))


def load_rows(folder):
    """Training rows int64 [rows, tokens], and the user of each int64 [rows], users from 0."""
    import numpy as np

    found = np.load(folder / "train.npz")
    return found["rows"], found["users"]


def load_model(folder):
    """The model that training begins with."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(str(folder / "model"), torch_dtype=torch.float32)


def row_losses(model, rows):
    """Each row's mean loss over its predicted tokens [rows]."""
    import torch
    from torch.nn.functional import cross_entropy

    places = torch.arange(rows.shape[1]).repeat(len(rows), 1)  # per-sample gradients want a batch of them
    logits = model(input_ids=rows, position_ids=places, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1).mean(1)


def at_most(rows, users, group_size, seed):
    """So many rows of each user, drawn once: the places of the rows that stay, ascending."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(users[order], kind="stable")]
    first = np.searchsorted(users[order], users[order])
    return np.sort(order[np.arange(len(order)) - first < group_size])


HELD: dict = {}
"""What a process of several that train opens once."""


class Clock:
    """Seconds and this process's processor seconds from now on."""

    def __init__(self):
        self.began = time.perf_counter(), time.process_time()

    def read(self):
        return {
            "seconds": time.perf_counter() - self.began[0],
            "processor_seconds": time.process_time() - self.began[1],
        }


def versions(*packages):
    """Those that are installed, by name."""
    found = {}
    for package in ("torch", "transformers", "numpy", *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"python": ".".join(map(str, sys.version_info[:3])), **found}


def leave(folder, model, **report):
    """Write the trained parameters by name, and what is to be known of the training."""
    import numpy as np

    named = {name.removeprefix("_module."): value for name, value in model.named_parameters()}
    np.savez(folder / "trained.npz", **{name: value.detach().numpy() for name, value in named.items()})
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
