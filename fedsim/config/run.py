"""The configuration of a run: data, model, plan, optimizer, engine, evaluation, checkpoints, noise."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from fedsim.config.devices import require_shardable
from fedsim.config.engine import EngineConfig
from fedsim.config.evaluation import EvaluationConfig
from fedsim.config.owners import require_guarantee_for
from fedsim.config.plan import PlanConfig
from fedsim.config.worker_sums import require_independent_noise
from fedsim.data.config import DataConfig
from fedsim.errors import InvalidInput
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.plan import Plan, UserSizes
from fedsim.plan.bands import BandsForecast
from fedsim.privacy.earlier import Earlier
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.ledger import NOTHING
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.schedule import Schedule
from fedsim.validation import require_at_least, require_between, require_positive, require_probability

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Average = Literal["none", "exponential", "tail"]
AVERAGE_OPTIONS = {"exponential": "average_decay", "tail": "average_share"}
"""The option of the optimizer that an average has, by the average's name."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The server's optimizer, fed with the noised mean as if it were the gradient."""

    name: Literal["sgd", "momentum", "adam"] = "adam"
    """The update rule."""
    learning_rate: float = 1e-3
    """Peak learning rate. Where noise is correlated over rounds (--plan.bands), Adam's is multiplied by how much more
    noise a single release then carries, which Adam divides by: its steps keep their size."""
    schedule: Schedule = "constant"
    """How the learning rate falls to zero after the warm-up, over the rounds; constant does not fall."""
    warmup_rounds: int = 0
    """Rounds over which the learning rate rises linearly from zero."""
    momentum: float = 0.9
    """Momentum of the momentum rule."""
    average: Average = "none"
    """Measure and export an average of the weights after each round, which costs no privacy: exponential weighs newer
    ones more, tail is the mean over the last rounds. Training goes on from the weights themselves."""
    average_decay: float = 0.95
    """What a further round multiplies the weight of an older one by, in the exponential average."""
    average_share: float = 0.5
    """Share of the planned rounds, the last ones, that the tail's mean is over."""

    def __post_init__(self) -> None:
        require_positive("optimizer.learning-rate", self.learning_rate)
        require_at_least("optimizer.warmup-rounds", self.warmup_rounds, 0)
        require_between("optimizer.momentum", self.momentum, 0, 1)
        require_between("optimizer.average-decay", self.average_decay, 0, 1)
        require_probability("optimizer.average-share", self.average_share)
        for average, name in AVERAGE_OPTIONS.items():
            value = getattr(self, name)
            if self.average != average and value != getattr(OptimizerConfig, name):
                hint = f"It does nothing with --optimizer.average {self.average}; name {average}, or leave it out."
                allowed = f"{getattr(OptimizerConfig, name)} without --optimizer.average {average}"
                raise InvalidInput(f"optimizer.{name.replace('_', '-')}", value, allowed, hint)

    def averaging(self, average: Average) -> Self:
        """The same with another average; options of the one it had fall back to their defaults."""
        unused = {name: getattr(OptimizerConfig, name) for kind, name in AVERAGE_OPTIONS.items() if kind != average}
        return dataclasses.replace(self, average=average, **unused)

    def averaged_rounds(self, rounds: int) -> int:
        """How many of the run's rounds, the last ones, have a part in its average.

        Args:
            rounds: Planned rounds of the run.
        """
        shares = {"none": 0.0, "exponential": 1.0, "tail": self.average_share}
        return math.floor(shares[self.average] * rounds + 0.5)

    def workload(self, rounds: int) -> Workload:
        """What this optimizer makes of the releases of so many rounds: what noise is fitted to."""
        return Workload.of_optimizer(
            self.name,
            rounds,
            momentum=self.momentum,
            schedule=self.schedule,
            warmup_rounds=self.warmup_rounds,
        )


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
    """Draw new keys from the operating system for every release, the noise from a cryptographic generator, on a grid
    that floating-point rounding cannot see through, and store none of it. A round that a crash makes run again draws
    other users and other noise, and is charged again. Exact together with --engine.exact."""
    lost_releases: Literal["refuse", "restart"] = "refuse"
    """Noise that is correlated over rounds (--plan.bands) cannot be drawn anew for a lost round: a run that goes on
    repeats what it released, from a log beside its checkpoints. Where that log was lost too, refuse to go on, or
    restart: begin a new chain of noise at the last checkpoint, and charge the rounds that run again once more."""


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
    earlier_people: Literal["same", "others"] = "same"
    """Where --model.path is the result of an earlier run: whose data that was. Its charges are carried over, and ε is
    of the whole. others says that nobody of that data is in this data: they are noted and not counted, nothing checks
    it, and the statement says that it is your word."""
    release: bool = False
    """The model is to be released: refuse what would void its guarantee (given seeds, ε = inf, choosing between
    models by looking at private data), and keep metrics of private training users out of the results."""
    training_metrics: Literal["auto", "on", "off"] = "auto"
    """Write metrics computed from private training users without noise, marked as not private. auto writes them,
    except with --release."""
    trackers: tuple[Tracker, ...] = ()
    """Tell these of every round, too: each is an extra (pip install 'fedsim[wandb]'). With --release they hear of the
    run when it is done, and nothing that is not private."""
    callbacks: tuple[str, ...] = ()
    """Classes of your own, derived from fedsim.Callback and named module:Class, that are told of every round."""
    output: str | None = None
    """Folder for the results; by default a new one under runs/."""
    resume: str | None = None
    """Folder of an unfinished run to go on with, with its own settings."""

    CHOOSES: ClassVar[str] = ""
    """What a command chooses by looking at results on private data; that costs privacy which nothing accounts for."""

    def __post_init__(self) -> None:
        for name in ("output", "resume"):
            if getattr(self, name) == "":
                raise InvalidInput(name, "", "a folder's name")
        for name in ("sampling_seed", "noise_seed"):
            if (seed := getattr(self, name)) is not None:
                require_at_least(name.replace("_", "-"), seed, 0)
        if self.model.checkpointing and self.engine.compile == "on":
            hint = "A compiled pass keeps what layers read, which is what checkpointing saves."
            raise InvalidInput("engine.compile", self.engine.compile, "auto or off with --model.checkpointing", hint)
        if self.engine.devices_per_worker > 1:
            require_shardable(self.plan.local_steps, self.model.quantise)
        if self.engine.sums == "workers":
            plan = self.plan
            require_independent_noise(self.noise.secure, plan.wanted_bands, plan.buffers, plan.clip_quantile)
        if self.noise.secure and self.noise_seed is not None:
            raise InvalidInput("noise-seed", self.noise_seed, "unset with --noise.secure", "Secure noise has no seed.")
        if self.noise.secure and not MECHANISMS.named(self.plan.mechanism).secure:
            raise InvalidInput("noise.secure", True, f"off with --plan.mechanism {self.plan.mechanism}")
        if self.noise.secure and self.plan.buffers:
            hint = "Buffers are not applied in integers; bands are."
            raise InvalidInput("plan.buffers", self.plan.buffers, "0 with --noise.secure", hint)
        if (average := self.optimizer.average) != "none" and self.optimizer.averaged_rounds(self.plan.rounds) < 2:
            hint = "Over one it is the last weights: raise --plan.rounds or --optimizer.average-share."
            raise InvalidInput("optimizer.average", average, "an average over two rounds or more", hint)
        require_guarantee_for(self.data, Adjacency(self.plan.adjacency), self.CHOOSES)
        self.evaluation.require_possible(self.plan)
        for name in self.callbacks:
            if not all(name.partition(":")):
                raise InvalidInput("callbacks", name, "of the form module:Class")
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
        if self.data.regroup != "none":
            hint = "Users whose rows were dealt out anew are made up: ε would be of no person."
            raise InvalidInput("data.regroup", self.data.regroup, "none with --release", hint)
        if self.plan.noise_multiplier == 0:
            raise InvalidInput("plan.noise-multiplier", 0, "above 0 with --release")

    def plan_for(self, sizes: UserSizes, before: Event = NOTHING) -> Plan:
        """The plan of this run on users of these sizes, after what was released before; as `PlanConfig.for_users`."""
        return self.plan.for_users(sizes, self.optimizer.workload(self.plan.rounds), before)

    def bands_forecasts(self, sizes: UserSizes, before: Event = NOTHING) -> tuple[BandsForecast, ...]:
        """What bands of noise promise on users of these sizes, at this run's ε; nothing where none were asked for."""
        return self.plan.forecasts(self.plan.draft(sizes), self.optimizer.workload(self.plan.rounds), before)

    def optimizer_for(self, plan: Plan, sizes: UserSizes, before: Event = NOTHING) -> OptimizerConfig:
        """The optimizer of this run, at the learning rate that its steps keep their size with.

        Adam divides by the size of single releases, which correlated noise makes larger the more of it cancels in
        sums. Its learning rate is multiplied by as much; it stays where the noise multiplier was given, and so nothing
        was predicted.

        Args:
            plan: The run's plan.
            sizes: The users.
            before: What was released of them before.
        """
        if self.optimizer.name != "adam" or plan.bands == 1:
            return self.optimizer
        larger = [one.release_ratio for one in self.bands_forecasts(sizes, before) if one.bands == plan.bands]
        rate = self.optimizer.learning_rate * (larger[0] if larger else 1.0)
        return dataclasses.replace(self.optimizer, learning_rate=rate)

    def earlier_runs(
        self,
        *bases: str,
        marks: Mapping[str, str | None] | None = None,
        cached: bool = True,
        revision: str | None = None,
    ) -> Earlier:
        """The runs that this one goes on from, by the model that it begins with; none for any other model.

        Args:
            bases: What adapters in model.path stand on, by name or folder.
            marks: By name on the hub what each says at `fedsim.privacy.earlier.MARK`; of folders it is read.
            cached: Whether the hub does not answer.
            revision: Of the bases on the hub.

        Raises:
            InvalidInput: When their ledger is missing or damaged, when ε is spent already, or when other people are
                spoken of where there is no earlier run.
        """
        others, adjacency = self.earlier_people == "others", Adjacency(self.plan.adjacency)
        earlier = Earlier()
        for path in (self.model.path, *bases) if self.model.path != DEFAULT_PATH else ():
            begun = Earlier.of_model(
                path,
                adjacency=adjacency,
                others=others,
                mark=(marks or {}).get(path),
                cached=cached,
                revision=revision if path in bases else None,
            )
            earlier = earlier.upon(begun)
        if others and not earlier.entries:
            hint = "It says whose the data of an earlier run was."
            raise InvalidInput("earlier-people", "others", "left out where model.path is no result of a run", hint)
        earlier.require_room(self.plan.epsilon, self.plan.delta, adjacency)
        return earlier

    def private_evaluation(self, users: int, before: Event = NOTHING) -> PrivateEvaluation | None:
        """The private evaluations of this run; None where none are asked for; as `EvaluationConfig`'s.

        Args:
            users: Validation users in the data, a number that is treated as public.
            before: What was released of the same people before.
        """
        return self.evaluation.private_evaluation(users, self.plan, before)

    @property
    def writes_training_metrics(self) -> bool:
        """Whether metrics of private training users are written at all."""
        return not self.release if self.training_metrics == "auto" else self.training_metrics == "on"
