"""Load a Hugging Face causal language model or sequence classifier, in full or with LoRA adapters."""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fedsim.errors import InvalidInput
from fedsim.gradients.model import ParameterLayout
from fedsim.gradients.objective import CausalLanguageModel, Objective, SequenceClassification, SequenceToSequence
from fedsim.models.adapters import put_on
from fedsim.models.checkpointing import checkpoint_blocks
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.models.context import longest_row
from fedsim.models.given import Given
from fedsim.models.independence import require_independent_rows, require_losses_apart
from fedsim.models.lora import add_adapters, has_adapters
from fedsim.models.quantised import multiply_as_stored, quantising
from fedsim.models.quiet import quiet_transformers
from fedsim.models.refusals import AUTO_CLASSES, OWN_CODE, not_loaded, reason_of, require_plain, require_whole
from fedsim.models.sources import Source, find_source
from fedsim.models.trainable import freeze_others

logger = logging.getLogger(__name__)

OF_BLOCK = re.compile(r"\.\d+\.")
"""Names of weights within a model's blocks: those of a classifier's new head are drawn, these never."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be trained: dropout off, padding known, the right parameters trainable.

    Attributes:
        model: A Hugging Face model, a PEFT model around one, or a module of somebody's own; in evaluation mode,
            trained weights float32.
        tokenizer: Its tokenizer.
        objective: What is minimised and measured.
        config: What was asked for.
        source: Where it was read from.
        given: Whether the model is a module of somebody's own.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    config: ModelConfig
    source: Source
    given: bool = False

    @property
    def base(self) -> str:
        """Name or folder that the weights came from (the cache's folder for the default model)."""
        return self.source.base

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, over a frozen base."""
        return has_adapters(self.model)

    @property
    def pad_token(self) -> int:
        """Token id that fills rows up; masked or not scored wherever it fills."""
        pad_token: int = self.tokenizer.pad_token_id
        return pad_token

    @property
    def context(self) -> int | None:
        """Most tokens in a row that the model can read; None where its positions have no limit."""
        return longest_row(self.model, self.tokenizer)

    @property
    def layout(self) -> ParameterLayout:
        """The trainable parameters as one flat vector."""
        return ParameterLayout.of(self.model)


def load_model(
    config: ModelConfig,
    *,
    public_texts: Callable[[], Iterable[str]] | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> LoadedModel:
    """Load the model that the configuration names.

    Weights are read from safetensors files only: pickled weights can run code and are refused. Every process that
    loads the same configuration gets the same weights, adapters and new classifier head included.

    Args:
        config: Path, task, LoRA.
        public_texts: Gives the public texts that the default model is pre-trained on; called for it alone.
        cache: Where pre-trained default models are kept; needed for the default model alone.
        device: Where to put the model.
        progress: Show a progress bar when the default model has to be pre-trained.

    Raises:
        InvalidInput: The model cannot be found, has no safetensors weights or no tokenizer, or no layer to adapt; or
            its rows do not keep to themselves (`require_independent_rows`), as those of an encoder that is loaded as a
            language model; or it cannot be quantised or checkpointed as asked.
    """
    source = _source(config, public_texts, cache, progress)
    config.require_adapted(bool(config.lora_rank or source.adapters))
    given = Given.read(source.base)
    if given.module is not None:
        return _of_own(config, source, given, device)
    model, drawn = _weights(config, source)
    tokenizer = _tokenizer(config, source)
    _tell_padding(model, tokenizer.pad_token_id, config)
    if source.adapters:
        model = put_on(model.requires_grad_(False), source, config)
    elif config.lora_rank:
        model = add_adapters(model.requires_grad_(False), config, drawn)
    else:
        freeze_others(model, config.trainable, drawn)
    objective = _objective(model, config) if given.objective is None else given.objective
    model = model.to(device).eval()
    if config.checkpointing:
        checkpoint_blocks(model, config)
    loaded = LoadedModel(model=model, tokenizer=tokenizer, objective=objective, config=config, source=source)
    end, ends_once = tokenizer.eos_token_id, False
    if isinstance(objective, SequenceClassification) and objective.end_token is not None:
        end, ends_once = objective.end_token, True
    require_independent_rows(model, config, loaded.pad_token, end, loaded.context, ends_once=ends_once)
    if given.objective is not None:
        require_losses_apart(model, objective, config, embedded_tokens(loaded), loaded.context)
    return loaded


def _of_own(config: ModelConfig, source: Source, given: Given, device: torch.device | str) -> LoadedModel:
    """A module of somebody's own, trained as it is: all of it that asks for gradients."""
    for name, used in (("lora-rank", config.lora_rank), ("quantise", config.quantise != "none")):
        if used:
            hint = "Adapters and quantised weights are for models of transformers: build them into the module."
            raise InvalidInput(f"model.{name}", getattr(config, name.replace("-", "_")), "left out here", hint)
    if config.task == "seq2seq-lm" and given.objective is None:
        hint = "What the decoder reads first is known of models of transformers alone."
        raise InvalidInput("objective", None, "given with a module and the task seq2seq-lm", hint)
    model = given.module
    assert model is not None
    if config.trainable:
        freeze_others(model, config.trainable)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidInput("model", config.path, "a module with a parameter that asks for gradients")
    kinds = {"causal-lm": CausalLanguageModel, "sequence-classification": SequenceClassification}
    objective = kinds[config.task]() if given.objective is None else given.objective
    loaded = LoadedModel(
        model=model.float().to(device).eval(),
        tokenizer=_tokenizer(config, source),
        objective=objective,
        config=config,
        source=source,
        given=True,
    )
    require_losses_apart(loaded.model, objective, config, embedded_tokens(loaded), loaded.context)
    return loaded


def embedded_tokens(loaded: LoadedModel) -> int:
    """How many token ids, from 0, both tokenizer and model know."""
    known, embedded = len(loaded.tokenizer), embeddings(loaded)
    return known if embedded is None else min(known, embedded)


def embeddings(loaded: LoadedModel) -> int | None:
    """How many token ids, from 0, the model has an embedding of; None where it does not say."""
    model: Any = loaded.model
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return None if embedding is None else len(embedding.weight)


def _tell_padding(model: Any, pad_token: int, config: ModelConfig) -> None:
    """Tell a classifier, which reads its answer at the last token that is not padding.

    A causal model needs none, and would look through every batch for it, which on a GPU waits for the device.
    """
    try:
        model.config.pad_token_id = None if config.task == "causal-lm" else pad_token
    except StrictDataclassFieldValidationError:  # some must have one
        model.config.pad_token_id = pad_token


def _objective(model: Any, config: ModelConfig) -> Objective:
    """What the model's task minimises.

    A classifier of encoder and decoder reads its answer at the end token, of which each row must have as many.
    """
    shape = model.config
    if config.task == "causal-lm":
        return CausalLanguageModel()
    if config.task == "sequence-classification":
        ends = shape.is_encoder_decoder and isinstance(shape.eos_token_id, int)
        return SequenceClassification(end_token=shape.eos_token_id if ends else None)
    if shape.decoder_start_token_id is None:
        raise not_loaded(config, "its configuration has no decoder_start_token_id, which a decoder reads first.")
    return SequenceToSequence(start=shape.decoder_start_token_id)


def _source(
    config: ModelConfig, public_texts: Callable[[], Iterable[str]] | None, cache: Path | None, progress: bool
) -> Source:
    if config.path != DEFAULT_PATH:
        return find_source(config.path)
    if public_texts is None or cache is None:
        raise InvalidInput("model.path", config.path, "a Hugging Face model where no public text or cache is given")
    from fedsim.models.small import small_model_folder

    folder = small_model_folder(
        config.small, texts=public_texts, cache=cache, seed=config.seed, threads=config.threads, progress=progress
    )
    return Source(base=str(folder), carried=True)


def _weights(config: ModelConfig, source: Source) -> tuple[Any, list[str]]:
    """The model, and names of the weights that were drawn at random, for the checkpoint lacks them."""
    quantisation = quantising(config)
    base = source.base
    place: dict[str, Any] = {"local_files_only": source.cached, "revision": source.revision} | OWN_CODE
    require_whole(config, base)
    try:
        shape = without_dropout(AutoConfig.from_pretrained(base, **place))
        require_plain(config, shape)
        if config.task == "sequence-classification":
            shape.num_labels = config.num_labels
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(config.seed)  # A new classifier head is drawn at random.
            model, report = AUTO_CLASSES[config.task].from_pretrained(
                base,
                config=shape,
                dtype=getattr(torch, config.base_dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **place,
                **quantisation,
            )
    except (InvalidInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the libraries that read it raise
        raise not_loaded(config, _of_base(source) + reason_of(error)) from error
    drawn = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    lacking = drawn if config.task != "sequence-classification" else [key for key in drawn if OF_BLOCK.search(key)]
    if lacking:
        few = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise not_loaded(config, f"no weights for {few}, or none of the shape that its configuration says.")
    if drawn:
        logger.info("new weights, drawn at random: %s", ", ".join(drawn))
    multiply_as_stored(model)
    return model, drawn


def _tokenizer(config: ModelConfig, source: Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=source.cached, **OWN_CODE)
    except Exception as error:  # whatever the libraries that read it raise
        raise not_loaded(config, f"its tokenizer cannot be read: {reason_of(error)}") from error
    if tokenizer.pad_token is None:
        # Any token will do, since what it fills is masked; adding one would change the model's vocabulary.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _of_base(source: Source) -> str:
    return f"the base of these adapters, {source.base}: " if source.adapters else ""


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with every dropout rate set to zero, in place.

    Clipping needs a row's gradient to depend on that row alone, and the fast path and its reference to agree.
    """
    for name, value in config.to_dict().items():
        if ("drop" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config
