"""The compiled pass: the sum of the ordinary one, or none at all."""

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, ClippedSum, clipped_sum
from fedsim.gradients.compiled import graphs, trial
from fedsim.gradients.model import ParameterLayout
from fedsim.rows import TokenRows

VOCABULARY = 60


@pytest.fixture(autouse=True)
def _traced_and_not_compiled_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they are traced, run by torch: what a compiler of kernels would add takes a minute."""
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    torch._dynamo.reset()


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

    def __init__(self, middle: torch.nn.Module) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(VOCABULARY, 8)
        self.middle = middle
        self.normal = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.normal(self.middle(self.token(input_ids)).cumsum(1)))


def small() -> torch.nn.Module:
    return Small(torch.nn.Linear(8, 8)).eval()


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
    return clipped_sum(model, rows, ids, clip, objective=CausalLanguageModel(), max_tokens=80, **options)


def passes_of(model: torch.nn.Module) -> list[graphs.CompiledPass | None]:
    return list(trial._compiled.get(model, {}).values())


@pytest.mark.parametrize(("family", "half"), [("GPT-2", False), ("adapted Llama", True)])
def test_the_sum_is_that_of_the_ordinary_pass(family: str, half: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    autocast = torch.bfloat16 if half else None
    clip = Clip(norm=float(summed(model, *ragged(), Clip(norm=1.0), autocast=autocast).norms.median()))
    for seed in range(2):  # other shapes, too
        rows, ids = ragged(seed)
        expected = summed(model, rows, ids, clip, autocast=autocast, compiled=False)
        found = summed(model, rows, ids, clip, autocast=autocast, compiled=True)
        made = passes_of(model)[-1]
        assert made is not None
        tolerance = 5e-3 if half else 1e-5
        torch.testing.assert_close(found.norms, expected.norms, rtol=tolerance, atol=0)
        torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
        layout, whole = ParameterLayout.of(model), float(expected.total.norm())
        for ours, theirs in zip(
            layout.views(found.total).values(), layout.views(expected.total).values(), strict=True
        ):
            assert float((ours - theirs).norm()) <= tolerance * whole
    assert len(passes_of(model)) == 1


def test_the_callers_model_is_as_it_was_and_the_pass_follows_its_parameters() -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert passes_of(model)[0] is not None
    assert not any(module._forward_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    pickle.dumps(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = summed(copy.deepcopy(model), rows, ids, Clip(norm=1.0), compiled=False)
    found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)


def test_parameters_that_are_frozen_later_need_another_pass() -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    model.middle.requires_grad_(False)  # type: ignore[operator]
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert len(passes_of(model)) == 2
    torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-6)


def test_a_pass_whose_gradients_are_off_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    record = graphs.CompiledPass.record

    def off(self: Any, tape: Any, inputs: Any, gradients: Any) -> None:
        record(self, tape, inputs, (gradients[0], 1.2 * gradients[1], *gradients[2:]))

    monkeypatch.setattr(graphs.CompiledPass, "record", off)
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    with caplog.at_level(logging.WARNING):
        found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert passes_of(model) == [None]
    assert "is not compiled" in caplog.text
    assert torch.equal(found.total, expected.total)


def test_a_pass_that_fails_later_is_done_again_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = small()
    rows, ids = ragged()
    summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    calls = []
    hidden = graphs.CompiledPass.hidden

    def failing(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > 1:
            raise RuntimeError("no more graphs")
        return hidden(self, batch)

    monkeypatch.setattr(graphs.CompiledPass, "hidden", failing)
    with caplog.at_level(logging.WARNING):
        found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
        again = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert len(calls) == 2
    assert "goes on without a compiled pass: RuntimeError: no more graphs" in caplog.text
    assert torch.equal(found.total, expected.total)
    assert torch.equal(again.total, expected.total)


def test_a_model_with_a_layer_that_has_no_rule_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Small(Scaled()).eval()
    rows, ids = ragged()
    expected = summed(model, rows, ids, Clip(norm=1.0), compiled=False)
    with caplog.at_level(logging.WARNING):
        found = summed(model, rows, ids, Clip(norm=1.0), compiled=True)
    assert "middle is generic (Scaled), which a compiled pass does not hold" in caplog.text
    assert torch.equal(found.total, expected.total)


def test_without_a_gpu_nothing_is_compiled_unasked() -> None:
    torch.manual_seed(0)
    model = small()
    summed(model, *ragged(), Clip(norm=1.0))
    assert passes_of(model) == []
