"""Models whose rows are packed, and some that leak from row to row."""

from collections.abc import Callable

import torch
from gradient_checks import VOCABULARY


def llama(**settings: object) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.3, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mistral() -> torch.nn.Module:
    """Each token sees five."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def gemma2() -> torch.nn.Module:
    """Capped scores and logits, windows in every second layer, tables that scale."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=VOCABULARY, sliding_window=5, attn_logit_softcapping=0.5,
        final_logit_softcapping=3.0, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def gemma3() -> torch.nn.Module:
    """Normalises queries and keys when heads come before tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=VOCABULARY, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=1, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def adapted() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


class Leaky(torch.nn.Module):
    """A decoder between whose layers something moves from token to token, whatever the rows."""

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.move = gpt2(), move
        self.config = self.inner.config
        self.inner.transformer.h[0].register_forward_hook(lambda _, inputs, output: output + self.move(output))
        self.eval()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        return self.inner(input_ids, **arguments).logits


def fading(x: torch.Tensor) -> torch.Tensor:
    """A state that is left to a hundredth by every token."""
    state, found = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        found.append(state)
        state = 0.01 * (state + x[:, t])
    return torch.stack(found, 1)


def earlier(by: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.nn.functional.pad(x, (0, 0, by, 0))[:, : x.shape[1]]


def of_the_block_before(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What each token of a block of so many sees is the last of the one before: nothing in short micro-batches."""

    def move(x: torch.Tensor) -> torch.Tensor:
        block = torch.arange(x.shape[1]) // size
        return torch.where((block > 0)[:, None], x[:, (block * size - 1).clamp(min=0)], 0.0)

    return move


LEAKS = {
    "the token before": earlier(1),
    "a ten thousandth of it": lambda x: 1e-4 * earlier(1)(x),
    "a millionth of it": lambda x: 1e-6 * earlier(1)(x),
    "a state that fades": fading,
    "twenty tokens before": earlier(20),
    "the first token of all": lambda x: 0.1 * x[:, :1].expand_as(x),
    "the block before": of_the_block_before(64),
    "whether 180 tokens came before": lambda x: (torch.arange(x.shape[1]) > 180)[:, None] * torch.eye(x.shape[2])[3],
    "the count of tokens": lambda x: torch.sin(torch.arange(x.shape[1])[:, None] * torch.arange(x.shape[2]))[None],
}
