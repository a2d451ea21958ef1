"""Tiny random models, saved as a user would find them: configuration, safetensors, tokenizer."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmarks.models.families import CLASSES, COMMON, VOCABULARY
from fedsim.models.quiet import quiet_transformers

GAIN = 2.0
"""What matrices are multiplied by after they are drawn, so that every layer has a say in the outputs."""


def save_tiny(model_type: str, fields: dict[str, Any], causal: bool, folder: Path) -> str:
    """Make a tiny random model of a family and save it with a tokenizer; the same one each time.

    Args:
        model_type: As transformers calls the family in a configuration.
        fields: Of its configuration, beside those that all have.
        causal: Whether it is a language model; else it is a classifier of CLASSES classes.
        folder: Where to.

    Returns:
        The folder.
    """
    settings = COMMON | fields | ({} if causal else {"num_labels": CLASSES})
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(model_type, **settings)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(GAIN)
    with quiet_transformers():
        model.save_pretrained(folder)
    special = {name: settings[f"{name}_id"] for name in ("pad_token", "bos_token", "eos_token")}
    tokenizer(**special).save_pretrained(folder)
    return str(folder)


@cache
def tokenizer(*, pad_token: int, bos_token: int, eos_token: int) -> PreTrainedTokenizerFast:
    """One word a token, with the special tokens where a family has them."""
    names = {pad_token: "<pad>", bos_token: "<s>", eos_token: "</s>"}
    words = {names.get(place, f"w{place}"): place for place in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token=f"w{VOCABULARY - 1}"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # typed as read-only
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it without types
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token=f"w{VOCABULARY - 1}",
        clean_up_tokenization_spaces=False,
    )
