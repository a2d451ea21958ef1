"""What is computed each round and what is guaranteed for it, as options; and the plan that follows."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from fedsim.errors import InvalidInput
from fedsim.plan import ALGORITHMS, Algorithm, Plan, Selection, UserSizes, Weighting, plan_kind
from fedsim.plan.bands import AUTO, BandsForecast, best, forecasts_for, wanted_bands, with_bands
from fedsim.plan.fixed_graph import require_independent
from fedsim.plan.limits import require_delta_for, require_turns
from fedsim.privacy.dominating_pairs import MOST_EXAMPLES
from fedsim.privacy.events import Adjacency, Event
from fedsim.privacy.ledger import NOTHING
from fedsim.privacy.mechanisms import MECHANISMS, Mechanism
from fedsim.privacy.mechanisms.banded.blt import MOST_BUFFERS, BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import optimal_coefficients
from fedsim.privacy.mechanisms.banded.workload import Workload
from fedsim.registry import Registry
from fedsim.sampling import SAMPLINGS, Sampling
from fedsim.validation import require_at_least, require_at_most, require_between, require_positive

ROUGH = 0.01
"""Relative tolerance on ε where numbers of bands are compared; the one chosen is calibrated anew."""


def _listed(what: str, registry: Registry[Any]) -> str:
    """Help that names every class of a registry."""
    lines = "; ".join(f"{name}: {kind.summary}" for name, kind in registry.items())
    return f"{what} {lines}. A class of your own is named module:name."


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is computed each round and what is guaranteed for it."""

    algorithm: Algorithm = "uls"
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
    """Bound on one user's update (uls) or one example's gradient (els), in the mechanism's norm: L2 for most."""
    adjacency: Literal["add-or-remove-one-user", "replace-one-user", "fixed-graph"] = "add-or-remove-one-user"
    """The change of the data set that must stay hidden. fixed-graph, for examples of several owners (els, with
    --data.several-owners keep): who owns which example is public, and all examples of one user are emptied."""
    weighting: Weighting = "examples"
    """A user's gradient is the mean over its examples, or over its tokens."""
    selection: Selection = "random"
    """Which of a user's examples are taken when there are more than the group size."""
    local_steps: int = 1
    """Local SGD steps a user takes before its update is clipped (uls); more than one makes this DP-FedAvg."""
    local_learning_rate: float = 0.1
    """Learning rate of the local steps, where there are several."""
    sampling: Annotated[str, Doc(_listed("How units join a round.", SAMPLINGS))] = "poisson"
    sampling_options: tuple[str, ...] = ()
    """Options of the sampling scheme, each written name=value; one that it does not know is answered with those it
    does."""
    mechanism: Annotated[str, Doc(_listed("How the clipped sum is released (docs/mechanisms.md).", MECHANISMS))] = (
        "gaussian"
    )
    mechanism_options: tuple[str, ...] = ()
    """Options of the mechanism, each written name=value; one that it does not know is answered with those it does."""
    bands: str | None = None
    """Correlate the noise over so many rounds, so that it cancels in part in what training makes of them, at the same
    ε; auto takes as many as promise the least noise for the optimizer. Users then take turns (cyclic-poisson). By
    default 1, independent noise, except with --plan.mechanism banded, where it is auto."""
    buffers: int = 0
    """With --plan.sampling none: correlate the noise over all rounds through so many buffers (BLT), which take as much
    memory as one more band each; one or two are enough. Instead of bands."""
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
        for name in ("clip_norm", "local_learning_rate", "clip_learning_rate"):
            require_positive(f"plan.{name.replace('_', '-')}", getattr(self, name))
        for name in ("gradients_per_round", "rounds", "local_steps"):
            require_at_least(f"plan.{name.replace('_', '-')}", getattr(self, name), 1)
        require_at_least("plan.group-size", self.examples_per_user, 1)
        self._check_release()
        if self.noise_multiplier is not None:
            require_at_least("plan.noise-multiplier", self.noise_multiplier, 0)
            if self.noise_multiplier == 0 and not self.allow_no_privacy:
                raise InvalidInput(
                    "plan.noise-multiplier", 0, "above 0", "Add --plan.allow-no-privacy to train without a guarantee."
                )
        if self.local_steps > 1 and "local_steps" not in _own_fields(self.algorithm):
            raise InvalidInput(
                "plan.local-steps",
                self.local_steps,
                f"1 for {self.algorithm}",
                "Local steps belong to users: use uls.",
            )

    def _check_release(self) -> None:
        """Refuse a mechanism, sampling scheme or moving clip norm that there is not, or that do not go together."""
        mechanism = MECHANISMS.check(self.mechanism, self.mechanism_options)
        if Adjacency(self.adjacency) is Adjacency.FIXED_GRAPH:
            plan_kind(self.algorithm, Adjacency.FIXED_GRAPH)
            self._require_independent_noise()
            require_independent(self.sampling_scheme(), self.selection)
        group = ALGORITHMS[self.algorithm].units_in_group(self.examples_per_user)
        if self.noise_multiplier or (self.noise_multiplier is None and math.isfinite(self.epsilon)):
            require_at_most("plan.group-size", group or 1, MOST_EXAMPLES)
        # Schemes have no event for every algorithm: better known now than when workers have started.
        many = 10**9  # whatever the data is, it may have as many
        self.sampling_scheme().event(population=many, probability=1 / many, noise_multiplier=1.0, group_size=group)
        self._check_bands(mechanism)
        if self.clip_quantile:
            require_between("plan.clip-quantile", self.clip_quantile, 0, 1)
            if mechanism.norm_order != 2:
                raise InvalidInput("plan.clip-quantile", self.clip_quantile, f"0 with {self.mechanism}")
        if self.clip_count_std is not None:
            require_positive("plan.clip-count-std", self.clip_count_std)

    def _require_independent_noise(self) -> None:
        """Refuse correlated noise, for which users take turns, where an example is nobody's alone."""
        hint = "Correlated noise needs users who take turns; examples of several owners cannot."
        if self.buffers:
            raise InvalidInput("plan.buffers", self.buffers, f"0 with {self.adjacency}", hint)
        if self.wanted_bands == 1:
            return
        if self.bands is None:
            raise InvalidInput("plan.mechanism", self.mechanism, f"one without bands, with {self.adjacency}", hint)
        raise InvalidInput("plan.bands", self.bands, f"1 with {self.adjacency}", hint)

    def _check_bands(self, mechanism: type[Mechanism]) -> None:
        bands = self.wanted_bands
        if self.buffers:
            if not 0 < self.buffers <= MOST_BUFFERS:
                raise InvalidInput("plan.buffers", self.buffers, f"a whole number from 0 to {MOST_BUFFERS}")
            if bands != 1:
                raise InvalidInput("plan.buffers", self.buffers, f"0 with --plan.bands {bands}", "Choose one of both.")
            plain = mechanism.norm_order == 2
            require_turns(self.sampling_scheme(), self.buffers, 1, plain=plain, mechanism=self.mechanism)
        if bands == AUTO and self.noise_multiplier is not None and self.noise_multiplier > 0:
            hint = "Say how many bands, or leave the noise multiplier to be found."
            raise InvalidInput("plan.noise-multiplier", self.noise_multiplier, "left out with --plan.bands auto", hint)
        if bands == AUTO or bands == 1:
            return
        if bands > self.rounds:
            raise InvalidInput("plan.bands", bands, f"at most the {self.rounds} rounds there are")
        if Adjacency(self.adjacency) is Adjacency.REPLACE_ONE_USER:
            hint = "Who takes a user's place may be of another group of users."
            raise InvalidInput("plan.adjacency", self.adjacency, "add-or-remove-one-user with --plan.bands", hint)
        if mechanism.norm_order != 2:
            raise InvalidInput("plan.bands", bands, f"1 with {self.mechanism}")

    @property
    def wanted_bands(self) -> int | Literal["auto"]:
        """How many bands of noise, or AUTO."""
        asks = MECHANISMS.named(self.mechanism).correlates and not self.buffers
        return wanted_bands(self.bands, by_default=AUTO if asks else "1")

    @property
    def examples_per_user(self) -> int:
        """The group size, with the algorithm's default where none is given."""
        return ALGORITHMS[self.algorithm].default_group_size if self.group_size is None else self.group_size

    def release_mechanism(self) -> Mechanism:
        """The mechanism with its options.

        Raises:
            InvalidInput: For a name or an option that there is not.
        """
        return MECHANISMS.build(self.mechanism, self.mechanism_options)

    def sampling_scheme(self) -> Sampling:
        """The sampling scheme with its options.

        Raises:
            InvalidInput: For a name or an option that there is not.
        """
        return SAMPLINGS.build(self.sampling, self.sampling_options)

    def draft(self, sizes: UserSizes) -> Plan:
        """The plan on users of these sizes, its noise as given or not yet calibrated (a noise multiplier of 1).

        Raises:
            InvalidInput: When the compute does not fit the data.
        """
        own = {name: getattr(self, name) for name in ("local_steps", "local_learning_rate")}
        adjacency = Adjacency(self.adjacency)
        return plan_kind(self.algorithm, adjacency).draft(
            sizes,
            gradients_per_round=self.gradients_per_round,
            group_size=self.examples_per_user,
            clip_norm=self.clip_norm,
            noise_multiplier=1.0 if self.noise_multiplier is None else self.noise_multiplier,
            steps=self.rounds,
            delta=self.delta,
            adjacency=adjacency,
            selection=self.selection,
            weighting=self.weighting,
            sampling=self.sampling_scheme(),
            mechanism=self.release_mechanism(),
            clip_quantile=self.clip_quantile,
            clip_learning_rate=self.clip_learning_rate,
            **{name: value for name, value in own.items() if name in _own_fields(self.algorithm)},
        )

    def for_users(self, sizes: UserSizes, workload: Workload | None = None, before: Event = NOTHING) -> Plan:
        """The plan of a run on users of these sizes, its noise calibrated to ε and δ unless it was given.

        Args:
            sizes: The users.
            workload: What the optimizer makes of the releases, which bands of noise are fitted to; by default their
                sums.
            before: What ε and δ are to hold together with: what was released of the same users before.

        Raises:
            InvalidInput: When there are no users, δ is too large for so many, the compute does not fit them, or no
                noise reaches the target.
        """
        if sizes.num_users == 0 or sizes.kept(1) == 0:
            raise InvalidInput("data", f"{sizes.num_users} training users", "at least one user with enough text")
        require_delta_for(self.delta, sizes.num_users)
        draft = self.draft(sizes)
        banded = self._banded(draft, Workload.prefix_sums(self.rounds) if workload is None else workload, before)
        given = self.noise_multiplier is not None
        calibrated = banded if given else banded.calibrate(self.epsilon, before=before)
        if not self.clip_quantile:
            return calibrated
        # The event is that of σ, whatever share of it the count takes, so the count's noise is chosen last.
        count_std = self.clip_count_std or max(draft.normaliser / 20, calibrated.noise_multiplier)
        return dataclasses.replace(calibrated, clip_count_std=count_std)

    def forecasts(self, draft: Plan, workload: Workload, before: Event = NOTHING) -> tuple[BandsForecast, ...]:
        """What bands of noise promise at this ε, independent noise among them; nothing where none were asked for.

        Args:
            draft: The plan with independent noise.
            workload: What the optimizer makes of the releases.
            before: What was released of the same users before.
        """
        if self.wanted_bands == 1 or self.noise_multiplier is not None or math.isinf(self.epsilon):
            return ()
        return forecasts_for(draft, self.wanted_bands, workload, epsilon=self.epsilon, tolerance=ROUGH, before=before)

    def _banded(self, draft: Plan, workload: Workload, before: Event) -> Plan:
        """The draft with as many bands or buffers of noise as are wanted."""
        bands = self.wanted_bands
        if self.buffers:
            apart = draft.scheme.separation
            noise = BufferedToeplitz.optimal(self.buffers, workload, apart, -(-draft.steps // apart))
            return dataclasses.replace(draft, noise_buffers=noise.pairs)
        if bands == AUTO:
            found = self.forecasts(draft, workload, before)
            return with_bands(draft, best(found).bands, best(found).coefficients) if found else draft
        return draft if bands == 1 else with_bands(draft, bands, optimal_coefficients(bands, workload))


def _own_fields(algorithm: str) -> set[str]:
    """The fields that an algorithm's plan has."""
    return {item.name for item in dataclasses.fields(ALGORITHMS[algorithm])}
