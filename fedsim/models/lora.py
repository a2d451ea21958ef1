"""LoRA adapters (Hu et al. 2021) through PEFT, over a frozen base."""

from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers.pytorch_utils import Conv1D

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.quiet import quiet_transformers

TASK_TYPES = {"causal-lm": TaskType.CAUSAL_LM, "sequence-classification": TaskType.SEQ_CLS}


def add_adapters(model: Any, config: ModelConfig) -> torch.nn.Module:
    """The model with LoRA adapters, everything else frozen but a classifier's head.

    Adapters are float32 whatever the precision of the base, and start as zero: the adapted model first computes what
    the base computes. Their random halves are drawn from config.seed, so every process draws the same.

    Args:
        model: A Hugging Face model.
        config: Rank above 0, alpha, targets.

    Raises:
        InvalidInput: No layer matches the targets.
    """
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules=list(config.lora_targets) or "all-linear",
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias="none",
        task_type=TASK_TYPES[config.task],
    )
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(config.seed)
            return get_peft_model(model, adapters)
    except ValueError as error:
        linear = sorted({name.split(".")[-1] for name, m in model.named_modules() if hasattr(m, "weight")})
        hint = f"The model's layers with weights are called {', '.join(linear)}."
        raise InvalidInput(
            "model.lora-targets", config.lora_targets, "names of the model's linear layers", hint
        ) from error
