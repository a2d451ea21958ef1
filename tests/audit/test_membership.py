"""The attack on a finished run's users: on the model that was trained, and the base it was trained on."""

from pathlib import Path
from types import SimpleNamespace

import torch

from experiments.audit import membership
from fedsim.config import RunConfig
from fedsim.models.config import ModelConfig


def adapted() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def test_adapters_are_attacked_on_the_base_they_were_trained_on(tmp_path: Path, monkeypatch) -> None:
    """Rounded as that was: the configuration that is opened is the run's own."""
    trained = adapted()
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(str(tmp_path))
    opened: list[ModelConfig] = []
    resources = SimpleNamespace(loaded=SimpleNamespace(model=adapted()))
    monkeypatch.setattr(membership, "open_resources", lambda config: (opened.append(config.model), resources)[1])
    config = RunConfig(model=ModelConfig(path="a/base", lora_rank=2, base_dtype="bfloat16"))
    found = membership._fine_tuned(config, SimpleNamespace(model=tmp_path, path=tmp_path))
    assert opened == [config.model]
    for (name, own), (_, expected) in zip(found.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(own, expected), name
