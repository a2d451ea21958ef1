"""The privacy statement: what a run guarantees, to whom, and what it does not."""

import decimal
import math
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, Self

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.events import Adjacency, Composed, Event, Repeated, to_json
from fedsim.privacy.ledger import merged
from fedsim.validation import require_at_least, require_between, require_positive, require_probability

Algorithm = Literal["uls", "els"]

ALWAYS_NOT_COVERED = (
    "Choosing hyper-parameters (learning rate, clip norm, group size and the like) by looking at results on private "
    "data costs privacy that is not counted here.",
    "Metrics of the run that were computed from private data without noise (training loss, cohort sizes, clipped "
    "fractions, evaluations on held-out users) are not private; the guarantee is for the released models.",
    "Users held out for validation and testing are not protected by the noise: their data only enters metrics.",
    "Text that the pre-trained model and its tokenizer were made from is outside the guarantee.",
    "A user is one identifier of the data set: a person with several, or a group of people, is protected less, and "
    "what other users wrote about somebody is protected as theirs.",
    "The machines that compute the updates and add the noise see private data and are trusted.",
)
"""What no run's guarantee covers."""

NoiseSource = Literal["statistical", "secure", "secure-exact"]
NOT_COVERED_BY_SOURCE: Mapping[NoiseSource, tuple[str, ...]] = {
    "statistical": (
        "Noise is drawn in floating point by a pseudo-random generator: attacks on rounding and on the generator are "
        "not excluded.",
    ),
    "secure": (
        "The noise comes from a cryptographic generator and lies on a grid, but sums are rounded in floating point "
        "before it is added: how far rounding can carry one user's influence beyond the clip norm is not counted.",
    ),
    "secure-exact": (
        "Updates are computed and clipped in floating point, and only then bounded exactly: time and memory that the "
        "computation takes are not hidden.",
    ),
}
"""What depends on how noise was drawn: floating point; on a grid from a cryptographic generator; the same added to
exact integer sums."""


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """What was released about each user, and how well it hides them. Made by PrivacyStatement.of.

    Attributes:
        algorithm: "uls" or "els".
        event: Everything that was charged, equal events merged.
        adjacency: The change of the data set that is hidden.
        group_size: Most examples of one user: in one round (uls) or in the whole run (els).
        clip_norm: L2 bound on one user's update (uls) or one example's gradient (els).
        sampling_probability: Of a user (uls) or an example (els), independently, in each step.
        noise_multiplier: Noise standard deviation over clip_norm; 0 means no guarantee.
        steps: Noised sums charged (made, for a run without a guarantee).
        delta: δ of the guarantee.
        epsilon: Certified bounds on ε at delta; both ∞ without a guarantee.
        not_covered: Sentences.
        versions: Of the software, by name.
        ledger: The ledger's file name, for the recompute command of a run with several kinds of release.
    """

    algorithm: Algorithm
    event: Composed
    adjacency: Adjacency
    group_size: int
    clip_norm: float
    sampling_probability: float
    noise_multiplier: float
    steps: int
    delta: float
    epsilon: Bounds
    not_covered: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    ledger: str = "ledger.jsonl"

    def __post_init__(self) -> None:
        # The type says so already; a guarantee is worth a second look.
        if not isinstance(self.epsilon, Bounds):
            raise TypeError(f"{self.epsilon!r} certifies nothing: a privacy statement needs Bounds")

    @classmethod
    def of(
        cls,
        event: Event,
        *,
        algorithm: Algorithm,
        group_size: int,
        clip_norm: float,
        sampling_probability: float,
        noise_multiplier: float,
        steps: int,
        delta: float,
        adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE_USER,
        public_sizes: Mapping[str, int] | None = None,
        seeds_given: tuple[str, ...] = (),
        also_not_covered: tuple[str, ...] = (),
        noise_source: NoiseSource = "statistical",
        versions: Mapping[str, str] | None = None,
        ledger: str = "ledger.jsonl",
    ) -> Self:
        """The statement of a run.

        Args:
            event: What the ledger holds (Ledger.event()); ε is computed from it and from nothing else.
            algorithm: "uls" or "els".
            group_size: Most examples of one user, at least 1.
            clip_norm: L2 bound on one clipped unit, above 0.
            sampling_probability: Of a user (uls) or an example (els) in each step.
            noise_multiplier: Noise standard deviation over clip_norm; 0 for a run without a guarantee.
            steps: Noised sums that left the server.
            delta: δ at which ε is stated.
            adjacency: The change of the data set that is hidden.
            public_sizes: Sizes that were treated as public, by name ("users in the training split": 3931).
            seeds_given: Seeds that the configuration fixes ("noise", "sampling").
            also_not_covered: Further sentences about this run.
            noise_source: How the noise was drawn, a key of NOT_COVERED_BY_SOURCE.
            versions: Of the software; fedsim's, Python's, numpy's and scipy's by default.
            ledger: The ledger's file, for the recompute command of a run with several kinds of release.

        Raises:
            InvalidInput: For a value out of range, or fewer charges than steps: then something left uncharged, and
                nothing can be stated.
        """
        require_at_least("group_size", group_size, 1)
        require_positive("clip_norm", clip_norm)
        require_probability("sampling_probability", sampling_probability)
        require_at_least("noise_multiplier", noise_multiplier, 0)
        require_at_least("steps", steps, 0)
        require_between("delta", delta, 0, 1)
        charged = merged((event,))
        unprotected = noise_multiplier == 0 and steps > 0
        if not unprotected:
            charges = sum(_count(part) for part in charged.events)
            if charges < steps:
                raise InvalidInput("steps", steps, f"at most the {charges} charges of the ledger")
            steps = charges
        nothing = Bounds(lower=math.inf, upper=math.inf)
        return cls(
            algorithm=algorithm,
            event=charged,
            adjacency=adjacency,
            group_size=int(group_size),
            clip_norm=float(clip_norm),
            sampling_probability=float(sampling_probability),
            noise_multiplier=float(noise_multiplier),
            steps=int(steps),
            delta=float(delta),
            epsilon=nothing if unprotected else epsilon_bounds(charged, delta, adjacency=adjacency),
            not_covered=(
                *_of_this_run(public_sizes or {}, seeds_given),
                *also_not_covered,
                *ALWAYS_NOT_COVERED,
                *NOT_COVERED_BY_SOURCE[noise_source],
            ),
            versions=dict(software_versions() if versions is None else versions),
            ledger=ledger,
        )

    @property
    def private(self) -> bool:
        """Whether there is a guarantee at all."""
        return math.isfinite(self.epsilon.upper)

    @property
    def unit(self) -> str:
        """Whose presence is hidden."""
        return "user"

    @property
    def sampling(self) -> str:
        """How units join a step, in words."""
        if self.sampling_probability == 1:
            return (
                "every user takes part in every step" if self.algorithm == "uls" else "every example is in every step"
            )
        unit = "user" if self.algorithm == "uls" else "kept example"
        return (
            f"each {unit} joins a step independently with probability {self.sampling_probability:g} (Poisson sampling)"
        )

    @property
    def contribution_bound(self) -> str:
        """What one user can contribute at most, in words."""
        norm = f"L2 norm {self.clip_norm:g}"
        if self.algorithm == "uls":
            return f"at most {self.group_size} of a user's examples a step; their one update is clipped to {norm}"
        return f"at most {self.group_size} of a user's examples in the whole run; each gradient is clipped to {norm}"

    @property
    def mechanism(self) -> str:
        """What is added to the sum, in words."""
        if self.noise_multiplier == 0:
            return "no noise is added"
        std = self.noise_multiplier * self.clip_norm
        return f"Gaussian noise of standard deviation {std:g} is added to each coordinate of the sum"

    @property
    def recompute(self) -> str | None:
        """A command that prints ε again; None without a guarantee.

        It names the parameters when all releases were alike, and the ledger when they were not.
        """
        if not self.private:
            return None
        options: dict[str, str] = {"algorithm": self.algorithm, "group-size": str(self.group_size)}
        if not self._uniform:
            options = {"ledger": shlex.quote(self.ledger)}
        else:
            options |= {
                "sampling-probability": repr(self.sampling_probability),
                "noise-multiplier": repr(self.noise_multiplier),
                "steps": str(self.steps),
            }
        options |= {"delta": repr(self.delta), "adjacency": self.adjacency.value}
        flags = " ".join(f"--{name} {value}" for name, value in options.items())
        return f"python -m experiments.run account {flags} --json"

    @property
    def _uniform(self) -> bool:
        """Whether the parameters above describe all that was charged."""
        return len(self.event.events) <= 1 and not any(_differs(part, self) for part in self.event.events)

    def in_words(self) -> str:
        """One paragraph for people."""
        neighbours = {
            Adjacency.ADD_OR_REMOVE_ONE_USER: "adding or removing one user with all of their examples",
            Adjacency.REPLACE_ONE_USER: "replacing one user and all of their examples by another",
        }[self.adjacency]
        how = (
            f"{self.algorithm.upper()}: {self.sampling}; {self.contribution_bound}; {self.mechanism} "
            f"(noise multiplier {self.noise_multiplier:g}); {self.steps} steps."
        )
        if not self.private:
            return (
                "This run gives NO privacy guarantee: ε is infinite. Whoever holds its models may be able to recover "
                f"what single users wrote; do not release them. {how}"
            )
        if not self._uniform:
            how += " Releases of other kinds were charged as well: the ledger lists them, and ε counts them all."
        upper, lower = shown_above(self.epsilon.upper), shown_below(self.epsilon.lower)
        return (
            f"The released models are user-level differentially private with ε = {upper}, δ = {self.delta:g}: "
            f"{neighbours} changes the probability of any outcome by a factor of at most e^ε, up to δ. The ε is a "
            f"certified upper bound; the exact value for this mechanism is at least {lower}. {how} What this does not "
            f"cover: {' '.join(self.not_covered)}"
        )

    def to_json(self) -> dict[str, Any]:
        """The statement as JSON values, for privacy.json. Without a guarantee ε is null and "private" false."""
        bounds = {"upper": self.epsilon.upper, "lower": self.epsilon.lower}
        return {
            "in_words": self.in_words(),
            "private": self.private,
            "unit": self.unit,
            "adjacency": self.adjacency.value,
            "epsilon": bounds if self.private else {"upper": None, "lower": None},
            "delta": self.delta,
            "algorithm": self.algorithm,
            "sampling": {"in_words": self.sampling, "probability": self.sampling_probability},
            "contribution_bound": {
                "in_words": self.contribution_bound,
                "group_size": self.group_size,
                "clip_norm": self.clip_norm,
            },
            "mechanism": self.mechanism,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "not_covered": list(self.not_covered),
            "versions": dict(self.versions),
            "recompute": self.recompute,
            "event": to_json(self.event),
        }


