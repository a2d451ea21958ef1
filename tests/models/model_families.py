"""Tiny random models of many families, as transformers computes them: decoders, encoders, and some that mix rows."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import public_texts
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fedsim.models.tokenizer import train_tokenizer

VOCABULARY = 300
CLASSES = 5

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
_USUAL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = _USUAL | {"num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = _GROUPED | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
_OLDER = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}

DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": _OLDER,
    "gpt_neo": _USUAL
    | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": _USUAL,
    "gptj": _OLDER | {"rotary_dim": 4},
    "gpt_bigcode": _OLDER,
    "opt": _USUAL | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 4},
    "mixtral": _EXPERTS,
    "qwen2": _GROUPED,
    "qwen2_moe": _EXPERTS,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi": _USUAL,
    "phi3": _GROUPED,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
    "stablelm": _USUAL | {"num_key_value_heads": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 64},
    "recurrent_gemma": _GROUPED
    | {"lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    "olmo": _USUAL,
    "olmoe": _EXPERTS,
    "granite": _USUAL,
    "cohere": _USUAL,
    "starcoder2": _USUAL | {"num_key_value_heads": 1, "sliding_window": 4},
}
"""Read from left to right; experts (…moe, mixtral) route each token by itself."""

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _USUAL,
    "roberta": _USUAL,
    "xlm-roberta": _USUAL,
    "camembert": _USUAL,
    "electra": _USUAL | {"embedding_size": 16},
    "rembert": _USUAL | {"input_embedding_size": 16, "output_embedding_size": 16},
    "megatron-bert": _USUAL,
    "roformer": _USUAL,
    "data2vec-text": _USUAL,
    "big_bird": _USUAL | {"attention_type": "original_full"},
    "deberta": _USUAL,
    "deberta-v2": _USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "albert": _USUAL | {"embedding_size": 8},
    "mpnet": _USUAL,
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "modernbert": _USUAL
    | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    "longformer": _USUAL | {"attention_window": [4, 4]},
}
"""Read in both directions, and honour a mask."""

LANGUAGE_MODEL_HEADS = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "rembert", "megatron-bert", "roformer", "data2vec-text",
    "big_bird",
)  # fmt: skip
"""Encoders that transformers offers as language models."""

MIXERS: dict[str, dict[str, Any]] = {
    "fnet": _USUAL,
    "yoso": _USUAL | {"use_expectation": True},
    "convbert": _USUAL | {"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 5},
}
"""Encoders that let the padding in whatever the mask says: by a Fourier transform, by normalising, by convolutions."""


def tiny(family: str, task: str, **fields: Any) -> Any:
    """A tiny random model of a family, in evaluation mode; the same at every call.

    Weights are four times as large as drawn, so that every layer has a say in the outputs.
    """
    settings = _COMMON | (DECODERS | ENCODERS | MIXERS)[family] | fields
    if task == "sequence-classification":
        settings["num_labels"] = CLASSES
    config = AutoConfig.for_model(family, **settings)
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def saved(model: torch.nn.Module, folder: Path) -> str:
    """The folder, with the model and a tokenizer in it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


_tokenizers: list[PreTrainedTokenizerFast] = []


def tokenizer() -> PreTrainedTokenizerFast:
    """One for all, made once; its text ends, and is padded, with token 0."""
    if not _tokenizers:
        _tokenizers.append(train_tokenizer(public_texts(), VOCABULARY))
    return _tokenizers[0]
