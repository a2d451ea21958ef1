"""LoRA's options as PEFT's users know them, and what is trained without adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from test_adapters import loss, shaken
from transformers import AutoModelForCausalLM

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import clipped_sum
from fedsim.models.config import ModelConfig
from fedsim.models.export import export, probe_rows
from fedsim.models.load import load_model
from fedsim.models.lora import adapters_of


def opened(path: str, **fields):
    return load_model(ModelConfig(path=path, **fields))


def by_autograd(loaded, rows, clip: float) -> torch.Tensor:
    """Σ of each row's gradient, scaled down to the clip: written out, with nothing of ours but the loss."""
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    total = torch.zeros(loaded.layout.size)
    for place in range(len(rows)):
        tokens = torch.tensor([list(rows.take(np.array([place])).tokens)], dtype=torch.long)
        logits = loaded.model(tokens).logits[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(lost, parameters)])
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total


FORMS = [
    {"lora_rank": 2, "lora_targets": ("all-linear",)},
    {"lora_rank": 2, "lora_targets": (r"model\.layers\.[01]\..*_proj", "layers.3.self_attn.q_proj")},
    {"lora_rank": 2, "rank_pattern": ("down_proj=5",), "alpha_pattern": (r"layers\.\d\.self_attn\.q_proj=3.5",)},
    {"lora_rank": 4, "use_rslora": True, "modules_to_save": ("model.norm", "lm_head")},
    {"lora_rank": 2, "use_dora": True, "lora_targets": ("q_proj", "v_proj")},
    {"lora_rank": 2, "lora_init": "gaussian"},
    {"lora_rank": 2, "lora_init": "orthonormal"},
    {"trainable": ("model.layers.4", "norm")},
    {"trainable": (r".*_layernorm\.weight", "lm_head")},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: ",".join(form))
def test_whatever_is_trained_is_clipped_as_autograd_says_and_goes_out_whole(
    story_llama: str, form: dict, tmp_path: Path
) -> None:
    loaded = opened(story_llama, **form)
    rows = probe_rows(loaded, count=4, length=12)
    base = AutoModelForCausalLM.from_pretrained(story_llama)
    assert loss(loaded) == pytest.approx(loss(loaded, base), rel=1e-5)
    shaken(loaded.model)
    summed = clipped_sum(loaded.model, rows, np.arange(4), Clip(norm=0.5), objective=loaded.objective).total
    torch.testing.assert_close(summed, by_autograd(loaded, rows, 0.5), rtol=1e-3, atol=1e-5)
    folder = export(loaded, tmp_path / "model")
    reader = AutoPeftModelForCausalLM if "lora_rank" in form else AutoModelForCausalLM
    assert loss(loaded, reader.from_pretrained(folder)) == pytest.approx(loss(loaded), rel=1e-5)
    again = load_model(loaded.config.reading(str(folder)))
    assert again.layout == loaded.layout
    assert loss(again) == pytest.approx(loss(loaded), rel=1e-6)


def test_targets_ranks_and_scales_are_what_was_asked_for(story_llama: str) -> None:
    def layers(**fields):
        found = adapters_of(opened(story_llama, **fields).model)
        return {name.removeprefix("base_model.model.model."): layer for name, layer in found}

    everywhere = layers(lora_rank=2)
    assert set(layers(lora_rank=2, lora_targets=("all-linear",))) == set(everywhere)
    some = layers(lora_rank=2, lora_targets=(r"model\.layers\.[01]\..*(q|v)_proj", "4.mlp.down_proj"))
    expected = {f"layers.{n}.self_attn.{one}_proj" for n in (0, 1) for one in "qv"}
    assert set(some) == expected | {"layers.4.mlp.down_proj"}
    ranked = layers(lora_rank=4, lora_alpha=8, rank_pattern=("down_proj=16",), alpha_pattern=("0.mlp.up_proj=3",))
    for name, layer in ranked.items():
        rank = 16 if name.endswith("down_proj") else 4
        alpha = 3 if name == "layers.0.mlp.up_proj" else 8
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / rank)
    stable = layers(lora_rank=4, lora_alpha=8, use_rslora=True)
    assert {layer.scaling["default"] for layer in stable.values()} == {4.0}


def test_saved_modules_are_trained_beside_adapters(story_llama: str) -> None:
    names = opened(story_llama, lora_rank=2, modules_to_save=("lm_head", "0.input_layernorm")).layout.names
    in_full = {name for name in names if "lora_" not in name}
    assert {name.split(".modules_to_save")[0].removeprefix("base_model.model.") for name in in_full} == {
        "lm_head",
        "model.layers.0.input_layernorm",
    }


def test_bias_alone_is_trained_and_everything_else_stays(load) -> None:
    loaded, whole = load(trainable=("bias",)), load()
    assert loaded.layout.names == tuple(name for name in whole.layout.names if name.endswith(".bias"))
    assert load(trainable=("all",)).layout == whole.layout
    rows = probe_rows(loaded, count=4, length=12)
    summed = clipped_sum(loaded.model, rows, np.arange(4), Clip(norm=0.5), objective=loaded.objective).total
    torch.testing.assert_close(summed, by_autograd(loaded, rows, 0.5), rtol=1e-3, atol=1e-5)


def test_a_drawn_head_is_trained_whatever_was_named(load) -> None:
    names = load(task="sequence-classification", num_labels=3, trainable=("h.1.ln_1",)).layout.names
    assert names == ("transformer.h.1.ln_1.weight", "transformer.h.1.ln_1.bias", "score.weight")


def test_tied_weights_answer_to_both_of_their_names(load) -> None:
    assert load(trainable=("lm_head",)).layout == load(trainable=("wte",)).layout


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"lora_rank": 2, "lora_targets": ("q_proj", "q_prj")}, "model.lora-targets", "q_prj.*q_proj"),
        ({"lora_rank": 2, "lora_targets": (r"nothing\..*",)}, "model.lora-targets", "down_proj"),
        ({"lora_rank": 2, "rank_pattern": ("lm_head=4",)}, "model.rank-pattern", "down_proj"),
        ({"lora_rank": 2, "alpha_pattern": ("q=4",)}, "model.alpha-pattern", "q_proj"),
        ({"lora_rank": 2, "modules_to_save": ("head",)}, "model.modules-to-save", "lm_head"),
        ({"trainable": ("bias",)}, "model.trainable", "lm_head"),
        ({"trainable": ("lm_head", "layers.9")}, "model.trainable", "layers.9"),
        ({"lora_init": "orthonormal"}, "model.lora-init", "no adapters"),
        ({"lora_rank": 65, "lora_init": "orthonormal"}, "model.lora-init", "64 inputs"),
        ({"lora_rank": 2, "lora_init": "orthonormal", "lora_targets": ("embed_tokens",)}, "model.lora-init", "linear"),
    ],
)
def test_names_that_are_nobodys_are_refused_with_those_that_are(
    story_llama: str, fields: dict, field: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as raised:
        opened(story_llama, **fields)
    assert raised.value.field == field
