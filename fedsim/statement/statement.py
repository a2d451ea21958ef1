"""The privacy statement: what a run guarantees, to whom, and what it does not.

Every word about what was done comes from the objects that did it: the plan, its sampling, mechanism and clip rule;
every number about privacy from the ledger.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.plan import Plan
from fedsim.privacy.accountant import epsilon_bounds, flatten, is_tight
from fedsim.privacy.bounds import Bounds, shown_above, shown_below
from fedsim.privacy.earlier import Earlier
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    OneOf,
    RandomAllocatedGaussian,
    Repeated,
    modules_of,
    to_json,
)
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.ledger import merged
from fedsim.privacy.mechanisms import MECHANISMS, Noise, Sizes
from fedsim.privacy.splits import HELD_OUT, SPLITS, TRAINING, of_split
from fedsim.privacy.unprotected import Unprotected
from fedsim.sampling import SAMPLINGS
from fedsim.statement.earlier_words import earlier_json, whole_in_words, whose_models
from fedsim.statement.not_covered import CLASSES_FROM_DATA, MADE_UP_USERS, NoiseOrigin, not_covered_by
from fedsim.statement.splits_words import VALIDATION_USERS, evaluation_json, splits_in_words
from fedsim.validation import require_at_least

NEIGHBOURS = {
    Adjacency.ADD_OR_REMOVE_ONE_USER: "adding or removing one user with all of their examples",
    Adjacency.FIXED_GRAPH: "emptying all examples that one user owns, alone or with others, while it stays as it is "
    "which examples there are and who owns each,",
    Adjacency.REPLACE_ONE_USER: "replacing one user and all of their examples by another",
}


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """What was released about each user, and how well it hides them. Made by privacy_statement.

    Attributes:
        plan: What was done.
        sizes: Values of each trainable parameter by name.
        event: Everything that was charged, by this run and what it went on from, equal events merged.
        own: What this run itself was charged.
        steps: Noised sums charged to it (made, for a run without a guarantee).
        epsilon: Certified bounds on ε at the plan's δ; both ∞ without a guarantee.
        not_covered: Sentences.
        versions: Of the software, by name.
        ledger: The ledger's file name, for the recompute command of a run that no options describe.
        post_processing: What was made of the released values before they were exported, sentences.
        earlier: The runs that it went on from.
        evaluation: Its private evaluations; None where nothing was released of held-out users.
    """

    plan: Plan
    sizes: Sizes
    event: Composed
    own: Composed
    steps: int
    epsilon: Bounds
    not_covered: tuple[str, ...]
    versions: Mapping[str, str]
    ledger: str
    post_processing: tuple[str, ...] = ()
    earlier: Earlier = field(default_factory=Earlier)
    evaluation: PrivateEvaluation | None = None

    def __post_init__(self) -> None:
        # The type says so already; a guarantee is worth a second look.
        if not isinstance(self.epsilon, Bounds):
            raise TypeError(f"{self.epsilon!r} certifies nothing: a privacy statement needs Bounds")

    @property
    def private(self) -> bool:
        """Whether there is a guarantee at all."""
        return math.isfinite(self.epsilon.upper)

    @property
    def contribution_bound(self) -> str:
        """What one user can contribute at most, in words."""
        moves = "" if self.plan.clip_rule is None else " (the clip norm of the first step)"
        return f"{self.plan.contribution_in_words} {self._noise.clip_in_words(self._clip)}{moves}"

    @property
    def mechanism(self) -> str:
        """What is added to the sum, in words, and what else is released."""
        words = self._noise.in_words(self._clip)
        rule = self.plan.clip_rule
        if (correlation := self.plan.correlation) is not None and self.plan.noise_multiplier > 0:
            words += correlation.in_words()
        if rule is None:
            return words
        moves = rule.in_words(self.plan.clip_norm, private=self.plan.noise_multiplier > 0)
        return f"in the first step {words}; {moves}"

    @property
    def recompute(self) -> str | None:
        """A command that prints ε again; None without a guarantee.

        It names the parameters when all releases were alike and `account` knows their kind, and else the ledger.
        """
        if not self.private:
            return None
        planned = self._as_planned and flatten(self.event) == flatten(self.plan.event(self.steps))
        options = _account_options(self.plan) if planned else None
        if options is None:
            options = {"ledger": shlex.quote(self.ledger)}
            if modules := modules_of(self.event):
                options |= {"modules": " ".join(modules)}
        else:
            options |= {"steps": str(self.steps)}
        options |= {"delta": repr(self.plan.delta), "adjacency": self.plan.adjacency.value}
        flags = " ".join(f"--{name} {value}" for name, value in options.items())
        return f"python -m experiments.run account {flags} --json"

    @property
    def check(self) -> str | None:
        """A command that confirms ε by a second method, in the run's folder; None without a guarantee."""
        modules = " ".join(["", "--modules", *found]) if (found := modules_of(self.event)) else ""
        return f"python -m experiments.run account --check .{modules}" if self.private else None

    def in_words(self) -> str:
        """One paragraph for people."""
        plan = self.plan
        how = (
            f"{plan.title}: {plan.sampling_in_words}; {self.contribution_bound}; {self.mechanism} "
            f"(noise multiplier {plan.noise_multiplier:g}); {self.steps} steps."
        )
        made = "".join(f" {sentence}" for sentence in self.post_processing)
        if not self.private:
            since = " The model that it went on from was trained without a guarantee." * (self._earlier_unprotected)
            return (
                "This run gives NO privacy guarantee: ε is infinite. Whoever holds its models may be able to recover "
                f"what single users wrote; do not release them.{since} {how}{made}"
            )
        split = "" if self.evaluation is None else splits_in_words(self.evaluation, self._evaluations, self.of_splits)
        if not self._as_planned:
            how += " Releases of other kinds were charged as well: the ledger lists them, and ε counts them all."
        before = whole_in_words(self.earlier, self.own, plan.delta, plan.adjacency)
        upper, lower = shown_above(self.epsilon.upper), shown_below(self.epsilon.lower)
        tight = is_tight(self.event) and not self.plan.noise_buffers
        exact = f"the exact value for this mechanism is{'' if tight else ', as far as it is accounted for here,'}"
        return (
            f"{whose_models(self.earlier)} user-level differentially private with ε = {upper}, δ = {plan.delta:g}"
            f": {NEIGHBOURS[plan.adjacency]} changes the probability of any outcome by a factor of at most e^ε, up to "
            f"δ. The ε is a certified upper bound; {exact} at least {lower}.{split} {how}{made}"
            f"{before} What this does not cover: {' '.join(self.not_covered)}"
        )

    def to_json(self) -> dict[str, Any]:
        """The statement as JSON values, for privacy.json. Without a guarantee ε is null and "private" false."""
        plan, clip = self.plan, self._clip
        bounds = {"upper": self.epsilon.upper, "lower": self.epsilon.lower}
        return {
            "in_words": self.in_words(),
            "private": self.private,
            "unit": "user",
            "adjacency": plan.adjacency.value,
            "epsilon": bounds if self.private else {"upper": None, "lower": None},
            "delta": plan.delta,
            "algorithm": plan.name,
            "sampling": {
                "in_words": plan.sampling_in_words,
                "scheme": SAMPLINGS.name_of(type(plan.sampling)),
                "probability": plan.normaliser / plan.population,
            },
            "contribution_bound": {
                "in_words": self.contribution_bound,
                "group_size": plan.group_size,
                "clip_norm": plan.clip_norm,
                "norm_order": clip.order,
            },
            "mechanism": self.mechanism,
            "mechanism_name": MECHANISMS.name_of(type(plan.mechanism)),
            "noise_multiplier": plan.noise_multiplier,
            "noise_coefficients": list(plan.noise_coefficients),
            "noise_buffers": [list(pair) for pair in plan.noise_buffers],
            "steps": self.steps,
            "post_processing": list(self.post_processing),
            "not_covered": list(self.not_covered),
            "versions": dict(self.versions),
            "recompute": self.recompute,
            "check": self.check,
            "public_sizes": plan.public_sizes | self._held_out_sizes,
            **self._private_evaluation,
            "earlier": earlier_json(self.earlier),
            "event": to_json(self.event),
        }

    @cached_property
    def of_splits(self) -> dict[str, Bounds]:
        """Certified bounds on ε of users of each split, earlier runs included."""
        return {
            split: epsilon_bounds(
                Composed(events=(self.earlier.event, of_split(self.own, split))),
                self.plan.delta,
                adjacency=self.plan.adjacency,
            )
            for split in SPLITS
        }

    @property
    def _evaluations(self) -> int:
        return _count(of_split(self.own, HELD_OUT))[0]

    @property
    def _held_out_sizes(self) -> dict[str, int]:
        return {} if self.evaluation is None else {VALIDATION_USERS: self.evaluation.population}

    @property
    def _private_evaluation(self) -> dict[str, Any]:
        if self.evaluation is None:
            return {}
        return {"private_evaluation": evaluation_json(self.evaluation, self._evaluations, self.of_splits)}

    @cached_property
    def _noise(self) -> Noise:
        event = self.plan.step_event() if self.plan.noise_multiplier > 0 else None
        return self.plan.mechanism.noise(event, self.plan.sum_noise_multiplier, self.sizes)

    @cached_property
    def _clip(self) -> Clip:
        return self._noise.clip(self.plan.clip_norm)

    @property
    def _as_planned(self) -> bool:
        """Whether all that was charged are the plan's own steps."""
        return all(event == self.plan.step_event() for event in flatten(of_split(self.own, TRAINING)))

    @property
    def _earlier_unprotected(self) -> bool:
        return self.plan.noise_multiplier > 0 and Unprotected() in flatten(self.earlier.event)


