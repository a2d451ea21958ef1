"""Which layers get adapters unless said otherwise, and what is trained in full beside them."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fedsim.models.config import ModelConfig

PEFT_REFUSES = {kind: ("out_proj",) for kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")}
"""Layers that these architectures read past their call, so that PEFT puts no adapters on them."""


def default_targets(model: Any, in_full: Iterable[str]) -> list[str]:
    """Whole names of the linear layers, but for the head and what is trained in full.

    Experts that are parameters of one module, rather than layers, get none; nor do routers, which are linear layers
    that return more than a product.

    Args:
        model: A Hugging Face model.
        in_full: Names of modules that are trained in full.

    Returns:
        Names, in the order of the model.
    """
    head, kind = model.get_output_embeddings(), model.config.model_type
    others = {*PEFT_REFUSES.get(kind, ()), *_taken_for_experts(kind)}
    full = tuple(in_full)
    return [
        name
        for name, module in model.named_modules()
        if adaptable(module)
        and module is not head
        and name.rpartition(".")[2] not in others
        and not any(f"{name}.".startswith(f"{one}.") for one in full)
    ]


def adaptable(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer that adapters may go on: it returns its product and nothing else."""
    if not isinstance(module, torch.nn.Linear | Conv1D):
        return False
    plain = type(module).forward in (torch.nn.Linear.forward, Conv1D.forward)
    return plain or hasattr(module.weight, "quant_state") or _returns_product(module)


def trained_in_full(model: Any, config: ModelConfig, drawn: Iterable[str] = ()) -> list[str]:
    """Names of modules of which adapters would not be enough: a classifier's head, and what the checkpoint lacks.

    Weights that were drawn at random are nowhere but in this process: frozen, they would be others when the adapters
    are read back, and under adapters they would be no use.

    Args:
        model: A Hugging Face model.
        config: What was asked for.
        drawn: Names of weights that are not in the checkpoint.

    Returns:
        Names of modules with parameters; none for a language model, which has all its weights.
    """
    if config.task != "sequence-classification":
        return []
    body = model.base_model
    head = [name for name, child in model.named_children() if child is not body and list(child.parameters())]
    parameters = dict(model.named_parameters())
    fresh = dict.fromkeys(name.rpartition(".")[0] for name in drawn if name in parameters)
    own = head if body is not model else []
    return own + [name for name in fresh if name and not any(f"{name}.".startswith(f"{one}.") for one in own)]


def _taken_for_experts(kind: str) -> Iterable[str]:
    """Names of layers in whose stead PEFT puts adapters on a model's experts, which had such names once.

    So of DeepSeek's first layers, which have no experts, and of its shared ones.
    """
    from peft.utils import transformers_weight_conversion as peft_conversion  # here, see lora.has_adapters

    patterns: dict[str, str] = getattr(peft_conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    names: dict[str, dict[str, str]] = getattr(peft_conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return names.get(patterns.get(kind, ""), {})


def _returns_product(module: Any) -> bool:
    """Tried on a row of zeros."""
    row = torch.zeros(1, module.weight.shape[1], dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            found = module(row)
    except Exception:  # whatever else it wants, it is no such layer
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.weight.shape[0])
