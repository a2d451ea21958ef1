"""Models of the gradient benchmark: built from their configuration, with random weights, so nothing is fetched."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model shape, and the batch that is measured on it by default.

    Attributes:
        kind: "gpt2" or "gemma3", all of whose parameters train, or "llama-lora", whose adapters do.
        width, layers, heads, vocabulary: The model's shape.
        length: Tokens a row.
        users: Users of the ULS cases; the ELS case has four times as many examples.
        key_value_heads, intermediate, rank: Of a Gemma or a Llama, and of its adapters.
        base: Dtype of the frozen parameters.
    """

    kind: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    users: int = 64
    key_value_heads: int = 4
    intermediate: int = 0
    rank: int = 16
    base: torch.dtype = torch.float32


SIZES = {
    "tiny": Size(kind="gpt2", width=128, layers=4, heads=4, vocabulary=4096, length=64),
    "124m": Size(kind="gpt2", width=768, layers=12, heads=12, vocabulary=50257, length=128),
    "350m": Size(kind="gpt2", width=1024, layers=24, heads=16, vocabulary=50257, length=128),
    "tiny-lora": Size(
        kind="llama-lora", width=64, layers=2, heads=4, vocabulary=512, length=32, intermediate=128, rank=4,
        base=torch.bfloat16,
    ),
    "gemma": Size(
        kind="gemma3", width=256, layers=4, heads=4, vocabulary=65536, length=64, users=8, key_value_heads=1,
        intermediate=512,
    ),
    "350m-128k": Size(kind="gpt2", width=1024, layers=24, heads=16, vocabulary=128256, length=128),
    "350m-long": Size(kind="gpt2", width=1024, layers=24, heads=16, vocabulary=50257, length=1024, users=8),
    "1.1b-lora": Size(
        kind="llama-lora", width=2048, layers=22, heads=32, vocabulary=32000, length=128, intermediate=5632
    ),
    "7b-lora": Size(
        kind="llama-lora", width=4096, layers=32, heads=32, vocabulary=32000, length=128, key_value_heads=32,
        intermediate=11008, base=torch.bfloat16,
    ),
}  # fmt: skip


def build(size: Size, device: torch.device, checkpointing: bool, linear_layers: bool = False) -> torch.nn.Module:
    """The model, without dropout; trainable parameters are float32.

    Args:
        checkpointing: Recompute activations in the backward pass (training mode, as Hugging Face wants for it).
        linear_layers: Replace Hugging Face's Conv1D by torch's Linear, which Opacus has fast rules for.
    """
    torch.manual_seed(0)
    with device:  # large models are made where they are used
        model = {"gpt2": _gpt2, "gemma3": _gemma3, "llama-lora": _llama_with_lora}[size.kind](size)
    if linear_layers:
        _replace_conv1d(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(checkpointing).to(device)


def _gpt2(size: Size) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        vocab_size=size.vocabulary,
        n_positions=size.length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def _gemma3(size: Size) -> torch.nn.Module:
    """Whose head reads the words' embeddings, which the model scales where it looks them up."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.width // size.heads,
        vocab_size=size.vocabulary,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config)


def _llama_with_lora(size: Size) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=size.base)
    adapted = get_peft_model(model, LoraConfig(r=size.rank, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave half of the gradients zero
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted


def _replace_conv1d(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Conv1D":
                linear = torch.nn.Linear(*child.weight.shape)
                with torch.no_grad():
                    linear.weight.copy_(child.weight.t())
                    linear.bias.copy_(child.bias)
                setattr(module, name, linear)
