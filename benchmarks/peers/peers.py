"""Who is compared, and what each is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

TORCH = f"torch=={version('torch').split('+')[0]}"
TRANSFORMERS = f"transformers=={version('transformers')}"
"""The same as here, where the library does not ask for others."""
ROW = "one row of text"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library, used in one way.

    Attributes:
        name: What the table calls it.
        package: The package whose version is shown.
        side: Its program in `sides`.
        requirements: What its environment has.
        without_dependencies: What is put there although its own requirements cannot be met.
        stated_of: Whose data its ε is about.
        noise: The mechanism without its noise, for which the noise is found here; given the task, the rows' owners
            (int64 [rows]) and the number of users. None where the library finds its noise.
        here: Whether it runs in fedsim's own environment, which has it.
    """

    name: str
    package: str
    side: str
    requirements: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    stated_of: str
    noise: Callable[[Any, Any, int], dict[str, Any]] | None = None
    here: bool = False


def _bounded_rows(task: Any, owners: Any, users: int) -> dict[str, Any]:
    import numpy as np

    rows = int(np.minimum(np.bincount(owners), task.group_size).sum())
    batches = -(-rows // task.gradients)  # Opacus takes one over the batches of an epoch
    return {
        "kind": "poisson-rows",
        "probability": 1 / batches,
        "steps": task.steps,
        "most_rows": task.group_size,
    }


def _cohort(task: Any, owners: Any, users: int) -> dict[str, Any]:
    return {"kind": "fixed-cohort", "cohort": task.cohort, "population": users, "steps": task.steps}


OPACUS = ("opacus==1.6.0", TRANSFORMERS, TORCH)
PEERS = {
    "opacus": Peer(name="Opacus", package="opacus", side="opacus_side", requirements=OPACUS, stated_of=ROW),
    "opacus-users": Peer(
        name="Opacus, rows of a user bounded, noise from fedsim",
        package="opacus",
        side="opacus_side",
        requirements=OPACUS,
        stated_of=ROW,
        noise=_bounded_rows,
    ),
    "dptrainer": Peer(
        name="DPTrainer",
        package="dptrainer",
        side="dptrainer_side",
        requirements=("opacus==1.6.0", TRANSFORMERS, TORCH, "accelerate", "datasets", "pandas"),
        without_dependencies=("dptrainer==0.1.2",),  # it asks for an Opacus 1.5.4.post13, which no index has
        stated_of=ROW,
    ),
    "dp-transformers": Peer(
        name="dp-transformers",
        package="dp-transformers",
        side="dp_transformers_side",
        requirements=(
            "opacus==1.4.0",
            "transformers==4.33.3",
            "datasets<3",
            "pyarrow<20",
            "accelerate==0.23.0",
            TORCH,
            "numpy<2",
            "prv-accountant<0.2.0",
        ),
        without_dependencies=("dp-transformers==1.0.0",),  # it asks for torch<=1.12.1, which Python 3.11 has not
        stated_of="one author",
    ),
    "flower": Peer(
        name="Flower, fixed clipping, noise from fedsim",
        package="flwr",
        side="flower_side",
        stated_of="one client",
        noise=_cohort,
        here=True,
    ),
    "pfl": Peer(
        name="pfl",
        package="pfl",
        side="pfl_side",
        requirements=("pfl[pytorch]==0.6.0", TRANSFORMERS, TORCH),
        stated_of="one user",
    ),
}
OURS = {"fedsim": ("fedsim, ULS", ()), "fedsim-bands": ("fedsim, ULS, bands", ("--plan.bands", "auto"))}
"""fedsim's own rows: what they are called, and what is added to the command."""
NAMES = {key: peer.name for key, peer in PEERS.items()} | {key: name for key, (name, _) in OURS.items()}
PACKAGES = {key: peer.package for key, peer in PEERS.items()} | dict.fromkeys(OURS, "fedsim")
"""What the table calls each, and the package whose version it shows."""
