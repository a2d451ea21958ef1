"""The typed configuration of a run, its checks, and its flat form for Flower's run_config."""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedsim.data.config import DataConfig
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.validation import require_at_least, require_between, require_positive

DEFAULT_GROUP_SIZES = {"uls": 1, "els": 4}
"""ULS: one example of each user, so that the cohort is as large as the compute allows. ELS: few, so that the
accountant charges little for them, and enough that most of the data is used. The planner compares others."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is computed each round and what is guaranteed for it."""

    algorithm: Literal["uls", "els"] = "uls"
    """uls samples users and clips each user's update; els samples examples and clips each example's gradient."""
    epsilon: float = 8.0
    """User-level ε of the whole run: an upper bound. inf trains without privacy and needs
    --plan.allow-no-privacy."""
    delta: float = 1e-5
    """User-level δ; below one over the number of users."""
    noise_multiplier: float | None = None
    """Noise standard deviation over the clip norm. By default calibrated to ε and δ; the run stops before ε is
    passed in any case."""
    gradients_per_round: int = 256
    """Expected gradient evaluations a round: users × group size (uls) or examples (els)."""
    group_size: int | None = None
    """Examples of one user: at most so many each time the user takes part (uls, by default 1), or in the whole run
    (els, by default 4). The `plan` command says what suits a data set."""
    rounds: int = 16
    """Rounds (uls) or steps (els)."""
    clip_norm: float = 1.0
    """L2 bound on one user's update (uls) or one example's gradient (els)."""
    adjacency: Literal["add-or-remove-one-user", "replace-one-user"] = "add-or-remove-one-user"
    """The change of the data set that must stay hidden."""
    weighting: Literal["examples", "tokens"] = "examples"
    """A user's gradient is the mean over its examples, or over its tokens."""
    selection: Literal["random", "longest", "first", "chunk"] = "random"
    """Which of a user's examples are taken when there are more than the group size."""
    local_steps: int = 1
    """Local SGD steps a user takes before its update is clipped (uls); more than one makes this DP-FedAvg."""
    local_learning_rate: float = 0.1
    """Learning rate of the local steps, where there are several."""
    mechanism: Literal["gaussian", "adaptive-noise", "layer-noise", "matrix-noise", "randomised-laplace"] = "gaussian"
    """The noise. gaussian: the same on every parameter. adaptive-noise: allocated by importance seen in earlier
    releases. layer-noise, matrix-noise: the same total on every layer or matrix. randomised-laplace: on sums clipped
    in L1, so that the clip norm means another norm. See docs/mechanisms.md for what each is worth."""
    noise_file: str | None = None
    """Law of the inverse scale for randomised-laplace, found by `search-noise`; by default plain Laplace noise."""
    clip_quantile: float = 0.0
    """Let the clip norm follow the norm that this share of the units do not exceed, by a noised count that the plan
    accounts for; 0 keeps the clip norm."""
    clip_count_std: float | None = None
    """Noise on that count, in units; by default a twentieth of the expected units, and at least the noise
    multiplier."""
    clip_learning_rate: float = 0.2
    """How fast the clip norm follows: the largest relative change in a round is about this."""
    allow_no_privacy: bool = False
    """Allow ε = inf or a noise multiplier of 0: for debugging and for the non-private end of a comparison."""

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise InvalidInput("plan.epsilon", self.epsilon, "a number above 0")
        if math.isinf(self.epsilon) and not self.allow_no_privacy:
            raise InvalidInput(
                "plan.epsilon", self.epsilon, "finite", "Add --plan.allow-no-privacy to train without a guarantee."
            )
        require_between("plan.delta", self.delta, 0, 1)
        require_positive("plan.clip-norm", self.clip_norm)
        require_positive("plan.local-learning-rate", self.local_learning_rate)
        require_positive("plan.clip-learning-rate", self.clip_learning_rate)
        if self.clip_quantile:
            require_between("plan.clip-quantile", self.clip_quantile, 0, 1)
        if self.clip_quantile and self.mechanism == "randomised-laplace":
            raise InvalidInput("plan.clip-quantile", self.clip_quantile, "0 with randomised-laplace")
        if self.clip_count_std is not None:
            require_positive("plan.clip-count-std", self.clip_count_std)
        if self.noise_file is not None and self.mechanism != "randomised-laplace":
            raise InvalidInput("plan.noise-file", self.noise_file, "unset, unless the mechanism is randomised-laplace")
        for name in ("gradients_per_round", "rounds", "local_steps"):
            require_at_least(f"plan.{name.replace('_', '-')}", getattr(self, name), 1)
        require_at_least("plan.group-size", self.examples_per_user, 1)
        if self.noise_multiplier is not None:
            require_at_least("plan.noise-multiplier", self.noise_multiplier, 0)
            if self.noise_multiplier == 0 and not self.allow_no_privacy:
                raise InvalidInput(
                    "plan.noise-multiplier", 0, "above 0", "Add --plan.allow-no-privacy to train without a guarantee."
                )
        if self.algorithm == "els" and self.local_steps > 1:
            raise InvalidInput(
                "plan.local-steps", self.local_steps, "1 for els", "Local steps belong to users: use uls."
            )

    @property
    def examples_per_user(self) -> int:
        """The group size, with the algorithm's default where none is given."""
        return DEFAULT_GROUP_SIZES[self.algorithm] if self.group_size is None else self.group_size


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The server's optimizer, fed with the noised mean as if it were the gradient."""

    name: Literal["sgd", "momentum", "adam"] = "adam"
    """The update rule."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero after the warm-up, over the rounds; constant does not fall."""
    warmup_rounds: int = 0
    """Rounds over which the learning rate rises linearly from zero."""
    momentum: float = 0.9
    """Momentum of the momentum rule."""

    def __post_init__(self) -> None:
        require_positive("optimizer.learning-rate", self.learning_rate)
        require_at_least("optimizer.warmup-rounds", self.warmup_rounds, 0)
        require_between("optimizer.momentum", self.momentum, 0, 1)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where the clients run."""

    kind: Literal["ray", "local"] = "ray"
    """ray runs clients on Ray actors; local runs them in this process (debugging)."""
    workers: int = 2
    """Actors (ray) or virtual nodes (local); 0 finds the number of actors, and max_tokens where that is 0, by a short
    measured trial."""
    cpus_per_worker: int = 1
    """CPU cores of one actor; also its number of threads."""
    gpus_per_worker: float = 0.0
    """Share of a GPU for one actor: 0.25 places four actors on each GPU."""
    users_per_message: int = 0
    """Users a message stands for; 0 sends one message a worker, 1 is the literal one-client-one-message mode."""
    address: str | None = None
    """Address of a running Ray cluster to join; by default Ray is started on this machine."""
    timeout_seconds: float = 600.0
    """A worker that has not answered after so long is given up and its users are computed elsewhere."""
    max_tokens: int = 0
    """Tokens of one micro-batch; 0 chooses from the device."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the model in mixed precision on a GPU; norms and sums stay float32."""
    exact: bool = False
    """Sum clipped updates as fixed-point integers: the same bits for any number of workers, at the cost of one
    gradient a user at a time."""

    def __post_init__(self) -> None:
        require_at_least("engine.workers", self.workers, 0)
        require_at_least("engine.cpus-per-worker", self.cpus_per_worker, 1)
        require_at_least("engine.gpus-per-worker", self.gpus_per_worker, 0)
        require_at_least("engine.users-per-message", self.users_per_message, 0)
        require_at_least("engine.max-tokens", self.max_tokens, 0)
        require_positive("engine.timeout-seconds", self.timeout_seconds)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the model is measured on held-out users."""

    every: int = 4
    """Rounds between evaluations on validation users; the first and last model are always evaluated."""
    max_rows: int = 500
    """Most rows of an evaluation while training (whole users, drawn once)."""
    test_rows: int = 2000
    """Most rows of the final evaluation on test users."""

    def __post_init__(self) -> None:
        for name in ("every", "max_rows", "test_rows"):
            require_at_least(f"evaluation.{name.replace('_', '-')}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run that may be killed writes down its state."""

    rounds: int = 10
    """Write a checkpoint after every so many rounds; 0 for never."""
    minutes: float = 10.0
    """Write one when so many minutes have passed since the last; 0 for never."""
    keep: int = 2
    """Checkpoints to keep: more than one, so that a damaged one does not lose the run."""

    def __post_init__(self) -> None:
        require_at_least("checkpoint.rounds", self.rounds, 0)
        require_at_least("checkpoint.minutes", self.minutes, 0)
        require_at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How the noise is drawn."""

    secure: bool = False
    """Draw a new key from the operating system for every release, the noise from a cryptographic generator, on a grid
    that floating-point rounding cannot see through, and store none of it. A round that a crash makes run again draws
    other users and other noise, and is charged again. Exact together with --engine.exact."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    gradients: Literal["fast", "reference"] = "fast"
    """fast clips many users in one pass; reference loops over them with plain autograd."""
    sampling_seed: int | None = None
    """Seed of the sampling of users and examples; by default drawn from the operating system."""
    noise_seed: int | None = None
    """Seed of the noise, for experiments that must repeat. A model trained with a known noise seed must not be
    released: whoever knows the seed can subtract the noise."""
    release: bool = False
    """The model is to be released: refuse what would void its guarantee (given seeds, ε = inf, choosing between
    models by looking at private data), and keep metrics of private training users out of the results."""
    training_metrics: Literal["auto", "on", "off"] = "auto"
    """Write metrics computed from private training users without noise, marked as not private. auto writes them,
    except with --release."""
    output: str | None = None
    """Folder for the results; by default a new one under runs/."""
    resume: str | None = None
    """Folder of an unfinished run to go on with, with its own settings."""

    CHOOSES: ClassVar[str] = ""
    """What a command chooses by looking at results on private data; that costs privacy which nothing accounts for."""

    def __post_init__(self) -> None:
        if self.noise.secure and self.noise_seed is not None:
            raise InvalidInput("noise-seed", self.noise_seed, "unset with --noise.secure", "Secure noise has no seed.")
        if self.noise.secure and self.plan.mechanism == "randomised-laplace":
            raise InvalidInput("noise.secure", True, "off with --plan.mechanism randomised-laplace")
        if self.release:
            self._require_releasable()

    def _require_releasable(self) -> None:
        why = "Whoever knows it can undo what it decides; leave it out and it is drawn from the operating system."
        for name in ("noise_seed", "sampling_seed"):
            if getattr(self, name) is not None:
                raise InvalidInput(name.replace("_", "-"), getattr(self, name), "unset with --release", why)
        if self.CHOOSES:
            hint = f"It chooses {self.CHOOSES} by results on private data, which costs privacy that is not counted."
            raise InvalidInput("release", True, "given to train alone", f"{hint} Choose on public data, then train.")
        if math.isinf(self.plan.epsilon):
            raise InvalidInput("plan.epsilon", self.plan.epsilon, "finite with --release")
        if self.plan.noise_multiplier == 0:
            raise InvalidInput("plan.noise-multiplier", 0, "above 0 with --release")

    @property
    def writes_training_metrics(self) -> bool:
        """Whether metrics of private training users are written at all."""
        return not self.release if self.training_metrics == "auto" else self.training_metrics == "on"


