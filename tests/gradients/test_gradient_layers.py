"""Each kind of layer alone, over shapes drawn at random."""

import pytest
import torch
from gradient_checks import TOLERANCE, Around, Tables, check
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.gradients.layers import rule_for

WIDTHS = st.integers(1, 24)
RAGGED = {"seed": st.integers(0, 10**6), "units": st.integers(1, 6), "longest": st.integers(2, 20)}


@settings(max_examples=12)
@given(width=WIDTHS, out=WIDTHS, bias=st.booleans(), **RAGGED)
def test_linear(width: int, out: int, bias: bool, seed: int, units: int, longest: int) -> None:
    layer = torch.nn.Linear(width, out, bias=bias)
    assert rule_for(layer)[0] == "linear"
    check_nonempty(Around(layer, width, out), seed, units, longest)


@settings(max_examples=8)
@given(width=WIDTHS, out=WIDTHS, **RAGGED)
def test_conv1d(width: int, out: int, seed: int, units: int, longest: int) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, width)
    torch.nn.init.normal_(layer.weight)
    assert rule_for(layer)[0] == "linear"
    check_nonempty(Around(layer, width, out), seed, units, longest)


@settings(max_examples=8)
@given(width=st.integers(2, 24), **RAGGED)
def test_layer_norm(width: int, seed: int, units: int, longest: int) -> None:
    layer = torch.nn.LayerNorm(width)
    torch.nn.init.normal_(layer.weight)
    assert rule_for(layer)[0] == "normalisation"
    check_nonempty(Around(layer, width), seed, units, longest)


def test_rms_norms_of_torch_and_transformers() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for layer in (torch.nn.RMSNorm(9), LlamaRMSNorm(9), GemmaRMSNorm(9)):
        torch.nn.init.normal_(layer.weight)
        assert rule_for(layer)[0] == "normalisation"
        # Gemma's layer computes in float32 whatever it is given, so no more than float32 can agree.
        check(Around(layer, 9), dtypes=[torch.float32] if type(layer) is GemmaRMSNorm else [*TOLERANCE])


@settings(max_examples=16)
@given(width=WIDTHS, tied=st.booleans(), padding_idx=st.sampled_from([None, 0, 3]), **RAGGED)
def test_embeddings(width, tied, padding_idx, seed, units, longest) -> None:
    torch.manual_seed(seed)
    check_nonempty(Tables(width, tied, padding_idx), seed, units, longest)


class Affine(torch.nn.Module):
    """A layer that no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width))
        self.mix = torch.nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * self.scale) @ self.mix


def test_unknown_layers_are_recomputed_unit_by_unit() -> None:
    torch.manual_seed(0)
    layer = Affine(6)
    assert rule_for(layer)[0] == "generic (Affine)"
    check(Around(layer, 6))
    check(Around(torch.nn.Sequential(Affine(6), torch.nn.Linear(6, 6), Affine(6)), 6))


def test_a_layer_called_twice_counts_both_calls() -> None:
    class Twice(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    for layer in (torch.nn.Linear(40, 40), torch.nn.LayerNorm(5), Affine(5)):
        width = 40 if isinstance(layer, torch.nn.Linear) else 5
        check(Around(Twice(layer), width), longest=6, most=2)


def test_only_some_parameters_of_a_layer_train() -> None:
    layer = torch.nn.Linear(7, 7)
    layer.weight.requires_grad_(False)
    check(Around(layer, 7))


@pytest.mark.parametrize("width", [3, 200])
def test_layers_that_see_tokens_without_a_row_axis(width: int) -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.reshape(-1, width)).view(x.shape)

    check(Around(Flat(), width))


def check_nonempty(model: torch.nn.Module, seed: int, units: int, longest: int) -> None:
    """The generic checker with at least one label that is scored."""
    check(model, seed=seed, units=units + 2, longest=max(4, longest))
