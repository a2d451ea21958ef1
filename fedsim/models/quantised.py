"""A frozen base in four bits a weight, under adapters that stay float32 (QLoRA; Dettmers et al. 2023).

Weights are stored as 4-bit normal floats in blocks of 64 with a float32 scale each, 4.5 bits a weight in all, and
multiplied out again where a layer is called: inputs and gradients are never rounded, so a row's gradient depends on
that row alone. Of what the library has beside, the 8-bit layers are not offered, for they round a layer's inputs as
well, by default after they have looked for outliers in all rows of a batch together; nor are scales of 8 bits, whose
last bits depend on how many threads a process has, so that server and workers would hold different models.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig

PACKAGE = "bitsandbytes"
QUANTISATION_FILE = "base_quantization.json"
"""Beside exported adapters: which base they were trained on, and how it was quantised."""


def quantising(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise what it reads; none where nothing is to be quantised.

    It happens on the CPU whatever the device, so that all processes get the same bits.

    Raises:
        InvalidInput: The package is not installed.
    """
    if config.quantise == "none":
        return {}
    if importlib.util.find_spec(PACKAGE) is None:
        hint = f"Quantised weights need {PACKAGE}: pip install 'fedsim[quantised]'."
        raise InvalidInput("model.quantise", config.quantise, f"none where {PACKAGE} is not installed", hint)
    return {"quantization_config": _settings(config), "device_map": {"": "cpu"}}


def multiply_as_stored(model: torch.nn.Module) -> None:
    """Let quantised layers compute with their weights as they are on a CPU, too.

    There the package would store the weights anew at the first call without a gradient, for products in bfloat16 that
    know no backward pass.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def write_quantisation(config: ModelConfig, base: str, folder: Path) -> None:
    """Say in an export of adapters what base they belong to; nothing where it was not quantised.

    Args:
        config: Of the model.
        base: Name or folder of the base.
        folder: The export's.
    """
    if config.quantise == "none":
        return
    content = {"base": base, "quantization_config": _settings(config).to_dict()}
    (folder / QUANTISATION_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _settings(config: ModelConfig) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantise,
        bnb_4bit_use_double_quant=False,
        # Left open, the first call's inputs would decide.
        bnb_4bit_compute_dtype=getattr(torch, config.base_dtype),
    )