def software_versions() -> dict[str, str]:
    """Versions of what the accountant runs on."""
    packages = {name: _version(name) for name in ("fedsim", "numpy", "scipy")}
    return {"python": platform.python_version(), **packages}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _of_this_run(public_sizes: Mapping[str, int], seeds_given: tuple[str, ...]) -> list[str]:
    sentences = [
        f"The number of {name} ({count}) is treated as public: the sampling probability and the constant that "
        "sums are divided by follow from it."
        for name, count in public_sizes.items()
    ]
    if "noise" in seeds_given:
        sentences.insert(
            0,
            "Reproducible noise: for experiments, not for release. The noise seed was fixed in the configuration, and "
            "whoever knows it can subtract the noise, so these models must not be released.",
        )
    if "sampling" in seeds_given:
        sentences.append(
            "The sampling seed was fixed in the configuration: from whoever knows it the sampling hides nobody, and ε "
            "is larger."
        )
    return sentences


def _count(event: Event) -> int:
    return event.count if isinstance(event, Repeated) else 1


def _differs(part: Event, statement: PrivacyStatement) -> bool:
    """Whether a part of the ledger is not what the parameters of the statement describe."""
    event = part.event if isinstance(part, Repeated) else part
    expected: dict[str, Any] = {
        "kind": "poisson-subsampled-gaussian" if statement.algorithm == "uls" else "binomial-mixture-gaussian",
        "sampling_probability": statement.sampling_probability,
        "noise_multiplier": statement.noise_multiplier,
    }
    if statement.algorithm == "els":
        expected["group_size"] = statement.group_size
    return to_json(event) != expected


def shown_above(value: float) -> str:
    """value with four significant digits, rounded up: what is shown is still an upper bound."""
    return _shown(value, decimal.ROUND_CEILING)


def shown_below(value: float) -> str:
    """value with four significant digits, rounded down: what is shown is still a lower bound."""
    return _shown(value, decimal.ROUND_FLOOR)


def _shown(value: float, rounding: str) -> str:
    if math.isinf(value):
        return "∞"
    exact = decimal.Decimal(value)
    return f"{exact.quantize(decimal.Decimal(1).scaleb(exact.adjusted() - 3), rounding=rounding).normalize():f}"
