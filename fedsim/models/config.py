"""What model to fine-tune, and how. Plain data: importing this needs neither torch nor transformers."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

from fedsim.errors import InvalidInput
from fedsim.validation import require_at_least, require_positive

DEFAULT_PATH = "default"
"""The path that stands for our own small model, pre-trained on public text on first use."""

Task = Literal["causal-lm", "sequence-classification", "seq2seq-lm"]
Dtype = Literal["float32", "bfloat16"]
Quantisation = Literal["none", "nf4"]

Init = Literal["kaiming", "gaussian", "orthonormal"]
Exported = Literal["adapters", "merged"]

ALL_LINEAR = "all-linear"
ALL = "all"
ADAPTER_OPTIONS = (
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)
"""What adapters to draw; adapters that are read have decided it."""
EXPRESSION = set(r"\^$*+?{}[]|()")
"""Any of these makes of a name a regular expression."""


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
    on. What a run of ours spent on a model counts when training goes on from there."""

    task: Task = "causal-lm"
    """Predict the next token, the class of a whole row, or with an encoder and a decoder a text from its prompt."""

    num_labels: int = 2
    """Classes, for sequence-classification."""

    lora_rank: int = 0
    """Rank of LoRA adapters; 0 fine-tunes every weight, or the adapters in path as they are."""

    lora_alpha: float = 16.0
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""

    lora_targets: tuple[str, ...] = ()
    """The layers that get adapters: names ("q_proj v_proj"), regular expressions that a layer's whole name fits
    ("model\\.layers\\.[0-3]\\..*_proj"), or all-linear, which is what empty means: every linear layer but the head."""

    rank_pattern: tuple[str, ...] = ()
    """Layers whose adapters have another rank, each written name=rank; names or regular expressions of how a layer's
    name ends ("down_proj=16")."""

    alpha_pattern: tuple[str, ...] = ()
    """Layers whose adapters have another lora_alpha, each written name=alpha."""

    use_rslora: bool = False
    """Multiply adapters by lora_alpha / √lora_rank instead (rank-stabilised LoRA, Kalajdzievski 2023)."""

    use_dora: bool = False
    """Train the norm of each adapted row of weights apart from its direction (DoRA, Liu et al. 2024). Its norms are
    not of one row of text, so gradients are computed user by user, which takes several times as long."""

    lora_init: Init = "kaiming"
    """How the first half of an adapter, A, is drawn; the second, B, starts as zero. kaiming and gaussian are PEFT's.
    orthonormal draws rows that are orthonormal and freezes them, so that B alone is trained: what changes in the
    weights then has the norm of what changes in B, times the scale, and noise on B is noise on the weights and no
    product of noises."""

    modules_to_save: tuple[str, ...] = ()
    """Modules beside the adapters that are trained in full and saved with them ("lm_head embed_tokens")."""

    trainable: tuple[str, ...] = ()
    """Without adapters, what is trained, while all else is frozen: parts of parameters' names ("bias" for BitFit,
    "layers.3 lm_head") or regular expressions that a whole name fits; empty or all trains every weight."""

    export: Exported = "adapters"
    """What a run with adapters leaves: the adapters, which need their base and PEFT, or a plain model in float32 with
    the adapters merged into it."""

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

    @property
    def reads_apart(self) -> bool:
        """Whether an encoder reads a row's prompt and a decoder writes its text."""
        return self.task == "seq2seq-lm"

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
        if self.lora_init not in get_args(Init):
            raise InvalidInput("model.lora-init", self.lora_init, "one of " + ", ".join(get_args(Init)))
        if self.export not in get_args(Exported):
            raise InvalidInput("model.export", self.export, "one of " + ", ".join(get_args(Exported)))
        if self.export == "merged" and self.quantise != "none":
            hint = "Adapters on a quantised base belong to that: merged into it they would be rounded away."
            raise InvalidInput("model.export", self.export, "adapters with model.quantise", hint)
        self._check_adapter_options()
        self._check_names()
        if self.base_dtype not in get_args(Dtype):
            raise InvalidInput("model.base-dtype", self.base_dtype, "one of " + ", ".join(get_args(Dtype)))
        if self.quantise not in get_args(Quantisation):
            raise InvalidInput("model.quantise", self.quantise, "one of " + ", ".join(get_args(Quantisation)))
        if self.path == DEFAULT_PATH or self.lora_rank:
            self.require_adapted(bool(self.lora_rank))

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by name or regular expression of layers, where they have their own."""
        return {name: int(rank) for name, rank in map(_assigned, self.rank_pattern)}

    @property
    def alphas(self) -> dict[str, float]:
        """Alphas by name or regular expression of layers, where they have their own."""
        return {name: float(alpha) for name, alpha in map(_assigned, self.alpha_pattern)}

    def _check_adapter_options(self) -> None:
        for name in ADAPTER_OPTIONS[2:]:
            value, shown = getattr(self, name), name.replace("_", "-")
            if value and not self.lora_rank:
                hint = "Set model.lora-rank to a number above 0, or leave it out: adapters that are there decided it."
                raise InvalidInput(f"model.{shown}", value, "left out when model.lora-rank is 0", hint)
        if self.use_dora and self.lora_init == "orthonormal":
            hint = "DoRA multiplies by a norm that is trained: what changes in the weights is not linear in B."
            raise InvalidInput("model.lora-init", self.lora_init, "kaiming or gaussian with --model.use-dora", hint)
        if self.use_dora and self.quantise != "none":
            hint = "Norms of quantised weights are not offered."
            raise InvalidInput("model.use-dora", True, "off with --model.quantise", hint)
        if self.trainable and self.lora_rank:
            hint = "Under adapters the base is frozen; name what is trained beside them in model.modules-to-save."
            raise InvalidInput("model.trainable", self.trainable, "left out with model.lora-rank", hint)
        for name, smallest, kind in (("rank_pattern", 1, int), ("alpha_pattern", 0, float)):
            for one in getattr(self, name):
                layer, value = _assigned(one)
                try:
                    good = bool(layer) and smallest <= kind(value) < float("inf") and kind(value) > 0
                except ValueError:
                    good = False
                if not good:
                    allowed = f"name={'rank, a whole number' if kind is int else 'alpha, a number'} above 0"
                    raise InvalidInput(f"model.{name.replace('_', '-')}", one, allowed)

    def _check_names(self) -> None:
        for name, whole in (("lora_targets", ALL_LINEAR), ("trainable", ALL)):
            given = getattr(self, name)
            if whole in given and len(given) > 1:
                raise InvalidInput(f"model.{name.replace('_', '-')}", given, f"{whole} by itself, or names")
        expressions = {
            "lora-targets": self.lora_targets,
            "trainable": self.trainable,
            "modules-to-save": self.modules_to_save,
            "rank-pattern": tuple(self.ranks),
            "alpha-pattern": tuple(self.alphas),
        }
        for name, given in expressions.items():
            for one in given:
                try:
                    re.compile(one)
                except re.error as error:
                    raise InvalidInput(f"model.{name}", one, f"names or regular expressions ({error})") from None
                if not one.strip():
                    raise InvalidInput(f"model.{name}", given, "names, none of them empty")

    def require_adapted(self, adapted: bool) -> None:
        """Refuse what there must be adapters for, and nothing trained beside them.

        Args:
            adapted: Whether the model has adapters: drawn anew, or read from `path`, which is known once it is opened.

        Raises:
            InvalidInput: The frozen base is to be rounded, and there is none or its head is trained.
        """
        for name in ("base_dtype", "quantise"):
            value, exact = getattr(self, name), getattr(ModelConfig, name)
            if value != exact and (not adapted or self.task == "sequence-classification"):
                allowed = f"{exact} without adapters (model.lora-rank), or when model.task is sequence-classification"
                hint = "Weights that are trained, a classifier's head among them, are float32."
                raise InvalidInput(f"model.{name.replace('_', '-')}", value, allowed, hint)
            if value != exact and self.modules_to_save:
                hint = "Modules that are trained in full are float32, and read what the base computes."
                raise InvalidInput(
                    f"model.{name.replace('_', '-')}", value, f"{exact} with model.modules-to-save", hint
                )
        for name in ("lora_init", "export"):
            value = getattr(self, name)
            if value != getattr(ModelConfig, name) and not adapted:
                hint = "Set model.lora-rank to a number above 0, or leave it out."
                allowed = "left out where there are no adapters"
                raise InvalidInput(f"model.{name.replace('_', '-')}", value, allowed, hint)
        if self.trainable and adapted:
            raise InvalidInput("model.trainable", self.trainable, "left out where model.path holds adapters")

    def reading(self, path: str) -> Self:
        """The same for what a run of this configuration exported: its adapters are there, and need not be drawn.

        Args:
            path: Folder of the export.
        """
        if self.export == "merged":
            return self.merged(path)
        return dataclasses.replace(self, path=path, **{name: getattr(ModelConfig, name) for name in ADAPTER_OPTIONS})

    def merged(self, path: str) -> Self:
        """The same for a plain model at `path`, in which this one's adapters are merged."""
        names = (*ADAPTER_OPTIONS, "lora_init", "export", "base_dtype", "quantise")
        return dataclasses.replace(self, path=path, **{name: getattr(ModelConfig, name) for name in names})


def is_expression(name: str) -> bool:
    """Whether what was given for a name is a regular expression."""
    return bool(EXPRESSION & set(name))


def _assigned(text: str) -> tuple[str, str]:
    name, _, value = text.rpartition("=")
    return name, value
