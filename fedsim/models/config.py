"""What model to fine-tune, and how. Plain data: importing this needs neither torch nor transformers."""

from dataclasses import dataclass, field
from typing import Literal

from fedsim.errors import InvalidInput

DEFAULT_PATH = "default"
"""The path that stands for our own small model, pre-trained on public text on first use."""

Task = Literal["causal-lm", "sequence-classification"]
Dtype = Literal["float32", "bfloat16"]


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

    steps: int = 600
    """Pre-training steps; 0 leaves the weights as initialised."""

    batch_rows: int = 16
    """Rows of text (each up to context tokens) in one pre-training step."""

    learning_rate: float = 3e-3
    """Peak learning rate of pre-training (AdamW, short linear warm-up, then cosine decay)."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "batch_rows"):
            _check_at_least("model.small", name, getattr(self, name), 1)
        _check_at_least("model.small", "context", self.context, 2)
        _check_at_least("model.small", "vocabulary_size", self.vocabulary_size, 257)
        _check_at_least("model.small", "steps", self.steps, 0)
        if self.width % self.heads:
            raise InvalidInput("model.small.width", self.width, f"a multiple of model.small.heads ({self.heads})")
        if not self.learning_rate > 0:
            raise InvalidInput("model.small.learning_rate", self.learning_rate, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to fine-tune."""

    path: str = DEFAULT_PATH
    """A Hugging Face model by name or folder, or "default": a small GPT-2 pre-trained on public text."""

    task: Task = "causal-lm"
    """Predict the next token, or the class of a whole row."""

    num_labels: int = 2
    """Classes, for sequence-classification."""

    lora_rank: int = 0
    """Rank of LoRA adapters; 0 fine-tunes every weight."""

    lora_alpha: float = 16.0
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""

    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get adapters ("q_proj v_proj"); empty adapts every linear layer but the head."""

    base_dtype: Dtype = "float32"
    """Precision of the frozen weights under LoRA. Trained weights are always float32."""

    seed: int = 0
    """Seed of everything drawn at random here: pre-training, LoRA and classifier-head initialisation."""

    threads: int = 2
    """CPU threads for pre-training the default model. Another number may change its weights by rounding."""

    small: SmallModelConfig = field(default_factory=SmallModelConfig)
    """Shape and pre-training of the default model; ignored for any other path."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise InvalidInput("model.path", self.path, 'a Hugging Face model name, a folder, or "default"')
        if self.task not in ("causal-lm", "sequence-classification"):
            raise InvalidInput("model.task", self.task, "causal-lm or sequence-classification")
        _check_at_least("model", "num_labels", self.num_labels, 2)
        _check_at_least("model", "lora_rank", self.lora_rank, 0)
        _check_at_least("model", "seed", self.seed, 0)
        _check_at_least("model", "threads", self.threads, 1)
        if not self.lora_alpha > 0:
            raise InvalidInput("model.lora_alpha", self.lora_alpha, "a number above 0")
        if self.lora_targets and not self.lora_rank:
            hint = "Set model.lora_rank to a number above 0, or leave lora_targets out."
            raise InvalidInput("model.lora_targets", self.lora_targets, "empty when model.lora_rank is 0", hint)
        if self.base_dtype not in ("float32", "bfloat16"):
            raise InvalidInput("model.base_dtype", self.base_dtype, "float32 or bfloat16")
        if self.base_dtype != "float32" and not self.lora_rank:
            hint = "Without LoRA every weight is trained, and trained weights are float32."
            raise InvalidInput("model.base_dtype", self.base_dtype, "float32 when model.lora_rank is 0", hint)


def _check_at_least(prefix: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidInput(f"{prefix}.{name}", value, f"a whole number of at least {least}")
