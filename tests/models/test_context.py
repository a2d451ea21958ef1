"""How many tokens a model can read: so many and no more, whatever its configuration calls positions."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.models.families import CLASSES, CLASSIFIERS, DECODERS, POSITIONS
from benchmarks.models.tiny import save_tiny
from fedsim.config import RunConfig
from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.context import longest_row
from fedsim.models.evaluate import evaluate
from fedsim.models.load import LoadedModel, load_model
from fedsim.resources import open_resources
from fedsim.rows import TokenRows

TABLES = {
    "GPT-2": POSITIONS,
    "GPT-Neo": POSITIONS,
    "OPT": POSITIONS,  # of POSITIONS + 2 rows, of which two are never read
    "BioGPT": POSITIONS,
    "MPT": POSITIONS,  # of biases, under another name
    "BART, decoder": POSITIONS,
}
CLASSIFYING_TABLES = {
    "BERT": POSITIONS,
    "RoBERTa": POSITIONS - 2,  # positions begin behind the row of padding
    "XLM-R": POSITIONS - 2,
    "CamemBERT": POSITIONS - 2,
    "MPNet": POSITIONS - 2,
    "ESM": POSITIONS - 2,
    "Longformer": POSITIONS - 2,
    "DistilBERT": POSITIONS,
    "BART": POSITIONS,
}


def read(loaded: LoadedModel, tokens: int) -> float:
    row = np.random.default_rng(1).integers(6, 60, tokens).tolist()
    return evaluate(loaded.model, TokenRows.from_lists([row], np.array([0])), loaded.objective).loss


def loaded_classifier(model_type: str, fields: dict[str, Any], folder: Path) -> LoadedModel:
    path = save_tiny(model_type, fields, False, folder)
    return load_model(ModelConfig(path=path, task="sequence-classification", num_labels=CLASSES))


@pytest.mark.parametrize("family", TABLES)
def test_a_language_model_reads_its_context_and_not_one_token_more(family: str, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(path=save_tiny(*DECODERS[family], True, tmp_path)))
    assert loaded.context == TABLES[family]
    assert np.isfinite(read(loaded, loaded.context))
    with pytest.raises((RuntimeError, IndexError)):
        read(loaded, loaded.context + 1)


@pytest.mark.parametrize("family", CLASSIFYING_TABLES)
def test_a_classifier_reads_its_context_and_not_one_token_more(family: str, tmp_path: Path) -> None:
    loaded = loaded_classifier(*CLASSIFIERS[family], tmp_path)
    assert loaded.context == CLASSIFYING_TABLES[family]
    assert np.isfinite(read(loaded, loaded.context))
    with pytest.raises((RuntimeError, IndexError)):
        read(loaded, loaded.context + 1)


def test_a_decoder_with_fewer_positions_than_its_encoder_decides() -> None:
    model: Any = torch.nn.ModuleDict(
        {
            "encoder": torch.nn.ModuleDict({"embed_positions": torch.nn.Embedding(16, 2)}),
            "decoder": torch.nn.ModuleDict({"embed_positions": torch.nn.Embedding(9, 2)}),
        }
    )
    model.config = _Config()
    assert longest_row(model, _unlimited()) == 9


def test_positions_without_a_limit_are_none(tmp_path: Path) -> None:
    for family in ("BLOOM", "Mamba"):
        assert load_model(ModelConfig(path=save_tiny(*DECODERS[family], True, tmp_path / family))).context is None
    assert loaded_classifier(*CLASSIFIERS["T5"], tmp_path / "t5").context is None


def test_adapted_tables_are_tables_of_positions(tmp_path: Path) -> None:
    path = save_tiny(*DECODERS["GPT-2"], True, tmp_path)
    loaded = load_model(ModelConfig(path=path, lora_rank=2, lora_targets=("wpe", "c_attn")))
    loaded.model.config.n_positions = 10**6
    assert loaded.context == POSITIONS


def test_a_number_that_is_no_length_is_none() -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16))
    assert model.config.max_position_embeddings == -1
    assert longest_row(model, _unlimited()) is None


class Pictures(torch.nn.Module):
    """Has tables of places that are not a text's, of fewer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(3, 2)})
        self.x_position_embeddings = torch.nn.Embedding(3, 2)
        self.relative_position_embeddings = torch.nn.Embedding(3, 2)
        self.wpe = torch.nn.Embedding(9, 2)


def test_places_on_a_page_are_no_positions_in_a_text() -> None:
    model: Any = Pictures()
    model.config = _Config()
    assert longest_row(model, _unlimited()) == 9


def test_a_store_of_longer_rows_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"user": str(u), "text": "w7 w8 w9 " * 20, "kind": u % CLASSES}) + "\n" for u in range(4))
    )
    model = ModelConfig(path=save_tiny(*CLASSIFIERS["RoBERTa"], False, tmp_path / "model"), num_labels=CLASSES,
                        task="sequence-classification")  # fmt: skip
    columns = {"user_column": "user", "text_column": "text", "label_column": "kind"}
    long = DataConfig(source="files", path=str(texts), sequence_length=POSITIONS, **columns)
    with pytest.raises(InvalidInput, match=r"data\.sequence-length is 40; it must be at most the 38 tokens"):
        open_resources(RunConfig(model=model, data=long))
    store = build_store(long, load_model(model).tokenizer, tmp_path / "store")
    ready = DataConfig(source="store", path=str(store.path))
    with pytest.raises(InvalidInput, match=r"data\.path.*at most the 38 tokens.*One has 40"):
        open_resources(RunConfig(model=model, data=ready))
    short = DataConfig(source="files", path=str(texts), sequence_length=POSITIONS - 2, **columns)
    store = build_store(short, load_model(model).tokenizer, tmp_path / "shorter")
    assert open_resources(RunConfig(model=model, data=DataConfig(source="store", path=str(store.path))))


class _Config:
    max_position_embeddings = None

    def get_text_config(self) -> "_Config":
        return self


def _unlimited() -> Any:
    return SimpleNamespace(model_max_length=int(1e30))
