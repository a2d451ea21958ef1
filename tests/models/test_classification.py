"""Classifiers fine-tuned by users, without noise, must learn: clipped sums are their only gradient."""

from pathlib import Path

import duckdb
import numpy as np
import torch
from tiny_models import shared_data

from fedsim.clip import Clip
from fedsim.gradients import clipped_sum
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.load import LoadedModel, load_model
from fedsim.rows import TokenRows

CONTEXT = 32


def classifier(texts: np.ndarray, num_labels: int, cache: Path) -> LoadedModel:
    """One block, not pre-trained: a tokenizer of the task's own words lets it learn in seconds."""
    small = SmallModelConfig(layers=1, width=64, heads=4, context=CONTEXT, vocabulary_size=2000, steps=0)
    config = ModelConfig(task="sequence-classification", num_labels=num_labels, small=small)
    return load_model(config, public_texts=texts.tolist, cache=cache, progress=False)


def rows_of(loaded: LoadedModel, texts: np.ndarray, classes: np.ndarray) -> TokenRows:
    encoded = loaded.tokenizer(texts.tolist(), truncation=True, max_length=CONTEXT)["input_ids"]
    return TokenRows.from_lists(encoded, classes.astype(np.int64))


def fine_tune(loaded: LoadedModel, rows: TokenRows, users: np.ndarray, *, cohort: int, rounds: int) -> None:
    """Rounds over cohorts of users, each user's update clipped, followed by Adam."""
    flat = loaded.layout.flatten(loaded.model).requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=3e-3)
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        drawn = generator.choice(users.max() + 1, cohort, replace=False)
        chosen = np.flatnonzero(np.isin(users, drawn))
        _, unit_ids = np.unique(users[chosen], return_inverse=True)
        bounds = [(rows.offsets[row], rows.offsets[row + 1]) for row in chosen]
        part = TokenRows.from_lists([rows.tokens[a:b].tolist() for a, b in bounds], rows.classes[chosen])
        found = clipped_sum(loaded.model, part, unit_ids, Clip(norm=1.0), objective=loaded.objective)
        assert found.finite.all()
        flat.grad = torch.as_tensor(found.total) / cohort
        optimizer.step()
        loaded.layout.load(loaded.model, flat.detach())


def gain_over_majority(loaded: LoadedModel, rows: TokenRows) -> float:
    majority = np.bincount(rows.classes).max() / len(rows)
    return evaluate(loaded.model, rows, loaded.objective).accuracy - majority


def test_components_of_commits_are_told_for_held_out_authors(tmp_path: Path) -> None:
    path = shared_data("rails_commits") / "rails_commits.parquet"
    query = f"""
        select text, user_id, label from '{path}' where length(text) > 10
        qualify row_number() over (partition by user_id order by hash(text)) <= 2 order by hash(text)
    """
    texts, authors, labels = duckdb.sql(query).fetchnumpy().values()
    _, classes = np.unique(labels, return_inverse=True)
    assert classes.max() == 16
    # Authors are named by hashes, so a fifth of their numbers is a random fifth of them.
    _, users = np.unique(authors, return_inverse=True)
    held_out = users % 5 == 0
    loaded = classifier(texts[~held_out], 17, tmp_path)
    _, training_users = np.unique(users[~held_out], return_inverse=True)
    fine_tune(loaded, rows_of(loaded, texts[~held_out], classes[~held_out]), training_users, cohort=128, rounds=60)
    assert gain_over_majority(loaded, rows_of(loaded, texts[held_out], classes[held_out])) > 0.1


def test_sentiment_is_told_with_one_example_a_user(tmp_path: Path) -> None:
    folder = shared_data("glue")

    def read(name: str, count: int) -> list[np.ndarray]:
        query = f"select text, label from '{folder / name}' order by hash(text) limit {count}"
        return list(duckdb.sql(query).fetchnumpy().values())

    texts, classes = read("sst2_train.parquet", 6000)
    loaded = classifier(texts, 2, tmp_path)
    fine_tune(loaded, rows_of(loaded, texts, classes), np.arange(len(texts)), cohort=128, rounds=60)
    assert gain_over_majority(loaded, rows_of(loaded, *read("sst2_dev.parquet", 872))) > 0.08
