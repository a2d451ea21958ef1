"""What a model says of itself: its task, how the base of its adapters was quantised."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fedsim.errors import InvalidInput
from fedsim.models.adapters import task_of
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.models.quantised import PACKAGE, QUANTISATION_FILE
from fedsim.models.refusals import classifies, reads_apart
from fedsim.models.sources import Source, file_of, find_source


def described_model(path: str) -> ModelConfig:
    """The configuration by which a model is loaded as what it is, and nothing of it drawn anew.

    Args:
        path: A model, LoRA adapters or the folder of a run, by folder or by name on the hub.

    Raises:
        InvalidInput: There is none, or it cannot be read.
    """
    if path == DEFAULT_PATH:
        raise InvalidInput("folder", path, "a model, the folder of a run, or a name on the Hugging Face hub")
    source = find_source(path)
    if source.adapters:
        return ModelConfig(path=path, **task_of(source), **_base_options(source))
    try:
        shape = AutoConfig.from_pretrained(source.base, local_files_only=source.cached)
    except (OSError, ValueError) as error:
        reason = f"Reading it said: {str(error).strip().splitlines()[0]}"
        raise InvalidInput("folder", path, "a model that transformers reads", reason) from error
    if classifies(shape):
        return ModelConfig(path=path, task="sequence-classification", num_labels=shape.num_labels)
    if reads_apart(shape):
        return ModelConfig(path=path, task="seq2seq-lm")
    return ModelConfig(path=path)


def _base_options(source: Source) -> dict[str, Any]:
    """How the base was quantised, where that can be done here."""
    written = file_of(source.adapters or "", QUANTISATION_FILE, source.cached)
    if written is None or importlib.util.find_spec(PACKAGE) is None:
        return {}
    settings = json.loads(Path(written).read_text(encoding="utf-8"))["quantization_config"]
    dtype = str(settings["bnb_4bit_compute_dtype"]).removeprefix("torch.")
    return {"quantise": settings["bnb_4bit_quant_type"], "base_dtype": dtype}
