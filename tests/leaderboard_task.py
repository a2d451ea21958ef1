"""A task of the leaderboard that is small enough for a test, and runs of it."""

import json
from pathlib import Path

from benchmarks.leaderboard.enter import Submission
from benchmarks.leaderboard.tasks import Files, Task
from experiments.run import main
from fedsim.models.config import SmallModelConfig
from fedsim.models.small import small_model_folder

TASK = Task(
    name="tiny",
    text="posts of 60 writers",
    base="a model of one layer",
    options={"data.source": "files", "data.user-column": "author", "data.sequence-length": 16},
    fetched=True,
    delta=1e-3,
    most_rows=20,
)
SHAPE = SmallModelConfig(layers=1, width=16, heads=2, context=32, vocabulary_size=300, steps=2, batch_rows=2)
WHO = Submission(task="tiny", title="ULS", who="somebody", link="https://example.org/uls", chosen="beforehand")


def text_of(user: int, post: int) -> str:
    return f"Post {post} of writer {user}: once upon a time there was a fox that jumped over a lazy dog."


def made_in(folder: Path) -> Files:
    """Text and base model of the task, made in a folder."""
    with (folder / "posts.jsonl").open("w", encoding="utf-8") as file:
        for user in range(60):
            for post in range(4):
                file.write(json.dumps({"author": f"user {user}", "text": text_of(user, post)}) + "\n")
    public = [text_of(user, 9) for user in range(20)]
    model = small_model_folder(SHAPE, texts=lambda: public, cache=folder, progress=False)
    return Files(data=str(folder / "posts.jsonl"), model=str(model))


def trained(output: Path, files: Files, *more: str) -> Path:
    """A finished run of the task."""
    flags = {
        **TASK.options,
        "data.path": files.data,
        "model.path": files.model,
        "plan.delta": TASK.delta,
        "plan.gradients-per-round": 16,
        "plan.rounds": 2,
        "engine.kind": "local",
        "evaluation.max-rows": 5,
        "evaluation.test-rows": 5,
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["train", *given, "--output", str(output), *more]) == 0
    return output
