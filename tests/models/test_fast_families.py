"""Families whose layers need a rule of their own are wholly on the fast path, and off it once they mix rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from model_families import DECODERS, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, ClippedSum, clipped_sum, gradient_paths
from fedsim.rows import TokenRows

_USUAL = DECODERS["gpt_neox"]
_GROUPED = DECODERS["llama"]
_EXPERTS = DECODERS["mixtral"]
_LATENT = _USUAL | {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": DECODERS["opt"],
    "bart": {
        "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
        "max_position_embeddings": 64,
    },
    "biogpt": _USUAL,
    "falcon": DECODERS["falcon"],
    "ctrl": {"n_embd": 16, "n_head": 2, "n_layer": 2, "dff": 24, "n_positions": 64},
    "cohere": DECODERS["cohere"],
    "cohere (heads)": DECODERS["cohere"] | {"use_qk_norm": True},
    "nemotron": _GROUPED,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "phimoe": _EXPERTS,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe": _LATENT,
}  # fmt: skip
LENGTHS = ((9, 3, 1), (14,), (2, 2, 6), (12, 11), (10, 8), (13, 20, 5))


def model_of(family: str, **fields: Any) -> torch.nn.Module:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(family.partition(" ")[0], **(common | FAMILIES[family] | fields))
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # so that every layer has a say, biases and routers too
            parameter.copy_(parameter * 4 if parameter.ndim > 1 else parameter + 0.1 * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def sums(model: torch.nn.Module) -> tuple[ClippedSum, ClippedSum]:
    rng = np.random.default_rng(0)
    rows = TokenRows.from_lists([rng.integers(1, VOCABULARY, n).tolist() for unit in LENGTHS for n in unit])
    ids = np.repeat(np.arange(len(LENGTHS)), [len(unit) for unit in LENGTHS])
    common: dict[str, Any] = {"objective": CausalLanguageModel(), "max_tokens": 160}
    expected = clipped_sum(model, rows, ids, Clip(norm=1e6), method="reference", **common)
    clip = Clip(norm=float(expected.norms.median()))
    expected = clipped_sum(model, rows, ids, clip, method="reference", **common)
    return clipped_sum(model, rows, ids, clip, **common), expected


def assert_same(found: ClippedSum, expected: ClippedSum, tolerance: float) -> None:
    assert float((found.total - expected.total).norm()) <= tolerance * float(expected.total.norm())
    torch.testing.assert_close(found.norms, expected.norms, rtol=tolerance, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_wholly_fast(family: str) -> None:
    model = model_of(family)
    assert_same(*sums(model), 1e-5)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.wholly_fast, paths.in_words()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_are_fast_however_they_are_computed(family: str, implementation: str) -> None:
    model = model_of(family)
    model.config._experts_implementation = implementation
    assert_same(*sums(model), 1e-5)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.wholly_fast, paths.in_words()


@pytest.mark.parametrize("swap", ["biases, interleaved", "no gate"])
def test_experts_of_other_kinds(swap: str) -> None:
    """With biases and the matrices turned, as GPT-OSS has them, or without gates."""
    from transformers.integrations.moe import use_experts_implementation

    class Plain(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, torch.nn.functional.silu
            self.up_proj = torch.nn.Parameter(torch.randn(4, 8, 16) / 2)
            self.down_proj = torch.nn.Parameter(torch.randn(4, 16, 8) / 2)

        def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            inner = torch.einsum("eij,nj->nei", self.up_proj, x)
            out = torch.einsum("ehi,nei->neh", self.down_proj, self.act_fn(inner))
            return (out.gather(1, index[..., None].expand(-1, -1, 16)) * weights[..., None]).sum(1)

    torch.manual_seed(0)
    model = model_of("mixtral")
    if swap == "no gate":
        made: Any = use_experts_implementation(has_gate=False)(Plain)
        experts = [made(model.config) for _ in range(2)]
    else:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=4)
        config._experts_implementation = "grouped_mm"
        experts = [GptOssExperts(config) for _ in range(2)]
        for parameter in (p for layer in experts for p in layer.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
    for layer, own in zip(model.model.layers, experts, strict=True):
        layer.mlp.experts = own
    assert_same(*sums(model), 1e-5)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.wholly_fast, paths.in_words()


def adapted(family: str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
        model: torch.nn.Module = get_peft_model(model_of(family), lora).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave A without a gradient
                torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_adapters_on_experts_and_routers_are_fast(family: str) -> None:
    """Whose matrices are used past the calls of the layers that hold them."""
    model = adapted(family)
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    assert_same(*sums(model), 1e-5)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.wholly_fast, paths.in_words()
    assert {"adapters of experts", "adapters of a router"} <= {layers.kind for layers in paths.layers}


def test_adapted_experts_that_mix_rows_are_refused() -> None:
    model: Any = adapted("mixtral")
    for layer in model.base_model.model.model.layers:
        layer.mlp.experts.forward = _mixing(layer.mlp.experts)
    assert_same(*sums(model), 1e-12)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.because


def _of_all(x: torch.Tensor) -> torch.Tensor:
    return x + 0.5 * x.flatten(0, -2).mean(0)


def _routes_by_all(model: Any) -> None:
    for layer in model.model.layers:
        gate = layer.mlp.gate
        forward = type(gate).forward

        def mixing(x: torch.Tensor, gate: Any = gate, forward: Callable[..., Any] = forward) -> Any:
            return forward(gate, _of_all(x.reshape(-1, x.shape[-1])))

        gate.forward = mixing


def _experts_of_all(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.forward = _mixing(layer.mlp.experts)


def _mixing(module: Any) -> Callable[..., Any]:
    forward = type(module).forward
    return lambda x, *others: forward(module, _of_all(x), *others)


def _sorts_before_experts(model: Any) -> None:
    for layer in model.model.layers:
        experts, forward = layer.mlp.experts, type(layer.mlp).forward

        def sorting(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, own: Any = experts) -> torch.Tensor:
            order = x[:, 0].argsort()
            return own(x[order], index[order], weights[order])[order.argsort()]

        layer.mlp.forward = lambda x, mlp=layer.mlp, call=sorting, forward=forward: _with_experts(
            mlp, call, forward, x
        )


def _with_experts(mlp: Any, call: Callable[..., Any], forward: Callable[..., Any], x: torch.Tensor) -> Any:
    _, weights, index = mlp.gate(x.view(-1, x.shape[-1]))
    return call(x.view(-1, x.shape[-1]), index, weights).view_as(x)


def _positions_of_all(model: Any) -> None:
    table = model.model.decoder.embed_positions
    forward = type(table).forward

    def mixing(mask: torch.Tensor, past: int = 0, position_ids: Any = None) -> torch.Tensor:
        longest = 0 if position_ids is None else int(position_ids.max())
        return forward(table, mask, past, position_ids=position_ids + (position_ids * 0 + longest) // 3)

    table.forward = mixing


def _linear_of_all(model: Any) -> None:
    for layer in model.transformer.h:
        layer.mlp.dense_h_to_4h.forward = _mixing(layer.mlp.dense_h_to_4h)


def _norms_of_all(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.forward = _mixing(layer.input_layernorm)


@pytest.mark.parametrize(
    ("family", "mix"),
    [
        ("mixtral", _routes_by_all),
        ("mixtral", _experts_of_all),
        ("mixtral", _sorts_before_experts),
        ("opt", _positions_of_all),
        ("falcon", _linear_of_all),
        ("cohere", _norms_of_all),
    ],
)
def test_a_model_that_mixes_rows_in_such_a_layer_is_refused(family: str, mix: Callable[[Any], None]) -> None:
    model = model_of(family)
    mix(model)
    assert_same(*sums(model), 1e-12)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.because


def test_a_residual_that_is_added_to_in_place_by_another_row_is_refused() -> None:
    """What is computed in place of a layer's output, which autograd lets pass."""
    model: Any = model_of("falcon")
    for layer in model.transformer.h:
        layer.mlp.register_forward_hook(lambda _, given, output: output.add_(0.5 * output.detach().mean((0, 1))))
    assert_same(*sums(model), 1e-12)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.because


