"""What model to fine-tune, and how. Plain data: importing this needs neither torch nor transformers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

from fedsim.errors import InvalidInput
from fedsim.validation import require_at_least, require_positive

DEFAULT_PATH = "default"
"""The path that stands for our own small model, pre-trained on public text on first use."""

Task = Literal["causal-lm", "sequence-classification"]
Dtype = Literal["float32", "bfloat16"]
Quantisation = Literal["none", "nf4"]

ADAPTER_OPTIONS = ("lora_rank", "lora_alpha", "lora_targets")
"""What adapters to draw; adapters that are read have decided it."""


@dataclass(frozen=True, kw_only=True)
class SmallModelConfig:
    """The default model: a small GPT-2, pre-trained once on public text and kept in a cache.

    These fields, the text and nothing else decide what is in the cache, so every field changes the model.
    Training is measured in steps, never in seconds: a busy machine takes longer and gets the same model.
    """

    layers: int = 4
    """Transformer blocks."""

    width: int = 128
    """Size of the hidden state; a multiple of heads."""

    heads: int = 4
    """Attention heads per block."""

    context: int = 128
    """Most tokens in a row that the model can read."""

    vocabulary_size: int = 4096
    """Tokens of the byte-level BPE tokenizer, at most; at least 257 (the bytes and the end-of-text token)."""

    steps: int = 500
    """Pre-training steps; 0 leaves the weights as initialised."""

    batch_rows: int = 8
    """Rows of text (each up to context tokens) in one pre-training step."""

    learning_rate: float = 1e-2
    """Peak learning rate of pre-training (short linear warm-up, then cosine decay)."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "batch_rows"):
            require_at_least(f"model.small.{name.replace('_', '-')}", getattr(self, name), 1)
        require_at_least("model.small.context", self.context, 2)
        require_at_least("model.small.vocabulary-size", self.vocabulary_size, 257)
        require_at_least("model.small.steps", self.steps, 0)
        require_positive("model.small.learning-rate", self.learning_rate)
        if self.width % self.heads:
            raise InvalidInput("model.small.width", self.width, f"a multiple of model.small.heads ({self.heads})")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to fine-tune."""

    path: str = DEFAULT_PATH
    """A Hugging Face model or PEFT's LoRA adapters, by name or folder; or the folder of a run, for what it exported;
    or "default": a small GPT-2 pre-trained on public text. Adapters are put on the base that they name, and trained
    on."""

    task: Task = "causal-lm"
    """Predict the next token, or the class of a whole row."""

    num_labels: int = 2
    """Classes, for sequence-classification."""

    lora_rank: int = 0
    """Rank of LoRA adapters; 0 fine-tunes every weight, or the adapters in path as they are."""

    lora_alpha: float = 16.0
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""

    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get adapters ("q_proj v_proj"); empty adapts every linear layer but the head."""

    base_dtype: Dtype = "float32"
    """Precision of the frozen weights under LoRA, and of products with quantised ones. Trained weights are always
    float32."""

    quantise: Quantisation = "none"
    """Keep the linear layers of the frozen base under LoRA, but for the head, in 4 bits a weight (nf4, as in QLoRA).
    Needs bitsandbytes: pip install 'fedsim[quantised]'."""

    checkpointing: bool = False
    """Keep each block's input alone in the forward pass and compute the rest again in the backward pass: less memory,
    about a third more computing. Passes are then not compiled."""

    seed: int = 0
    """Seed of everything drawn at random here: pre-training, LoRA and classifier-head initialisation."""

    threads: int = 2
    """CPU threads for pre-training the default model; its weights do not depend on them."""

    small: SmallModelConfig = field(default_factory=SmallModelConfig)
    """Shape and pre-training of the default model; ignored for any other path."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise InvalidInput("model.path", self.path, 'a Hugging Face model name, a folder, or "default"')
        if self.task not in get_args(Task):
            raise InvalidInput("model.task", self.task, "one of " + ", ".join(get_args(Task)))
        require_at_least("model.num-labels", self.num_labels, 2)
        require_at_least("model.lora-rank", self.lora_rank, 0)
        require_at_least("model.seed", self.seed, 0)
        require_at_least("model.threads", self.threads, 1)
        require_positive("model.lora-alpha", self.lora_alpha)
        if self.lora_targets and not self.lora_rank:
            hint = "Set model.lora-rank to a number above 0, or leave the targets out."
            raise InvalidInput("model.lora-targets", self.lora_targets, "empty when model.lora-rank is 0", hint)
        if self.base_dtype not in get_args(Dtype):
            raise InvalidInput("model.base-dtype", self.base_dtype, "one of " + ", ".join(get_args(Dtype)))
        if self.quantise not in get_args(Quantisation):
            raise InvalidInput("model.quantise", self.quantise, "one of " + ", ".join(get_args(Quantisation)))
        if self.path == DEFAULT_PATH or self.lora_rank or self.task != "causal-lm":
            self.require_adapted(bool(self.lora_rank))

    def require_adapted(self, adapted: bool) -> None:
        """Refuse what there must be adapters for, and nothing trained beside them.

        Args:
            adapted: Whether the model has adapters: drawn anew, or read from `path`, which is known once it is opened.

        Raises:
            InvalidInput: The frozen base is to be rounded, and there is none or its head is trained.
        """
        for name in ("base_dtype", "quantise"):
            value, exact = getattr(self, name), getattr(ModelConfig, name)
            if value != exact and (not adapted or self.task != "causal-lm"):
                allowed = f"{exact} without adapters (model.lora-rank), or when model.task is sequence-classification"
                hint = "Weights that are trained, a classifier's head among them, are float32."
                raise InvalidInput(f"model.{name.replace('_', '-')}", value, allowed, hint)

    def reading(self, path: str) -> Self:
        """The same for what a run of this configuration exported: its adapters are there, and need not be drawn.

        Args:
            path: Folder of the export.
        """
        return dataclasses.replace(self, path=path, **{name: getattr(ModelConfig, name) for name in ADAPTER_OPTIONS})
