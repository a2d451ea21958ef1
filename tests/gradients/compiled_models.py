"""Models and rows for tests of the compiled pass."""

from typing import Any

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, ClippedSum, clipped_sum
from fedsim.gradients.compiled import graphs, trial
from fedsim.rows import TokenRows

VOCABULARY = 60


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
        )
    )  # fmt: skip


def llama(adapted: bool) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=VOCABULARY, max_position_embeddings=16, initializer_range=0.2,
        )
    )  # fmt: skip
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave half of the gradients zero
                torch.nn.init.normal_(parameter, std=0.1)
    return model  # type: ignore[no-any-return]


MODELS = {"GPT-2": gpt2, "Llama": lambda: llama(False), "adapted Llama": lambda: llama(True)}


class Small(torch.nn.Module):
    """Tokens, a layer, a normalisation and a head; quick to trace."""

    def __init__(self, middle: torch.nn.Module, width: int = 8) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(VOCABULARY, width)
        self.middle = middle
        self.normal = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, VOCABULARY)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.normal(self.middle(self.token(input_ids)).cumsum(1)))


def small(width: int = 8) -> torch.nn.Module:
    return Small(torch.nn.Linear(width, width), width).eval()


class Scaled(torch.nn.Module):
    """A layer of a kind that has no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.scale


def ragged(seed: int = 0) -> tuple[TokenRows, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, 9)
    lengths = rng.integers(3, 16, counts.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenRows(tokens=rng.integers(0, VOCABULARY, offsets[-1]), offsets=offsets), np.repeat(np.arange(9), counts)


def summed(model: torch.nn.Module, rows: TokenRows, ids: np.ndarray, clip: Clip, **options: Any) -> ClippedSum:
    return clipped_sum(model, rows, ids, clip, objective=CausalLanguageModel(), **{"max_tokens": 80} | options)


def passes_of(model: torch.nn.Module) -> list[graphs.CompiledPass | None]:
    return list(trial._compiled.get(model, {}).values())