def to_flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The configuration as Flower's run_config: dotted names to scalars; unset fields are left out."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{prefix}{item.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            flat |= to_flat(value, name + ".")
        elif isinstance(value, (list, tuple)):
            flat[name] = json.dumps(list(value))
        elif value is not None:
            flat[name] = str(value) if isinstance(value, Path) else value
    return flat


def from_flat(kind: type, flat: typing.Mapping[str, Any]) -> Any:
    """The configuration that to_flat described; fields not named keep their defaults.

    Raises:
        InvalidInput: For a name that is no field, or a value of the wrong type.
    """
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.replace("-", "_").split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InvalidInput(name, value, "a field of the configuration", f"{parent} has no parts.")
        place[leaf] = value
    return from_nested(kind, nested)


def from_nested(kind: type, nested: typing.Mapping[str, Any], prefix: str = "") -> Any:
    """A configuration dataclass from nested mappings (a preset file, a stored config.json).

    Raises:
        InvalidInput: For a name that is no field, or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in nested.items():
        key = name.replace("-", "_")
        shown = prefix + name.replace("_", "-")
        if key not in hints:
            known = ", ".join(sorted(hint.replace("_", "-") for hint in hints))
            raise InvalidInput(shown, value, f"one of the fields {known}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, typing.Mapping):
                raise InvalidInput(shown, value, "a group of fields")
            values[key] = from_nested(hints[key], value, shown + ".")
        else:
            values[key] = _typed(shown, value, hints[key])
    return kind(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """value as the field's type, refusing what would need guessing."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise InvalidInput(name, value, "one of " + ", ".join(map(str, options)))
        return value
    if origin in (typing.Union, types.UnionType):
        # Flower's run_config has no null: an empty string leaves an optional field unset.
        if value in (None, "") and type(None) in options:
            return None
        return _typed(name, value, next(option for option in options if option is not type(None)))
    if origin in (tuple, list):
        try:
            items = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            items = None
        if not isinstance(items, (list, tuple)):
            raise InvalidInput(name, value, "a list, as JSON")
        return tuple(_typed(name, item, options[0]) for item in items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise InvalidInput(name, value, "a number") from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InvalidInput(name, value, f"of type {hint.__name__}")
    return value
