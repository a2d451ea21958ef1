"""LoRA adapters (Hu et al. 2021) through PEFT, over a frozen base."""

import re
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
    adaptable = _linear_layers(model)
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(config.seed)
            return get_peft_model(model, adapters)
    except (ValueError, TypeError) as error:
        said = str(error).removeprefix("[PEFT:PeftType.LORA] ")
        # PEFT quotes the layers that it refuses.
        offered = sorted(adaptable - set(re.findall(r"'(\w+)'", said)))
        allowed = f"some of the model's linear layers: {', '.join(offered) or 'it has none that can be adapted'}"
        chosen = config.lora_targets or "every linear layer, unless set"
        raise InvalidInput("model.lora-targets", chosen, allowed, f"PEFT said: {said}") from error


def _linear_layers(model: Any) -> set[str]:
    """Last names of the layers that adapters may go on: linear ones, but the head."""
    head = model.get_output_embeddings()
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D))
    return {name.rpartition(".")[2] for name, module in linear if module is not head}
