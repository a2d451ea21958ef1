"""Activation checkpointing: a block's activations are computed again in the backward pass rather than kept."""

from typing import Any

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.quiet import quiet_transformers


def checkpoint_blocks(model: Any, config: ModelConfig) -> None:
    """Let every block of a Hugging Face model, or of a PEFT model around one, keep its input alone.

    transformers asks whether a block is in training mode. The blocks themselves are put into it and nothing within
    them is, so that what draws at random in training, a router's jitter say, goes on as in evaluation.

    Args:
        model: In evaluation mode.
        config: What was asked for.

    Raises:
        InvalidInput: The model has no such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # seconds to import, which few ask for

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not base.supports_gradient_checkpointing:
        hint = f"{type(base).__name__} has no blocks that transformers can checkpoint."
        raise InvalidInput("model.checkpointing", config.checkpointing, "off for this model", hint)
    # Renamed within transformers 5. Nothing is drawn in a block, so no generator's state need be kept for it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    with quiet_transformers():
        enable({"use_reentrant": False, "preserve_rng_state": False})
    if config.task == "sequence-classification":
        # A cache of keys and values would be filled a second time; language models are told so with each call.
        base.config.use_cache = False
    for block in blocks:
        block.training = True
