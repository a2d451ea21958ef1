"""Sums on a device that is not the host's have the values of the host's, and no part of them is left on the host."""

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, Around, Tables, architectures, ragged
from torch.overrides import TorchFunctionMode

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients import (
    CausalLanguageModel,
    ClippedSum,
    LocalSteps,
    ParameterLayout,
    SequenceClassification,
    clipped_sum,
    clipped_units,
    layer_paths,
)
from fedsim.gradients import model as engine_model
from fedsim.gradients.model import exact_products, model_device
from fedsim.rows import TokenRows

LANGUAGE = CausalLanguageModel()


def uniform(units: int = 4, rows: int = 2, length: int = 12) -> tuple[TokenRows, np.ndarray]:
    """Rows of one length, equally many for each unit."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, units * rows * length)
    offsets = np.arange(units * rows + 1) * length
    return TokenRows(tokens=tokens, offsets=offsets), np.repeat(np.arange(units), rows)


def blocks_of(model: torch.nn.Module, norm: float = 0.5) -> Clip:
    """A clip of two blocks, of which one is scaled."""
    names = ParameterLayout.of(model).names
    half, share = len(names) // 2, 0.5**0.5
    parts = (names[:half], names[half:])
    return Clip(
        norm=norm,
        scales={name: 0.5 if name in parts[0] else 1.0 for name in names},
        blocks=tuple(ClipBlock(parameters=part, share=share) for part in parts),
    )


def scaled(model: torch.nn.Module) -> Clip:
    names = ParameterLayout.of(model).names
    return Clip(norm=0.5, scales=dict(zip(names, np.linspace(0.5, 2.0, len(names)).tolist(), strict=True)))


def compare(found: ClippedSum, expected: ClippedSum, device: torch.device, tolerance: float = 1e-5) -> None:
    """Everything of a sum lies on the device, and has the host's values."""
    for name in ("total", "norms", "losses", "finite"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.device == device, name
        if name == "finite":
            assert torch.equal(one.cpu(), other)
            continue
        one, other = (x if name == "total" else x[expected.finite] for x in (one.cpu(), other))
        assert float((one - other).norm()) <= tolerance * float(other.norm()), name


def check(
    model: torch.nn.Module,
    rows: TokenRows,
    ids: np.ndarray,
    clip: Clip,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
    tolerance: float = 1e-5,
    training: bool = False,
    **how: Any,
) -> ClippedSum:
    """The sum on the device is the host's, and no other path was taken to it."""
    how = {"objective": LANGUAGE, **how}
    expected = clipped_sum(model.train(training), rows, ids, clip, **how)
    there = copy.deepcopy(model).to(device)
    with caplog.at_level(logging.WARNING):
        found = clipped_sum(there, rows, ids, clip, **how)
    refused = [record.getMessage() for record in caplog.records if "reference path" in record.getMessage()]
    assert not refused, refused
    compare(found, expected, device, tolerance)
    assert model_device(there) == device
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[torch.nn.Module, Any]]:
    return {name: (model.eval(), objective) for name, model, objective in architectures()}


