"""Runs of the command line that leave a small model: of two writers' texts, and of texts in classes."""

import json
from pathlib import Path

import pytest

from experiments.run import main

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY = [
    "--model.small.layers", "1",
    "--model.small.width", "16",
    "--model.small.heads", "2",
    "--model.small.context", "32",
    "--model.small.vocabulary-size", "300",
    "--model.small.steps", "2",
    "--model.small.batch-rows", "2",
    "--plan.delta", "1e-3",
    "--plan.gradients-per-round", "16",
    "--plan.rounds", "2",
    "--data.sequence-length", "16",
    "--evaluation.max-rows", "20",
    "--evaluation.test-rows", "20",
    "--engine.kind", "local",
    "--engine.workers", "1",
]  # fmt: skip


def story_llama() -> str:
    """Folder of a real Llama of 260,032 parameters; without it the test is skipped."""
    path = SHARED / "model_stories260k"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return str(path.resolve())


def posts(path: Path, users: int = 60) -> Path:
    """Texts of so many users, each of a class."""
    with path.open("w", encoding="utf-8") as file:
        for user in range(users):
            for post in range(4):
                text = f"Post {post} of writer {user}: once upon a time there was a fox that jumped over a lazy dog."
                label = ["calm", "angry", "glad"][(user + post) % 3]
                record = {"author": f"user {user}", "text": text, "mood": label}
                file.write(json.dumps(record) + "\n")
    return path


def data_flags(path: Path) -> list[str]:
    return ["--data.source", "files", "--data.path", str(path), "--data.user-column", "author"]


def train(output: Path, *flags: str) -> Path:
    """The folder of a run that the command line made."""
    assert main(["train", "--output", str(output), *TINY, *flags]) == 0
    return output