@pytest.mark.parametrize("where", ["experts", "router"])
def test_rows_are_not_mixed_by_a_model_that_sorts_tokens_only_after_its_trial(where: str) -> None:
    """What is known of the order of vectors is known of each call's, not of those that were tried."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    sorts: list[bool] = []

    def order_of(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0].argsort() if sorts else torch.arange(len(x))

    class SortingRouter(MixtralTopKRouter):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = x.reshape(-1, self.hidden_dim)
            order = order_of(x)
            given = x[order] if sorts else x
            logits = torch.nn.functional.linear(given, self.weight)[order.argsort()]
            best, index = torch.topk(logits.softmax(-1), self.top_k)
            return logits, best, index

    model: Any = model_of("mixtral")
    for layer in model.model.layers:
        if where == "router":
            gate = SortingRouter(model.config)
            gate.load_state_dict(layer.mlp.gate.state_dict())
            layer.mlp.gate = gate
            continue
        experts = layer.mlp.experts

        def sorting(x: torch.Tensor, mlp: Any = layer.mlp, own: Any = experts) -> torch.Tensor:
            flat = x.view(-1, x.shape[-1])
            _, weights, index = mlp.gate(flat)
            order = order_of(flat)
            if not sorts:
                return own(flat, index, weights).view_as(x)
            return own(flat[order], index[order], weights[order])[order.argsort()].view_as(x)

        layer.mlp.forward = sorting
    assert_same(*sums(model), 1e-5)
    paths = gradient_paths(model)
    assert paths is not None
    assert paths.wholly_fast, paths.in_words()
    sorts.append(True)
    assert_same(*sums(model), 1e-5)
