"""Where adapters go by default, and what is trained in full beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from benchmarks.models.families import CLASSES, CLASSIFIERS, COMMON, DECODERS
from benchmarks.models.tiny import save_tiny, tokenizer
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.export import export
from fedsim.models.load import LoadedModel, load_model

CLASSIFYING: dict[str, Any] = {"task": "sequence-classification", "num_labels": CLASSES, "lora_rank": 2}


def body_of(family: str, folder: Path) -> str:
    """A model without a head, as encoders are published."""
    model_type, fields = CLASSIFIERS[family]
    settings = COMMON | fields
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(folder)
    special = {name: settings[f"{name}_id"] for name in ("pad_token", "bos_token", "eos_token")}
    tokenizer(**special).save_pretrained(folder)
    return str(folder)


def in_full(loaded: LoadedModel) -> set[str]:
    """Names of what is trained without adapters."""
    return {name.partition(".modules_to_save.")[0] for name in loaded.layout.names if "lora_" not in name}


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DistilBERT", "DeBERTa", "ModernBERT", "BART", "T5", "GPT-2"])
def test_what_a_checkpoint_lacks_is_trained_in_full_and_exported(family: str, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(path=body_of(family, tmp_path / "body"), **CLASSIFYING))
    trained = in_full(loaded)
    adapted = [name for name in loaded.layout.names if "lora_" in name]
    assert trained
    assert adapted
    assert not [name for name in adapted if any(name.startswith(one) for one in trained)]
    assert export(loaded, tmp_path / "export")  # read back over a base that draws other weights


def test_a_pooler_that_is_drawn_is_trained_and_one_that_is_there_is_not(tmp_path: Path) -> None:
    path = body_of("BERT", tmp_path)
    assert in_full(load_model(ModelConfig(path=path, **CLASSIFYING))) == {"base_model.model.classifier"}
    model_type, fields = CLASSIFIERS["BERT"]
    torch.manual_seed(0)
    shape = AutoConfig.for_model(model_type, **(COMMON | fields))
    AutoModel.from_config(shape, add_pooling_layer=False).save_pretrained(path)
    both = {"base_model.model.classifier", "base_model.model.bert.pooler.dense"}
    assert in_full(load_model(ModelConfig(path=path, **CLASSIFYING))) == both


@pytest.mark.parametrize("family", ["Llama 4", "PhiMoE", "Mixtral", "DeepSeek-V3", "Mamba"])
def test_routers_experts_and_what_peft_refuses_are_left_out(family: str, tmp_path: Path) -> None:
    path = save_tiny(*DECODERS[family], True, tmp_path)
    names = load_model(ModelConfig(path=path, lora_rank=2)).layout.names
    assert names
    assert not [name for name in names if ".experts." in name]
    left_out = ".out_proj." if family == "Mamba" else ".gate." if family in ("Mixtral", "DeepSeek-V3") else ".router."
    assert not [name for name in names if left_out in name]


def test_a_router_that_is_named_is_refused(tmp_path: Path) -> None:
    path = save_tiny(*DECODERS["Llama 4"], True, tmp_path)
    with pytest.raises(InvalidInput, match=r"model\.lora-targets.*router returns more than a product") as raised:
        load_model(ModelConfig(path=path, lora_rank=2, lora_targets=("router",)))
    assert "q_proj" in raised.value.allowed
    assert "router" not in raised.value.allowed