@pytest.mark.parametrize(
    "name", ["gpt2, tied", "gpt2 classifier", "llama", "llama, tied", "qwen3", "bert classifier", "mlp"]
)
def test_models_of_every_shape(
    name: str, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model, objective = models[name]
    check(model, *ragged(), Clip(norm=0.5), device, caplog, objective=objective)


@pytest.mark.parametrize("max_tokens", [None, 12])
def test_rows_of_one_length_and_units_of_several_micro_batches(
    max_tokens: int | None, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    check(models["llama"][0], *uniform(), Clip(norm=0.5), device, caplog, max_tokens=max_tokens)
    check(models["gpt2, tied"][0], *ragged(3), Clip(norm=0.5), device, caplog, max_tokens=max_tokens)


@pytest.mark.parametrize("weighting", ["examples", "tokens"])
def test_blocks_scales_and_weights(
    weighting: str, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model, (rows, ids) = models["llama, tied"][0], ragged(1)
    weights = np.random.default_rng(0).random(len(rows))
    for clip in (blocks_of(model), scaled(model)):
        check(model, rows, ids, clip, device, caplog, weighting=weighting, weights=weights)


def test_adapters_on_a_frozen_base(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, get_peft_model

    base = next(model for name, model, _ in architectures() if name == "llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            parameter.data.normal_(generator=generator)
    check(model, *ragged(), Clip(norm=0.5), device, caplog)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_are_looked_up_once_for_all_rows(
    tied: bool, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Held and gathered: few words, and more than a unit has tokens."""
    torch.manual_seed(0)
    model = Tables(12, tied, None)
    for rows, ids in (ragged(2), ragged(2, longest=5, most=2)):
        check(model, rows, ids, Clip(norm=0.5), device, caplog)
    assert set(layer_paths(model)) == set(ParameterLayout.of(model).names)


def test_a_wide_layer_whose_norms_come_from_gram_matrices(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(VOCABULARY, 64)
    model = torch.nn.Sequential(table, torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, VOCABULARY))
    for clip in (Clip(norm=0.5), blocks_of(model), scaled(model)):
        check(model, *ragged(4, most=2), clip, device, caplog)
    paths = " ".join(layer_paths(model).values())
    assert "Gram norm" in paths
    assert "gathered" in paths


@pytest.mark.parametrize("capped", [True, False])
def test_attention_to_the_last_few_tokens(
    capped: bool, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """With scores and logits that are capped, so that the ordinary loss is taken, and with torch's own attention."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "vocab_size": VOCABULARY, "sliding_window": 5, "initializer_range": 0.3,
    }  # fmt: skip
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **caps)) if capped else MistralForCausalLM(MistralConfig(**sizes))
    check(model, *ragged(units=4, most=2), Clip(norm=0.5), device, caplog)


class Affine(torch.nn.Module):
    """A layer that no rule knows, called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * self.scale)


class Twice(torch.nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(super().forward(x)))


class ScaledEmbedding(torch.nn.Embedding):
    """A table whose rows are scaled as they are looked up."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__(words, width)
        self.register_buffer("times", torch.tensor(width**0.5), persistent=False)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return super().forward(index) * self.times


def test_layers_without_a_rule_and_layers_called_twice(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layer = Twice(Affine(6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6))
    check(Around(layer, 6), *ragged(most=2), Clip(norm=0.5), device, caplog)
    table = ScaledEmbedding(VOCABULARY, 12)
    model = torch.nn.Sequential(table, torch.nn.Tanh(), torch.nn.Linear(12, VOCABULARY))
    check(model, *ragged(most=2), Clip(norm=0.5), device, caplog)


def test_activation_checkpoints(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = next(model for name, model, _ in architectures() if name == "llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, *ragged(most=2), Clip(norm=0.5), device, caplog, training=True)


@pytest.mark.parametrize("method", ["fast", "reference"])
def test_mixed_precision(
    method: str, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """The host's and a device's bfloat16 round in other places."""
    how = {"autocast": torch.bfloat16, "method": method, "tolerance": 3e-2}
    check(models["llama"][0], *ragged(units=4, most=2), Clip(norm=0.5), device, caplog, **how)
    check(models["gpt2, tied"][0], *ragged(units=4, most=2), blocks_of(models["gpt2, tied"][0]), device, caplog, **how)


def test_a_base_in_half_precision(
    models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(models["llama"][0]).to(torch.bfloat16)
    check(model, *ragged(), Clip(norm=0.5), device, caplog, 3e-2)


class Poisoned(torch.nn.Module):
    """Rows with the token 7 are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layer = Tables(12, True, None), torch.nn.Linear(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        bad = (input_ids == 7).any(1)[:, None, None]
        return self.layer(torch.where(bad, torch.nan, 1.0) * self.inner(input_ids))


@pytest.mark.parametrize("method", ["fast", "reference"])
def test_a_unit_that_is_not_finite(method: str, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """It adds zero. Alone in its micro-batch, too."""
    torch.manual_seed(0)
    model = Poisoned()
    rows, ids = uniform()
    rows.tokens[rows.tokens == 7] = 8
    rows.tokens[12 * 7 + 3] = 7
    for max_tokens in (None, 12):
        found = check(model, rows, ids, blocks_of(model), device, caplog, method=method, max_tokens=max_tokens)
        assert found.finite.tolist() == [True, True, True, False]


def test_a_unit_that_is_computed_again_because_its_norm_is_unsure(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """A tied embedding that undoes what the head does: its norm is what rounding leaves of two long vectors."""
    torch.manual_seed(0)
    model = Tables(12, True, None)
    tokens = np.full(4 * 12, 5)
    tokens[:12] = np.arange(1, 13)
    rows = TokenRows(tokens=tokens, offsets=np.arange(5) * 12)
    check(model, rows, np.arange(4), Clip(norm=0.5), device, caplog)


@pytest.mark.parametrize("steps", [None, LocalSteps(steps=2, learning_rate=0.5)])
def test_the_reference_and_local_steps(
    steps: LocalSteps | None, models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model, (rows, ids) = models["gpt2, tied"][0], ragged(units=3)
    how = {"method": "reference", "local_steps": steps, "max_tokens": 40}
    check(model, rows, ids, blocks_of(model), device, caplog, **how)
    classifier, objective = models["bert classifier"]
    check(classifier, rows, ids, Clip(norm=0.5), device, caplog, objective=objective, **how)


def test_sums_clipped_in_another_norm(
    models: dict[str, Any], device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    check(models["mlp"][0], *ragged(), Clip(norm=0.5, order=1), device, caplog, objective=SequenceClassification())


def test_units_one_by_one(models: dict[str, Any], device: torch.device) -> None:
    model, (rows, ids) = models["llama"][0], ragged(units=3)
    there = copy.deepcopy(model).to(device)
    one_by_one = zip(
        *(clipped_units(m, rows, ids, blocks_of(m), objective=LANGUAGE) for m in (there, model)), strict=True
    )
    for (unit, update, norm, loss), expected in one_by_one:
        assert (unit, update.device) == (expected[0], device)
        torch.testing.assert_close(update.cpu(), expected[1], rtol=1e-4, atol=1e-6)
        assert (norm, loss) == pytest.approx((expected[2], expected[3]), rel=1e-5)


def test_a_layout_moves_vectors_to_and_from_a_device(models: dict[str, Any], device: torch.device) -> None:
    """From the host's arrays and tensors, and the device's own."""
    model = copy.deepcopy(models["gpt2, tied"][0])
    layout, flat = ParameterLayout.of(model), ParameterLayout.of(model).flatten(model)
    there = copy.deepcopy(model).to(device)
    assert ParameterLayout.of(there) == layout
    for vector in (2 * flat.numpy(), 3 * flat, (4 * flat).to(device)):
        layout.load(there, vector)
        found = layout.flatten(there)
        assert found.device == device
        expected = vector if isinstance(vector, np.ndarray) else vector.cpu().numpy()
        np.testing.assert_array_equal(found.cpu().numpy(), expected)
        layout.load(model, found)
        np.testing.assert_array_equal(layout.flatten(model).numpy(), expected)
        assert all(view.device == device for view in layout.views(found).values())


class Products(TorchFunctionMode):
    """Notes where matrix products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[torch.device] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.devices.append(args[0].device)
        return func(*args, **(kwargs or {}))


def test_products_are_tried_where_they_are_computed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_model, "_tried", set())
    with Products() as products, exact_products(device):
        assert engine_model._tried == {device.type}
    assert products.devices == [device]


def test_classes_and_rows_are_brought_to_the_device(device: torch.device) -> None:
    rows, _ = ragged()
    indices = np.arange(3)
    for objective in (LANGUAGE, SequenceClassification()):
        found, expected = (objective.collate(rows, indices, place) for place in (device, "cpu"))
        for name in ("input_ids", "attention_mask", "labels"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            if one is not None:
                assert one.device == device
                assert torch.equal(one.cpu(), other)