def privacy_statement(
    plan: Plan,
    charged: Event,
    *,
    sizes: Sizes,
    steps: int,
    seeds_given: tuple[str, ...] = (),
    noise_origin: NoiseOrigin = "statistical",
    versions: Mapping[str, str],
    ledger: str = "ledger.jsonl",
    post_processing: tuple[str, ...] = (),
    earlier: Earlier | None = None,
    classes_from_data: bool = False,
    made_up_users: bool = False,
    evaluation: PrivateEvaluation | None = None,
) -> PrivacyStatement:
    """The statement of a run.

    Args:
        plan: What was done.
        charged: What the ledger holds of this run (own_event of its entries); ε is computed from it and from what the
            ledger holds of earlier runs, and from nothing else.
        sizes: Values of each trainable parameter by name, in the order of the flat vector.
        steps: Noised sums that left the server.
        seeds_given: Seeds that the configuration fixes ("noise", "sampling").
        noise_origin: How the noise was drawn, a key of NOT_COVERED_BY_ORIGIN.
        versions: Of the software.
        ledger: The ledger's file, for the recompute command.
        post_processing: What was made of the released values before they were exported, in sentences of the objects
            that did it. It costs nothing: ε does not follow from it.
        earlier: The runs that it went on from, as its ledger begins with them.
        classes_from_data: Whether a classifier's classes were read from the data.
        made_up_users: Whether the users' rows were dealt out anew.
        evaluation: The run's private evaluations; None where nothing was released of held-out users.

    Raises:
        InvalidInput: For fewer charges than steps: then something left uncharged, and nothing can be stated.
    """
    require_at_least("steps", steps, 0)
    earlier = Earlier() if earlier is None else earlier
    own, parts = merged((charged,)), merged((earlier.event, charged))
    unprotected = plan.noise_multiplier == 0 and steps > 0
    single, of_blocks = _count(of_split(own, TRAINING))
    if not unprotected and single + of_blocks < steps:
        raise InvalidInput("steps", steps, f"at most the {single + of_blocks} that the ledger's charges cover")
    nothing = Bounds(lower=math.inf, upper=math.inf)
    return PrivacyStatement(
        plan=plan,
        sizes=sizes,
        event=parts,
        own=own,
        steps=steps if unprotected else single + min(of_blocks, steps),
        epsilon=nothing if unprotected else epsilon_bounds(parts, plan.delta, adjacency=plan.adjacency),
        not_covered=not_covered_by(
            plan,
            noise_origin,
            seeds_given,
            (
                *plan.assumptions,
                *(CLASSES_FROM_DATA,) * classes_from_data,
                *(MADE_UP_USERS,) * made_up_users,
                *earlier.not_covered,
            ),
            evaluation,
        ),
        versions=versions,
        ledger=ledger,
        post_processing=post_processing,
        earlier=earlier,
        evaluation=evaluation,
    )


def _account_options(plan: Plan) -> dict[str, str] | None:
    """Options with which `account` finds the ε of a plan's steps; None where only the ledger tells it."""
    options = plan.sampling.account_options(plan.population, plan.sampling_probability)
    if options is None or not (plan.noise_multiplier == 0 or plan.step_event() == plan.sampled_event()):
        return None
    noise = {"noise-multiplier": repr(plan.noise_multiplier)}
    return {"algorithm": plan.name, "group-size": str(plan.group_size), **options, **noise}


def _count(event: Event) -> tuple[int, int]:
    """Releases that an event covers: those charged one by one, and those of whole blocks."""
    if isinstance(event, Composed | OneOf):
        counts = [_count(part) for part in event.events]
        return sum(single for single, _ in counts), sum(of_blocks for _, of_blocks in counts)
    if isinstance(event, Repeated):
        single, of_blocks = _count(event.event)
        return event.count * single, event.count * of_blocks
    return (0, event.rounds_per_block) if isinstance(event, RandomAllocatedGaussian) else (1, 0)
