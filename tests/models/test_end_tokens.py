"""Classifiers that read their answer at the end token, of which transformers wants equally many in every row."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.models.families import CLASSES, CLASSIFIERS
from benchmarks.models.tiny import save_tiny
from fedsim.clip import Clip
from fedsim.gradients import SequenceClassification, clipped_sum
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.export import export
from fedsim.models.load import LoadedModel, load_model
from fedsim.rows import TokenRows

END, PAD = 2, 1
TEXTS = [[7, 8, 9, END], [7, 8], [END, 7, END, 8], [9] * 6, [END], [10, END, END]]
"""With the end token where it belongs, nowhere, and elsewhere."""
USERS = np.array([0, 1, 1, 2, 3, 3])


def loaded(family: str, folder: Path) -> LoadedModel:
    path = save_tiny(*CLASSIFIERS[family], False, folder)
    return load_model(ModelConfig(path=path, task="sequence-classification", num_labels=CLASSES))


def rows() -> TokenRows:
    return TokenRows.from_lists(TEXTS, np.arange(len(TEXTS)) % CLASSES)


def test_every_row_ends_once_and_where_it_did() -> None:
    batch = SequenceClassification(end_token=END).collate(rows(), np.arange(len(TEXTS)), "cpu", PAD)
    real = batch.attention_mask.bool()
    assert real.sum(1).tolist() == [len(text) for text in TEXTS]
    for row, mask, text in zip(batch.input_ids, real, TEXTS, strict=True):
        kept = [PAD if token == END else token for token in text[:-1]]
        assert row[mask].tolist() == [*kept, END]
        assert (row[~mask] == PAD).all()
    plain = SequenceClassification().collate(rows(), np.arange(len(TEXTS)), "cpu", PAD)
    assert [row[mask].tolist() for row, mask in zip(plain.input_ids, real, strict=True)] == TEXTS


@pytest.mark.parametrize("family", ["T5", "UMT5", "BART", "mBART"])
def test_they_train_whatever_rows_end_with_and_users_keep_to_themselves(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path / "model")
    clip = Clip(norm=0.1)

    def total(chosen: np.ndarray, method: str = "fast") -> torch.Tensor:
        of = np.flatnonzero(np.isin(USERS, chosen))
        return clipped_sum(
            model.model, rows().take(of), USERS[of], clip, objective=model.objective, method=method
        ).total.double()  # fmt: skip

    whole = total(np.arange(4))
    assert float((whole - total(np.arange(4), "reference")).norm()) <= 1e-5 * float(whole.norm())
    for user in range(4):
        moved = whole - total(np.delete(np.arange(4), user))
        alone = total(np.array([user]), "reference")
        assert float((moved - alone).norm()) <= 1e-5 * clip.norm
    assert np.isfinite(evaluate(model.model, rows(), model.objective).loss)
    assert export(model, tmp_path / "export")


def test_what_a_row_adds_is_what_it_adds_alone_with_its_end_in_place(tmp_path: Path) -> None:
    model = loaded("BART", tmp_path)
    ended = TokenRows.from_lists([[7, 8, 9, END]], np.array([0]))
    plain = SequenceClassification()
    assert evaluate(model.model, ended, plain).loss == evaluate(model.model, ended, model.objective).loss
