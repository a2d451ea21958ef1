"""The shapes of tiny models, by family: what transformers' configuration classes are called with."""

from typing import Any

VOCABULARY = 64
CLASSES = 3
POSITIONS = 40

COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GROUPED = USUAL | {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = GROUPED | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
OLDER = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
SEQUENCES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": POSITIONS,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
LATENT = USUAL | {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", OLDER),
    "OpenAI GPT": ("openai-gpt", OLDER),
    "GPT-Neo": (
        "gpt_neo",
        USUAL | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "GPT-NeoX, Pythia": ("gpt_neox", USUAL),
    "GPT-J": ("gptj", OLDER | {"rotary_dim": 4}),
    "CodeGen": ("codegen", OLDER | {"n_head": 4, "rotary_dim": 4}),
    "GPT-BigCode": ("gpt_bigcode", OLDER),
    "OPT": ("opt", USUAL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BLOOM": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "MPT": ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": POSITIONS}),
    "Falcon": ("falcon", USUAL),
    "Falcon, ALiBi": ("falcon", USUAL | {"alibi": True, "parallel_attn": False}),
    "Llama": ("llama", GROUPED),
    "Llama, tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "Llama 4": ("llama4_text", EXPERTS | {"intermediate_size_mlp": 24, "attention_chunk_size": 16}),
    "Mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen2-MoE": ("qwen2_moe", EXPERTS),
    "Qwen3": ("qwen3", GROUPED),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Gemma": ("gemma", GROUPED),
    "Gemma 2": ("gemma2", GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("gemma3_text", GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "Phi": ("phi", USUAL),
    "Phi-3": ("phi3", GROUPED),
    "PhiMoE": ("phimoe", EXPERTS),
    "StableLM": ("stablelm", USUAL | {"num_key_value_heads": 2}),
    "OLMo": ("olmo", USUAL),
    "OLMo 2": ("olmo2", USUAL),
    "OLMoE": ("olmoe", EXPERTS),
    "DeepSeek-V2": ("deepseek_v2", LATENT | {"topk_method": "greedy"}),
    "DeepSeek-V3": ("deepseek_v3", LATENT),
    "GPT-OSS": ("gpt_oss", EXPERTS | {"sliding_window": 4}),
    "Granite": ("granite", USUAL),
    "GraniteMoE": ("granitemoe", EXPERTS),
    "Cohere": ("cohere", USUAL),
    "SmolLM3": ("smollm3", USUAL | {"num_key_value_heads": 1}),
    "StarCoder2": ("starcoder2", USUAL | {"num_key_value_heads": 1, "sliding_window": 4}),
    "GLM-4": ("glm4", GROUPED),
    "EXAONE 4": ("exaone4", GROUPED | {"sliding_window": 4, "sliding_window_pattern": 2}),
    "Nemotron": ("nemotron", GROUPED),
    "Seed-OSS": ("seed_oss", GROUPED),
    "BioGPT": ("biogpt", USUAL),
    "XGLM": ("xglm", {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24}
             | {"max_position_embeddings": POSITIONS}),
    "BART, decoder": ("bart", SEQUENCES | {"is_decoder": True, "is_encoder_decoder": False}),
    "ModernBERT decoder": ("modernbert-decoder", USUAL | {"local_attention": 4, "cls_token_id": 3, "sep_token_id": 2}),
    "BERT, decoder": ("bert", USUAL | {"is_decoder": True}),
    "Mamba": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "RWKV": ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 40}),
    "RecurrentGemma": (
        "recurrent_gemma",
        GROUPED | {"lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    ),
    "BERT": ("bert", USUAL),
    "XLNet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
}  # fmt: skip
"""Offered by transformers as language models."""

CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", USUAL),
    "RoBERTa": ("roberta", USUAL | {"pad_token_id": 1, "bos_token_id": 0}),
    "XLM-R": ("xlm-roberta", USUAL | {"pad_token_id": 1, "bos_token_id": 0}),
    "CamemBERT": ("camembert", USUAL | {"pad_token_id": 1, "bos_token_id": 0}),
    "ALBERT": ("albert", USUAL | {"embedding_size": 8}),
    "DeBERTa": ("deberta", USUAL),
    "DeBERTa-v2, v3": (
        "deberta-v2",
        USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "DistilBERT": ("distilbert", {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2,
                                  "max_position_embeddings": POSITIONS}),
    "ELECTRA": ("electra", USUAL | {"embedding_size": 16}),
    "MPNet": ("mpnet", USUAL | {"pad_token_id": 1, "bos_token_id": 0}),
    "ModernBERT": ("modernbert", USUAL | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 3,
                                          "sep_token_id": 2}),
    "ESM": ("esm", USUAL | {"position_embedding_type": "absolute", "pad_token_id": 1, "bos_token_id": 0,
                            "mask_token_id": 5}),
    "Longformer": ("longformer", USUAL | {"attention_window": [4, 4], "pad_token_id": 1, "bos_token_id": 0}),
    "BigBird": ("big_bird", USUAL | {"attention_type": "original_full", "sep_token_id": 2}),
    "XLNet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    "FNet": ("fnet", USUAL),
    "T5": ("t5", T5 | {"eos_token_id": 2}),
    "UMT5": ("umt5", T5 | {"eos_token_id": 2}),
    "BART": ("bart", SEQUENCES | {"pad_token_id": 1, "bos_token_id": 0}),
    "mBART": ("mbart", SEQUENCES | {"pad_token_id": 1, "bos_token_id": 0}),
    "GPT-2": ("gpt2", OLDER),
    "OPT": ("opt", USUAL | {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1, "bos_token_id": 0}),
    "BLOOM": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Llama": ("llama", GROUPED),
    "Qwen3": ("qwen3", GROUPED),
    "Gemma 3": ("gemma3_text", GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "Mixtral": ("mixtral", EXPERTS),
}  # fmt: skip
"""Offered as classifiers."""
