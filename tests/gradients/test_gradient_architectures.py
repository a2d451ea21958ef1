"""Every architecture that the fast path promises, against plain autograd."""

from pathlib import Path

import pytest
import torch
from gradient_checks import TOLERANCE, architectures, assert_same, check, fast_sum, ragged

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum

ARCHITECTURES = {name: (model.eval(), objective) for name, model, objective in architectures()}
STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "model_stories260k"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fast_equals_reference(name: str) -> None:
    check(*ARCHITECTURES[name])


@pytest.mark.parametrize("max_tokens", [1, 20, 50, 90])
def test_any_split_into_micro_batches_gives_the_same(max_tokens: int) -> None:
    for name in ("gpt2, tied", "bert classifier"):
        check(*ARCHITECTURES[name], max_tokens=max_tokens)


@pytest.mark.parametrize(("longest", "most"), [(2, 1), (14, 1), (5, 12)])
def test_units_of_one_row_and_of_many(longest: int, most: int) -> None:
    check(*ARCHITECTURES["gpt2, tied"], seed=1, longest=longest, most=most)


def test_lora_adapters_on_a_frozen_base() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=16, bos_token_id=1, eos_token_id=1)
    adapted = get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.3)
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if "lora" not in name)
    check(adapted)


@pytest.mark.skipif(not STORIES.exists(), reason="the real tiny Llama is not here")
def test_a_real_llama() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    rows, ids = ragged(longest=30)
    for dtype, tolerance in TOLERANCE.items():
        model = model.to(dtype)
        expected = clipped_sum(model, rows, ids, Clip(norm=1.0), objective=CausalLanguageModel(), method="reference")
        for max_tokens in (100, 10**6):
            found = fast_sum(model, rows, ids, Clip(norm=1.0), objective=CausalLanguageModel(), max_tokens=max_tokens)
            assert_same(found, expected, tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=16, bos_token_id=1, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    rows, ids = ragged()
    expected = clipped_sum(model, rows, ids, Clip(norm=1.0), objective=CausalLanguageModel(), method="reference")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(fast_sum(model, rows, ids, Clip(norm=1.0), objective=CausalLanguageModel()), expected, 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations(attention: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=61
    )
    config._attn_implementation = attention
    check(LlamaForCausalLM(config).eval())


def test_bf16_autocast_is_near_and_keeps_float32_sums() -> None:
    model, objective = ARCHITECTURES["gpt2, tied"]
    model = model.to(torch.float32)
    rows, ids = ragged()
    exact = clipped_sum(model, rows, ids, Clip(norm=1.0), objective=objective, method="reference")
    found = fast_sum(model, rows, ids, Clip(norm=1.0), objective=objective, autocast=torch.bfloat16)
    assert found.total.dtype == found.norms.dtype == torch.float32
    assert_same(found, exact, 0.05)
    again = clipped_sum(
        model, rows, ids, Clip(norm=1.0), objective=objective, method="reference", autocast=torch.bfloat16
    )
    assert_same(found, again, 0.03)
    assert float((found.total - exact.total).norm()) > 1e-4 * float(exact.total.norm())  # it did run in bf16
