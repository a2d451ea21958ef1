"""The rows of the table, and how each is trained and measured."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet

from benchmarks.sst2 import allocation
from benchmarks.sst2.claims import ESTIMATE, GUARANTEE, NONE, estimated_noise, gaussian_rounds, uneven_epsilon
from experiments.face.fine_tune import configuration, trained
from experiments.face.outcomes import FineTuned
from experiments.loading import loaded_for_use
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.models.evaluate import evaluate
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.resources import open_data, open_resources

METHODS = ("non-private", "gaussian", "ew-tune", "anadp", "lmo-dp")
CLASSES = ("0", "1")
DATA = {
    "data_label_column": "label",
    "data_label_names": CLASSES,
    "data_minimum_tokens": 2,
    "data_sequence_length": 64,
    "data_long_texts": "truncate",
    "data_validation_fraction": 0.01,
    "data_test_fraction": 0.01,
}
"""How a sentence becomes a row. All of the dev set is measured; of the training file a hundredth each is held out for
the run's own figures."""
FILES = {"train": "sst2_train.parquet", "dev": "sst2_dev.parquet"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every row has in common; rows of other settings are not put into one table.

    Attributes:
        model: Folder of a model, or default.
        layers, width: Shape of the default model.
        rounds, cohort: Rounds, and sentences in a round, in expectation.
        clip_norm, l1_clip_norm: For Gaussian noise (L2), and for Laplace noise (L1).
        learning_rate: Adam's, for every row.
        delta: δ.
    """

    model: str
    layers: int
    width: int
    rounds: int
    cohort: int
    clip_norm: float
    l1_clip_norm: float
    learning_rate: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training.

    Attributes:
        method: One of METHODS.
        epsilon: The target; infinite without privacy.
        seed: Of sampling and noise.
    """

    method: str
    epsilon: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.method}-{self.epsilon:g}-{self.seed}.json"


def rows(epsilons: tuple[float, ...], seeds: tuple[int, ...]) -> list[Row]:
    """All rows, seed after seed, so that a table that was cut short has all methods."""
    return [
        Row(method=method, epsilon=epsilon, seed=seed)
        for seed in seeds
        for epsilon in (math.inf, *epsilons)
        for method in METHODS
        if (method == "non-private") == math.isinf(epsilon)
    ]


def write_lines(data: Path, output: Path) -> None:
    """SST-2 as the engine reads it, each sentence a user of its own.

    Raises:
        InvalidInput: The folder lacks a file.
    """
    for name, file in FILES.items():
        if not (data / file).is_file():
            raise InvalidInput("data", str(data), f"a folder with {file}")
        lines = output / f"{name}.jsonl"
        if not lines.exists():
            told = pyarrow.parquet.read_table(data / file, columns=["text", "label"]).to_pylist()
            text = "".join(
                json.dumps({"user_id": f"{name} {place}", "text": one["text"], "label": str(one["label"])}) + "\n"
                for place, one in enumerate(told)
            )
            lines.write_text(text, encoding="utf-8")


def finished(row: Row, settings: Settings, output: Path) -> dict[str, Any] | None:
    """What the folder has of a row.

    Raises:
        InvalidInput: It is a row of other settings.
    """
    file = output / "rows" / row.file
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["settings"] != asdict(settings):
        other = [one.name for one in fields(Settings) if found["settings"].get(one.name) != asdict(settings)[one.name]]
        raise InvalidInput("output", str(output), f"a folder whose rows have the same {', '.join(other)}")
    return found


