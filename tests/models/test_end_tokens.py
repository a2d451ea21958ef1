"""Classifiers that read their answer at the end token, of which transformers wants equally many in every row."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from benchmarks.models.families import CLASSES, CLASSIFIERS
from benchmarks.models.tiny import save_tiny
from fedsim.clip import Clip
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.gradients import SequenceClassification, clipped_sum
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.export import export
from fedsim.models.load import LoadedModel, load_model
from fedsim.resources import open_data
from fedsim.rows import IGNORED_LABEL, TokenRows

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


def prompted(prompts: list[list[int]], texts: list[list[int]]) -> TokenRows:
    rows = TokenRows.from_lists([a + b for a, b in zip(prompts, texts, strict=True)], np.zeros(len(texts), np.int64))
    labels = [np.r_[np.full(len(a), IGNORED_LABEL), np.array(b, int)] for a, b in zip(prompts, texts, strict=True)]
    return dataclasses.replace(rows, labels=np.concatenate(labels))


PARTS = st.lists(st.integers(END, 9), max_size=6)


@given(st.integers(1, 4), st.lists(st.tuples(PARTS, PARTS), min_size=1, max_size=5), st.booleans())
def test_every_row_has_equally_many_ends_whatever_its_text(ends: int, parts: list, told: bool) -> None:
    rows = prompted([a for a, _ in parts], [b for _, b in parts])
    rows = rows if told else dataclasses.replace(rows, labels=None)
    objective = SequenceClassification(end_token=END, ends=ends)
    batch = objective.collate(rows, np.arange(len(parts)), "cpu", PAD)
    assert ((batch.input_ids == END).sum(1) == ends).all()
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [len(a + b) for a, b in parts]
    for place, (a, b) in enumerate(parts):
        alone = objective.collate(rows, np.array([place]), "cpu", PAD)
        width = alone.input_ids.shape[1]
        assert torch.equal(batch.input_ids[place, :width], alone.input_ids[0])  # whoever is beside it
        assert (batch.input_ids[place, width:] == PAD).all()
        found, given = alone.input_ids[0, : len(a + b)].tolist(), a + b
        if given.count(END) == ends and given[-1] == END:
            assert found == given
        enough = given[:-1].count(END) >= ends - 1
        for token, before in zip(found[:-1], given[:-1], strict=True):
            assert token == before or (before == END and token == PAD) or not enough


def test_what_a_text_smuggles_in_goes_and_what_ends_its_prompt_stays() -> None:
    """The separators stand at the end of the prompt, as tokenizers put them."""
    rows = prompted([[7, END, 8, END, END], [7, END, END]], [[END, 9, END, END], [9, END]])
    batch = SequenceClassification(end_token=END, ends=3).collate(rows, np.arange(2), "cpu", PAD)
    assert batch.input_ids[0].tolist() == [7, PAD, 8, END, END, PAD, 9, PAD, END]
    assert batch.input_ids[1].tolist() == [7, END, END, 9, END, *[PAD] * 4]


@pytest.mark.parametrize("family", ["T5", "BART"])
@pytest.mark.parametrize("pair", [False, True])
def test_separators_of_pairs_reach_the_model(
    family: str, pair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file to what the model reads, with texts that spell the separator, from a prepared store too."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    model = loaded(family, tmp_path / "model")
    end = model.objective.end_token
    name = model.tokenizer.convert_ids_to_tokens(end)
    library = model.tokenizer.backend_tokenizer
    frames = {"T5": (f"$A {name}", f"$A {name} $B {name}"), "BART": (f"$A {name}", f"$A {name} {name} $B {name}")}
    single, double = frames[family]
    library.post_processor = TemplateProcessing(single=single, pair=double, special_tokens=[(name, end)])
    model.tokenizer.eos_token = name
    words = ["the fox", f"the {name} dog", name, "over it"]
    lines = [
        {"user_id": f"u{n}", "ask": words[n % 4], "text": words[n // 4 % 4] + " again and again", "label": n % CLASSES}
        for n in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(
        source="files",
        path=str(tmp_path / "pairs.jsonl"),
        label_column="label",
        prompt_column="ask" if pair else None,
        validation_fraction=0,
        test_fraction=0,
        minimum_tokens=2,
        sequence_length=32,
    )
    build_store(data, model.tokenizer, tmp_path / "store")
    wanted = 1 if not pair else 2 if family == "T5" else 3
    for source in (data, DataConfig(source="store", path=str(tmp_path / "store"))):
        resources = open_data(source, model)
        objective, taken = resources.loaded.objective, resources.store.take(np.arange(resources.store.num_rows))
        assert isinstance(objective, SequenceClassification)
        assert objective.ends == wanted
        batch = objective.collate(taken, np.arange(len(taken)), "cpu", PAD)
        assert ((batch.input_ids == end).sum(1) == wanted).all()
        for row, tokens in zip(batch.input_ids.tolist(), np.split(taken.tokens, taken.offsets[1:-1]), strict=True):
            assert row[: len(tokens)] == tokens.tolist()  # nothing was taken away
        assert np.isfinite(evaluate(model.model, taken, objective).loss)


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
