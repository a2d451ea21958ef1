import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.export import ExportMismatch, export, probe_rows
from fedsim.models.load import load_model

FORMS = [
    {},
    {"lora_rank": 2},
    {"task": "sequence-classification", "num_labels": 5},
    {"task": "sequence-classification", "num_labels": 5, "lora_rank": 2},
]


def shaken(loaded):
    """Weights as after training: none at its initial value."""
    flat = loaded.layout.flatten(loaded.model)
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    loaded.layout.load(loaded.model, flat + 0.05 * noise)
    return loaded


def loss(loaded, model=None) -> float:
    return evaluate(model or loaded.model, probe_rows(loaded), loaded.objective).loss


@pytest.mark.parametrize("form", FORMS)
def test_the_default_model_goes_out_and_comes_back(load, form: dict, tmp_path: Path) -> None:
    loaded = shaken(load(**form))
    assert loss(loaded) != pytest.approx(loss(load(**form)), rel=1e-3)
    folder = export(loaded, tmp_path / "model")
    assert not list(folder.rglob("*.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(AutoTokenizer.from_pretrained(folder)) == len(loaded.tokenizer)
    if not form:
        assert loss(loaded, AutoModelForCausalLM.from_pretrained(folder)) == pytest.approx(loss(loaded), rel=1e-5)
    elif form == {"lora_rank": 2}:
        assert loss(loaded, AutoPeftModelForCausalLM.from_pretrained(folder)) == pytest.approx(loss(loaded), rel=1e-5)
    elif "lora_rank" not in form:
        read = AutoModelForSequenceClassification.from_pretrained(folder)
        assert loss(loaded, read) == pytest.approx(loss(loaded), rel=1e-5)


@pytest.mark.parametrize("form", [*FORMS, {"lora_rank": 2, "base_dtype": "bfloat16"}])
def test_a_real_llama_goes_out_and_comes_back(story_llama: str, form: dict, tmp_path: Path) -> None:
    loaded = shaken(load_model(ModelConfig(path=story_llama, **form)))
    folder = export(loaded, tmp_path / "model")
    if "lora_rank" in form:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == story_llama
        assert not (folder / "model.safetensors").exists()


def test_a_fine_tuned_export_can_be_fine_tuned_again(load, tmp_path: Path) -> None:
    loaded = shaken(load())
    again = load_model(ModelConfig(path=str(export(loaded, tmp_path / "model"))))
    assert loss(again) == pytest.approx(loss(loaded), rel=1e-5)


def test_an_export_that_differs_names_both_losses_and_leaves_the_old_one(load, tmp_path: Path, monkeypatch) -> None:
    loaded = load()
    folder = export(loaded, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    trained = loss(shaken(loaded))
    monkeypatch.setattr(loaded.model, "save_pretrained", lambda folder: load().model.save_pretrained(folder))
    with pytest.raises(ExportMismatch) as raised:
        export(loaded, tmp_path / "model")
    assert raised.value.trained == trained
    assert repr(raised.value.exported) in str(raised.value)
    assert repr(trained) in str(raised.value)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_newer_export_replaces_the_older(load, tmp_path: Path) -> None:
    folder = export(load(), tmp_path / "model")
    (folder / "left-over").write_text("")
    loaded = shaken(load())
    assert export(loaded, folder) == folder
    assert not (folder / "left-over").exists()
    assert loss(loaded, AutoModelForCausalLM.from_pretrained(folder)) == pytest.approx(loss(loaded), rel=1e-5)


def test_a_place_that_cannot_be_written_is_named(load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="output"):
        export(load(), tmp_path / "file" / "model")


def test_weights_that_are_not_numbers_are_not_exported(load, tmp_path: Path) -> None:
    loaded = load()
    loaded.layout.load(loaded.model, np.full(loaded.layout.size, np.nan, np.float32))
    with pytest.raises(ExportMismatch):
        export(loaded, tmp_path / "model")