def measured(row: Row, settings: Settings, output: Path) -> dict[str, Any]:
    """Train a row, measure it on the dev set, and keep what came out.

    A row that was cut short is trained from its beginning: with the same seeds it releases the same once more.
    """
    folder = output / "runs" / row.file.removesuffix(".json")
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    config = configured(row, settings, output)
    allocation.LEAST_SCALES.clear()
    tuned = trained(config)
    loaded = loaded_for_use(str(folder / "model"))
    dev = dataclasses.replace(config.data, path=str(output / "dev.jsonl"))
    opened = open_data(dev, loaded)
    found = evaluate(opened.loaded.model, opened.store, opened.loaded.objective)
    told = {
        "method": row.method,
        "epsilon_target": None if math.isinf(row.epsilon) else row.epsilon,
        "seed": row.seed,
        "accuracy": found.accuracy,
        "dev_rows": found.rows,
        "dev_loss": found.loss,
        "noise_multiplier": tuned.summary["noise_multiplier"],
        "epsilon": tuned.statement["epsilon"]["upper"],
        "worth": GUARANTEE if tuned.statement["private"] else NONE,
        **dict(_claimed(row, settings, tuned)),
        "processor_seconds": round(time.process_time() - began, 1),
        "settings": asdict(settings),
    }
    file = output / "rows" / row.file
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "model")
    return told


def configured(row: Row, settings: Settings, output: Path) -> RunConfig:
    """The run of a row."""
    options = {
        "algorithm": "uls",
        "group_size": 1,
        "delta": settings.delta,
        "rounds": settings.rounds,
        "gradients_per_round": settings.cohort,
        "clip_norm": settings.l1_clip_norm if row.method == "lmo-dp" else settings.clip_norm,
        "learning_rate": settings.learning_rate,
        "optimizer_name": "adam",
        "sampling_seed": row.seed,
        "noise_seed": row.seed,
        "evaluation_every": settings.rounds,
        "model_task": "sequence-classification",
        "model_num_labels": len(CLASSES),
        "output": str(output / "runs" / row.file.removesuffix(".json")),
        **DATA,
        **_of_method(row),
    }
    if settings.model == "default":
        options |= {"model_small_layers": settings.layers, "model_small_width": settings.width, "model_small_heads": 2}
    config: RunConfig = configuration(
        RunConfig, settings.model, str(output / "train.jsonl"), None, None, None, options
    )
    return with_estimated_noise(config, row.epsilon) if row.method == "ew-tune" else config


def _of_method(row: Row) -> dict[str, Any]:
    match row.method:
        case "non-private":
            return {"epsilon": math.inf, "plan_allow_no_privacy": True}
        case "anadp":
            return {"epsilon": row.epsilon, "plan_mechanism": allocation.NAME}
        case "lmo-dp":
            return {"epsilon": row.epsilon, "plan_mechanism": "randomised-laplace"}
        case _:
            return {"epsilon": row.epsilon}


def with_estimated_noise(config: RunConfig, epsilon: float) -> RunConfig:
    """The run at the noise whose estimated ε is the one given, and with room for the ε that this noise really has."""
    users = open_resources(config).store.split("train").num_users
    probability, rounds = config.plan.gradients_per_round / users, config.plan.rounds
    noise = estimated_noise(probability, rounds, epsilon, config.plan.delta)
    certified = epsilon_bounds(gaussian_rounds(probability, noise, rounds), config.plan.delta).upper
    plan = dataclasses.replace(config.plan, noise_multiplier=noise, epsilon=1.01 * certified)
    return dataclasses.replace(config, plan=plan)


def _claimed(row: Row, settings: Settings, tuned: FineTuned) -> Iterator[tuple[str, Any]]:
    """What the method's paper would say of the same noise, and what that is worth."""
    if row.method == "ew-tune":
        yield "claimed_epsilon", row.epsilon
        yield "claim_is", ESTIMATE
    if row.method == "anadp":
        least = allocation.LEAST_SCALES[-settings.rounds :]
        noise, probability = tuned.summary["noise_multiplier"], tuned.statement["sampling"]["probability"]
        yield "claimed_epsilon", row.epsilon
        yield "claim_is", NONE
        yield "least_scale", min(least)
        yield "epsilon_without_whitening", uneven_epsilon(probability, noise, least, settings.delta)
