"""LoRA adapters that are there already: PEFT's files, put on the base that they belong to."""

import dataclasses
import logging
import re
from typing import Any

import torch
from safetensors.torch import load_file

from fedsim.errors import InvalidInput
from fedsim.models.config import ADAPTER_OPTIONS, ModelConfig
from fedsim.models.lora import TASK_TYPES, drawing, freeze_orthonormal
from fedsim.models.quantised import QUANTISATION_FILE
from fedsim.models.quiet import quiet_transformers
from fedsim.models.sources import Source, adapter_settings, adapter_weights, file_of

logger = logging.getLogger(__name__)

REWRITTEN = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the base, by decompositions whose last bits are not the same in every process."""
OTHER_MODELS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings that make of LoRA something that draws at random, reads a whole batch together, or changes the base."""


def put_on(model: Any, source: Source, config: ModelConfig) -> Any:
    """The model with the adapters of a folder on it, all of them trained on, everything else frozen.

    They compute what PEFT computes with them, but for their dropout, which is 0; they are float32 whatever they were
    saved in.

    Args:
        model: The base, frozen.
        source: Names the adapters.
        config: What was asked for; of LoRA nothing, or the rank that they have.

    Raises:
        InvalidInput: The options ask for other adapters than these; these are for another task or another base, are
            incomplete, or compute what is not LoRA's; or their weights are not safetensors.
    """
    from peft import get_peft_model, set_peft_model_state_dict  # here, see lora.has_adapters

    settings = read_settings(source)
    _require_asked_for(config, settings)
    weights = load_file(adapter_weights(source))
    resize_tokens(model, weights)
    allowed = f"adapters that fit {source.base}, the base that they name"
    try:
        with drawing(config.seed), quiet_transformers():
            adapted = get_peft_model(model, settings)
            found: Any = set_peft_model_state_dict(adapted, weights)
    except KeyError as error:
        raise InvalidInput("model.path", config.path, allowed, f"They have no weights for {error}.") from error
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error).removeprefix("[PEFT:PeftType.LORA] ").strip().replace("\n", " ")
        raise InvalidInput("model.path", config.path, allowed, f"PEFT said: {said}") from error
    missing = [name for name in found.missing_keys if ".lora_" in name]
    if missing or found.unexpected_keys:
        few = ", ".join([*missing, *found.unexpected_keys][:3])
        what = "have no weights for layers of it" if missing else "have weights for layers that it lacks"
        raise InvalidInput("model.path", config.path, allowed, f"They {what}: {few}.")
    if config.lora_init == "orthonormal":
        freeze_orthonormal(adapted)
    _say_of_quantisation(source, config)
    return adapted


def read_settings(source: Source) -> Any:
    """What adapters say of themselves, to be trained: PEFT's LoraConfig.

    Raises:
        InvalidInput: They compute something else than LoRA, or are of a newer PEFT than this one.
    """
    from peft import LoraConfig  # here, see lora.has_adapters

    written = adapter_settings(source.adapters or "", source.cached) or {}
    known = {one.name for one in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    begun = str(written.get("init_lora_weights", True)).lower()
    others = sorted(name for name, value in written.items() if value and (name in OTHER_MODELS or name not in known))
    if begun.startswith(REWRITTEN):
        hint = "They began by rewriting the base. Convert them by PEFT's path_initial_model_for_weight_conversion."
        raise InvalidInput("model.path", source.adapters, f"LoRA adapters without init_lora_weights={begun}", hint)
    if others:
        hint = "Merge them into their base by PEFT and name the result."
        raise InvalidInput("model.path", source.adapters, f"LoRA adapters without {', '.join(others)}", hint)
    given = {name: value for name, value in written.items() if name in known and name not in OTHER_MODELS}
    # Their weights are read, whatever they were first drawn from.
    given |= {"lora_dropout": 0.0, "inference_mode": False, "init_lora_weights": True}
    given["base_model_name_or_path"] = None  # PEFT enters what they are put on, and warns where that has moved.
    given |= dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"))
    given["loftq_config"] = {}
    try:
        return LoraConfig(**given)
    except (ValueError, TypeError) as error:
        raise InvalidInput("model.path", source.adapters, "adapters that PEFT reads", f"It said: {error}") from error


def task_of(source: Source) -> dict[str, Any]:
    """Options of `ModelConfig` that adapters tell: their task, and how many classes their head has."""
    theirs = read_settings(source).task_type
    if theirs != TASK_TYPES["sequence-classification"]:
        return {"task": "seq2seq-lm" if theirs == TASK_TYPES["seq2seq-lm"] else "causal-lm"}
    weights = load_file(adapter_weights(source))
    heads = [tensor for name, tensor in weights.items() if re.search(r"\.(score|classifier)\.(.*\.)?weight$", name)]
    # Of a head of several layers the last has the classes.
    return {"task": "sequence-classification", "num_labels": min((len(head) for head in heads), default=2)}


def _require_asked_for(config: ModelConfig, settings: Any) -> None:
    if config.lora_rank not in (0, settings.r):
        hint = "Leave it out to train these adapters on."
        allowed = f"{settings.r}, as the adapters in model.path have it, or left out"
        raise InvalidInput("model.lora-rank", config.lora_rank, allowed, hint)
    defaults = {one.name: one.default for one in dataclasses.fields(ModelConfig)}
    for name in ADAPTER_OPTIONS[1:]:
        if (value := getattr(config, name)) != defaults[name]:
            allowed = f"left out, for the adapters in {config.path} have decided it"
            raise InvalidInput(f"model.{name.replace('_', '-')}", value, allowed)
    own, theirs = TASK_TYPES[config.task], settings.task_type
    if theirs not in (None, own):
        allowed = " or ".join(name for name, kind in TASK_TYPES.items() if kind == theirs) or "a task of theirs"
        raise InvalidInput("model.task", config.task, allowed, f"The adapters in {config.path} are for {theirs!s}.")
    settings.task_type = own
    for name in ("base_dtype", "quantise"):
        if settings.modules_to_save and getattr(config, name) != defaults[name]:
            hint = f"The adapters in {config.path} train modules in full ({', '.join(settings.modules_to_save)})."
            raise InvalidInput(f"model.{name.replace('_', '-')}", getattr(config, name), str(defaults[name]), hint)


def resize_tokens(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the base as many tokens as adapters with an embedding of their own were trained with."""
    table = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is table]
    saved = [weights[key] for name in names if (key := f"base_model.model.{name}.weight") in weights]
    if saved and len(saved[0]) != len(table.weight):
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            model.resize_token_embeddings(len(saved[0]), mean_resizing=False)
        model.requires_grad_(False)


def require_plain_base(source: Source) -> None:
    """Refuse to merge adapters that were trained on a quantised base: into which, their sums would be rounded away.

    Raises:
        InvalidInput: They were.
    """
    if _on_quantised(source):
        hint = f"Use them on the base as {QUANTISATION_FILE} beside them says."
        raise InvalidInput("path", source.adapters, "adapters on a base that was not quantised", hint)


def _on_quantised(source: Source) -> bool:
    return file_of(source.adapters or "", QUANTISATION_FILE, source.cached) is not None


def _say_of_quantisation(source: Source, config: ModelConfig) -> None:
    if config.quantise == "none" and _on_quantised(source):
        logger.warning(
            "the adapters in %s were trained on a quantised base (%s); without --model.quantise nf4 they are now put "
            "on one that is not",
            source.adapters,
            QUANTISATION_FILE,
        )
