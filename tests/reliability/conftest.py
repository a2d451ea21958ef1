"""A real run, small enough to be killed many times: a data set of one's own, a tiny model, clients in this process."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import ROUNDS

from fedsim.config import CheckpointConfig, EngineConfig, EvaluationConfig, PlanConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.models.config import ModelConfig, SmallModelConfig


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this folder's own."""
    return tmp_path_factory.mktemp("reliability-cache")


@pytest.fixture(scope="session")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 60 users."""
    path = tmp_path_factory.mktemp("posts") / "posts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for user in range(60):
            for post in range(4):
                text = f"Post {post} of writer {user}: the quick brown fox jumps over the lazy dog, again and again."
                file.write(json.dumps({"author": f"user {user}", "text": text}) + "\n")
    return path


@pytest.fixture
def small_run(cache: Path, posts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """small_run(output, **changes): a configuration whose runs take about a second."""
    monkeypatch.setenv("FEDSIM_CACHE", str(cache))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = RunConfig(
        data=DataConfig(source="files", path=str(posts), user_column="author", text_column="text", sequence_length=16),
        model=ModelConfig(
            small=SmallModelConfig(layers=1, width=16, heads=2, context=16, vocabulary_size=300, steps=2, batch_rows=2)
        ),
        plan=PlanConfig(
            rounds=ROUNDS, gradients_per_round=16, delta=1e-3, noise_multiplier=1.0, epsilon=1000.0, clip_norm=0.5
        ),
        engine=EngineConfig(kind="local", workers=1),
        evaluation=EvaluationConfig(every=3, max_rows=20, test_rows=20),
        checkpoint=CheckpointConfig(rounds=2),
        sampling_seed=1,
        noise_seed=2,
    )
    return lambda output, **changes: dataclasses.replace(config, output=str(output) or None, **changes)
