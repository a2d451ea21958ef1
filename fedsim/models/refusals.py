"""Why a checkpoint cannot be loaded, in a sentence: what it lacks, what it is not, and what reading it said."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig, Task

OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
"""What every reading of a model, a configuration or a tokenizer is told. Without it transformers asks on the terminal
whether to run the code in a folder or repository, and runs it if somebody says yes."""

AUTO_CLASSES: dict[Task, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}
KINDS: dict[Task, str] = {
    "causal-lm": "causal language model",
    "sequence-classification": "sequence classifier",
    "seq2seq-lm": "language model with encoder and decoder",
}
CLASSIFIER = "ForSequenceClassification"
INDEX = "model.safetensors.index.json"
LONGEST_REASON = 300
"""Characters of what a library says."""


def not_loaded(config: ModelConfig, reason: str) -> InvalidInput:
    """What to raise for a model that cannot be loaded, for a reason that follows a colon."""
    allowed = (
        f"a {KINDS[config.task]} with safetensors weights and a tokenizer: a folder, or a name on the Hugging Face hub"
    )
    return InvalidInput("model.path", config.path, allowed, f"It cannot be loaded: {reason}")


def require_whole(config: ModelConfig, base: str) -> None:
    """Refuse a folder that lacks weights.

    Args:
        config: What was asked for.
        base: Folder, or name on the hub, of which the hub's client fetches all there is.

    Raises:
        InvalidInput: Files that its index names are missing, or it has pickled weights alone.
    """
    folder = Path(base)
    if not folder.is_dir() or (folder / "model.safetensors").exists():
        return
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        named = sorted(set(content["weight_map"].values()))
    except FileNotFoundError:
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        if pickled and not any(folder.glob("*.safetensors")):
            reason = (
                f"its weights are pickled ({pickled[0]}), and reading those can run code: convert them to safetensors."
            )
            raise not_loaded(config, reason) from None
        return
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise not_loaded(config, f"{INDEX} is damaged: download it again.") from error
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        few = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        reason = f"of {len(named)} files of weights {len(missing)} are missing: download {few} as well."
        raise not_loaded(config, reason)


def require_plain(config: ModelConfig, shape: PretrainedConfig) -> None:
    """Refuse what is no plain model of transformers' own for the task.

    Args:
        config: What was asked for.
        shape: The model's configuration.

    Raises:
        InvalidInput: There is no such model for the task, or it has an encoder that would be dropped; its weights are
            quantised; or its attention is a program from the hub.
    """
    if config.task == "causal-lm" and reads_apart(shape):
        task = "sequence-classification" if classifies(shape) else "seq2seq-lm"
        raise not_loaded(config, f"it has an encoder and a decoder: set model.task to {task}.")
    offered = [task for task, auto in AUTO_CLASSES.items() if type(shape) in auto._model_mapping]
    if config.task not in offered:
        hint = "".join(f"set model.task to {task}, or " for task in offered)
        reason = (
            f"transformers has no {KINDS[config.task]} of the kind {shape.model_type}: {hint}choose another model."
        )
        raise not_loaded(config, reason)
    text = shape.get_text_config()
    quantised: Any = getattr(shape, "quantization_config", None) or getattr(text, "quantization_config", None)
    if quantised:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = str(settings.get("quant_method") or "bitsandbytes")
        reason = (
            f"its weights are quantised ({getattr(quantised, 'quant_method', method)}), and only plain ones are "
            "fine-tuned: name the model that they were made of, and --model.quantise nf4 rounds it as it is loaded."
        )
        raise not_loaded(config, reason)
    attention = str(getattr(shape, "_attn_implementation", None) or "")
    if "/" in attention:
        reason = f"its configuration wants a program from the hub ({attention}) for its attention, which is not run"
        raise not_loaded(config, f"{reason}: take attn_implementation out of its config.json.")


def classifies(shape: PretrainedConfig) -> bool:
    """Whether a model of this configuration was saved as a sequence classifier."""
    return any(str(name).endswith(CLASSIFIER) for name in shape.architectures or ())


def reads_apart(shape: PretrainedConfig) -> bool:
    """Whether a model of this configuration has an encoder for a prompt, and a decoder for its text."""
    return bool(shape.is_encoder_decoder) and type(shape) in AUTO_CLASSES["seq2seq-lm"]._model_mapping


def reason_of(error: Exception) -> str:
    """What a library said, as one sentence without line breaks."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "custom code" in said or "trust_remote_code" in said:
        return (
            "it needs code that comes with it, which is not run, for it could do anything on this machine, and read "
            "all that it is given: choose a model that transformers knows by itself."
        )
    if isinstance(error, SafetensorError):
        return f"a file of its weights is damaged or was not downloaded whole ({said}): download it again."
    if isinstance(error, KeyError):
        return f"there is no {said} in one of its files."
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines() if line.strip()]
    if lines and not lines[0].endswith(":"):
        said = lines[0]
    return said if len(said) <= LONGEST_REASON else re.sub(r"\s+\S*$", " …", said[:LONGEST_REASON])
