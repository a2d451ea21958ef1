"""The command: one library's training for each learning rate and seed, or the table of all."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command_line import run_benchmark
from benchmarks.environments import environment
from benchmarks.peers import figure, lines, ours
from benchmarks.peers.certificates import ADD_OR_REMOVE, certify, noise_for
from benchmarks.peers.peers import NAMES, OURS, PACKAGES, PEERS, Peer
from benchmarks.peers.sides import side
from benchmarks.peers.sides.side import Task
from benchmarks.peers.task import Corpus, write
from fedsim.cache import default_cache
from fedsim.errors import Failure, InvalidInput
from fedsim.models.config import DEFAULT_PATH
from fedsim.models.evaluate import evaluate
from fedsim.resources import Resources
from fedsim.rows import TokenRows

SIDES = Path(side.__file__).parent


@dataclass(frozen=True, kw_only=True)
class PeersBenchmark:
    """Train as a library's documentation shows; the names "table" and "figure" show what all have left."""

    name: str
    """Which library; or table, or figure."""
    output: Path = Path("runs/peers")
    """Where lines are written, a file a library, and read by table and figure, which is drawn there too."""
    data: str | None = None
    """Users' text: a file with the columns user_id and text. By default docstrings of installed packages."""
    model: str = DEFAULT_PATH
    """A model's folder, or default."""
    epsilon: float = 8.0
    """Asked of each library, in its own unit of privacy."""
    delta: float = 1e-5
    """The same δ for all."""
    steps: int = 25
    """Steps or rounds."""
    gradients: int = 256
    """Gradient evaluations of a step."""
    group_size: int = 4
    """Most rows of a user in a round, where a library knows users."""
    learning_rates: tuple[float, ...] = (0.003, 0.01)
    """Each is tried; the table takes the one of least loss on validation users, for every library alike."""
    seeds: tuple[int, ...] = (0,)
    """Each is tried; the table shows means."""
    cache: Path | None = None
    """Where environments are kept; by default fedsim's cache."""

    def run(self) -> None:
        """Train and write a line for each learning rate and seed, or show what is there.

        Raises:
            InvalidInput: For an unknown name.
        """
        if self.name in ("table", "figure"):
            self._show(lines.best(lines.read(self.output)))
            return
        if self.name not in (*PEERS, *OURS):
            raise InvalidInput("name", self.name, "table, figure, or one of " + ", ".join((*PEERS, *OURS)))
        corpus = Corpus(path=self.data, model=self.model)
        resources = corpus.resources()
        self.output.mkdir(parents=True, exist_ok=True)
        for seed in self.seeds:
            for rate in self.learning_rates:
                task = Task(
                    epsilon=self.epsilon,
                    delta=self.delta,
                    steps=self.steps,
                    gradients=self.gradients,
                    group_size=self.group_size,
                    learning_rate=rate,
                    seed=seed,
                )
                with tempfile.TemporaryDirectory(prefix="peers-") as work:
                    line = self._line(Path(work), corpus, resources, task)
                with (self.output / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(line.to_json() + "\n")
                print(line.to_json(), flush=True)

    def _show(self, found: list[lines.Line]) -> None:
        if self.name == "figure":
            print(figure.draw(found, self.epsilon, self.output / "peers.png"))
            return
        print(lines.table(lines.asked(found, self.epsilon), NAMES, PACKAGES))

    def _line(self, work: Path, corpus: Corpus, resources: Resources, task: Task) -> lines.Line:
        write(work, resources, task)
        held_out = dict(np.load(work / "held_out.npz"))
        before = loss(resources, held_out["test"])
        if self.name in OURS:
            report = ours.train(work, corpus, task, OURS[self.name][1])
            certified: dict[str, Any] = {"user_epsilon": report["stated_epsilon"], "user_words": ADD_OR_REMOVE}
            stated_of = "one user"
            trained = named_parameters(work / "run" / "model")
        else:
            peer = PEERS[self.name]
            report = trained_by(peer, work, self.cache or default_cache() / "benchmarks", task)
            certificate = certify(report["mechanism"], task.delta)
            certified = {
                "user_epsilon": certificate.epsilon,
                "user_words": certificate.against,
                "group_privacy_epsilon": certificate.by_group_privacy,
            }
            stated_of = peer.stated_of
            trained = dict(np.load(work / "trained.npz"))
        took_over(resources.loaded.model, trained)
        after = {part: loss(resources, rows) for part, rows in held_out.items()}
        took_over(resources.loaded.model, named_parameters(work / "model"))
        return lines.Line(
            peer=self.name,
            date=datetime.now(UTC).date().isoformat(),
            task=asdict(task),
            loss_before=before,
            validation_loss=after["validation"],
            test_loss=after["test"],
            stated_of=stated_of,
            **certified,
            **report,
        )


def trained_by(peer: Peer, work: Path, cache: Path, task: Task) -> dict[str, Any]:
    """Run a library's program in its environment on the task in a folder; its report.

    Raises:
        Failure: Where it ends with an error.
    """
    python = Path(sys.executable)
    if not peer.here:
        folder = cache / "peers" / f"{peer.package}-{version('torch')}"
        python = environment(folder, peer.requirements, without_dependencies=peer.without_dependencies)
    if peer.noise is not None:
        owners = np.load(work / "train.npz")["users"]
        noise = noise_for(peer.noise(task, owners, int(owners.max()) + 1), task.epsilon, task.delta)
        (work / "task.json").write_text(json.dumps(asdict(replace(task, noise_multiplier=noise))), encoding="utf-8")
    quiet = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    flower = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [str(python), str(SIDES / f"{peer.side}.py"), str(work)],
        check=False,
        capture_output=True,
        text=True,
        cwd=work,
        env={**os.environ, **quiet, **flower, "PYTHONPATH": str(SIDES)},
    )
    if done.returncode:
        raise Failure(f"{peer.name} ended with {done.returncode}: {done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads((work / "report.json").read_text(encoding="utf-8"))
    return report


def named_parameters(folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a saved model, by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def took_over(model: torch.nn.Module, named: dict[str, np.ndarray]) -> None:
    """Write parameters into a model.

    Raises:
        Failure: Where names are not the model's own.
    """
    own = dict(model.named_parameters())
    if set(own) != set(named):
        raise Failure(f"these parameters differ in name: {', '.join(sorted(set(own) ^ set(named))[:6])}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(torch.from_numpy(named[name]))


def loss(resources: Resources, rows: np.ndarray) -> float:
    """Nats a token on rows of equal length."""
    offsets = np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1]
    loaded = resources.loaded
    return evaluate(loaded.model.eval(), TokenRows(tokens=rows.ravel(), offsets=offsets), loaded.objective).loss


if __name__ == "__main__":
    sys.exit(run_benchmark(PeersBenchmark, positional=True))
