"""`account`: ε of a plan, or the parameter that meets a target ε. Needs no torch, flwr or ray."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any, Literal

from experiments.account.bands import bands_from, least_noise, most_bands, noise_left
from experiments.account.steps import EXAMPLES, STEPS
from experiments.account.words import PARAMETERS, as_row, dashed, finite, in_words, shown
from experiments.confirmation import confirm_folder
from experiments.selection.options import SelectionConfig
from fedsim.disk import require_writable_file
from fedsim.errors import InvalidInput
from fedsim.plan import Algorithm
from fedsim.plan.bands import AUTO, candidates_for, candidates_within
from fedsim.privacy.accountant import epsilon_bounds, is_tight
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.calibration import (
    calibrate_group_size,
    calibrate_noise_multiplier,
    calibrate_sampling_probability,
    calibrate_steps,
)
from fedsim.privacy.comparisons import compare
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    Event,
    releases,
    to_json,
)
from fedsim.privacy.ledger import merged, read_entries
from fedsim.privacy.selection import best_of
from fedsim.registry import import_module
from fedsim.validation import require_at_least, require_between, require_positive

CALIBRATE: dict[str, Callable[..., Any]] = {
    "noise_multiplier": calibrate_noise_multiplier,
    "steps": calibrate_steps,
    "sampling_probability": calibrate_sampling_probability,
    "group_size": calibrate_group_size,
}
"""What can be left out where a target is given, and what finds it."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Account for a plan: certified bounds on its user-level ε.

    With --target-epsilon, leave out exactly one of --noise-multiplier, --steps, --sampling-probability and (els)
    --group-size: the least noise, most steps, largest probability or largest group that meets the target is found.
    """

    algorithm: Algorithm = "uls"
    """uls samples users and clips each user's update; els samples examples and clips each example's gradient."""
    group_size: int | None = None
    """Most examples of one user in the whole run (els). Does not matter to ε for uls."""
    sampling: Literal["poisson", "truncated-poisson", "fixed-size", "random-allocation", "none"] = "poisson"
    """How units join a step: each independently (poisson), all of them always or in turn (none), or, for uls, each
    independently up to a hard cap (truncated-poisson), a cohort of fixed size drawn without replacement (fixed-size),
    or each user in exactly one step of every block of steps, drawn uniformly and kept secret (random-allocation)."""
    sampling_probability: float | None = None
    """poisson, truncated-poisson: probability with which a user (uls) or an example (els) joins a step."""
    cohort_size: int | None = None
    """fixed-size: users in a cohort."""
    population_size: int | None = None
    """fixed-size, truncated-poisson: users to draw from."""
    most_units: int | None = None
    """truncated-poisson: most users in a step; of more, so many are kept at random."""
    rounds_per_block: int | None = None
    """random-allocation: steps of a block; a last block that the steps do not fill costs as much as a whole one."""
    groups: int = 1
    """none: groups of users that take turns, everybody of a group in its turn."""
    bands: str | None = None
    """Correlate the noise over so many rounds, in which groups of users take turns: as many groups as bands (poisson),
    or those of --groups (none). auto takes as many as leave the least noise in prefix sums of the releases, and needs
    --target-epsilon."""
    noise_multiplier: float | None = None
    """Noise standard deviation over the clip norm."""
    steps: int | None = None
    """Steps or rounds."""
    delta: float = 1e-5
    """δ at which ε is computed."""
    target_epsilon: float | None = None
    """The ε to meet with whatever was left out."""
    adjacency: Literal["add-or-remove-one-user", "replace-one-user", "fixed-graph"] = "add-or-remove-one-user"
    """The change of the data set that must stay hidden; fixed-graph is for els of examples with several owners."""
    tolerance: float = 1e-3
    """Largest relative distance of the two bounds."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """With --selection.expected-runs: account for the best of so many runs of the plan by a private score, each run
    with randomness of its own, whose number is drawn and stays secret."""
    ledger: Path | None = None
    """Account for what this ledger holds instead of for a plan."""
    check: Path | None = None
    """Confirm what the folder of a run, comparison or sweep states, by a method apart from the accountant."""
    modules: tuple[str, ...] = ()
    """Modules of your own that the kinds of release in a ledger are of; they are imported."""
    compare: bool = False
    """Show other accountants beside: Rényi, black-box group privacy (els), and Edgeworth estimates."""
    plot: Path | None = None
    """Draw the (ε, δ) curve and the trade-off curve into this PNG file."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Compute, print, draw; or confirm what a folder states."""
        if self.check is not None:
            self._refuse_beside_check()
            return confirm_folder(self.check, self.modules, as_json=self.json)
        try:
            result = self.result()
        except InvalidInput as error:
            raise _as_typed(error) from None
        print(dumps(result, allow_nan=False) if self.json else in_words(result))
        return 0

    def result(self) -> dict[str, Any]:
        """What is printed, as JSON values; an ε that could not be bounded is null.

        tolerance.met says whether the two certified bounds are as close together as was asked.

        Raises:
            InvalidInput: For options out of range, missing, or that do not go together.
        """
        self._check()
        for module in self.modules:
            import_module("modules", module, module)
        calibrated = None if self.ledger is not None else self._left_out()
        plan, event, epsilon = self._with_bands(calibrated)._solve(calibrated)
        result = plan._described(event) | {
            "epsilon": {"upper": finite(epsilon.upper), "lower": finite(epsilon.lower)},
            "tolerance": {"asked": self.tolerance, "gap": epsilon.gap, "met": epsilon.met},
            "tight": is_tight(event) and plan.bands in (None, "1") and plan.groups in (None, 1),
            "calibrated": calibrated,
        }
        if plan.bands is not None:
            result |= noise_left(
                plan._banded_event,
                int(plan.bands),
                plan._given("steps"),
                epsilon=epsilon.upper if self.target_epsilon is None else self.target_epsilon,
                delta=self.delta,
                tolerance=self.tolerance,
            )
        if self.compare:
            rows = compare(event, self.delta, adjacency=Adjacency(self.adjacency))
            result["comparisons"] = [as_row(one) for one in rows]
        if self.plot is not None:
            result["plot"] = str(plan._draw(event, epsilon))
        return result

    def event(self) -> Event:
        """What the whole plan releases.

        Raises:
            InvalidInput: For a value out of range, or one that is missing.
        """
        steps = self._given("steps")
        require_at_least("steps", steps, 0)
        kind, names = STEPS[self.algorithm, self.sampling]
        values = {name: self._given(name) for name in names}
        apart = self.groups
        if self.sampling == "random-allocation":
            apart = values["rounds_per_block"]  # A block that is begun costs as much as a whole one.
            require_at_least("rounds_per_block", apart, 1)
        if self.bands is not None:
            bands = int(bands_from(self.bands, self._most_bands(), steps))
            if "sampling_probability" in values:
                apart = bands
                values["sampling_probability"] = min(1.0, bands * values["sampling_probability"])
        steps = -(-steps // apart)
        run = releases(kind, steps, noise_multiplier=self._given("noise_multiplier"), **values)
        if self.selection.expected_runs is None:
            return run
        return best_of(run, expected_runs=self.selection.expected_runs, eta=self.selection.eta)

    def _most_bands(self) -> int:
        """As many as there are groups, or users for so many."""
        return self.groups if self.sampling == "none" else most_bands(self._given("sampling_probability"))

    def _banded_event(self, bands: int, noise_multiplier: float) -> Event:
        return dataclasses.replace(self, bands=str(bands), noise_multiplier=noise_multiplier).event()

    def _with_bands(self, calibrated: str | None) -> "Account":
        """The plan with a number of bands in place of auto."""
        if self.bands is None:
            return self
        steps = self._given("steps")
        if bands_from(self.bands, self._most_bands(), steps) != AUTO:
            return self
        if calibrated != "noise_multiplier":
            hint = "Or say how many bands."
            raise InvalidInput("bands", AUTO, "given with --target-epsilon and without --noise-multiplier", hint)
        if self.sampling == "none":
            candidates = candidates_within(self.groups, steps)
        else:
            candidates = candidates_for(self._given("sampling_probability"), steps)
        found = least_noise(
            self._banded_event, candidates, steps, epsilon=self.target_epsilon or 0.0, delta=self.delta
        )
        return dataclasses.replace(self, bands=str(found.bands))

    def _solve(self, calibrated: str | None) -> "tuple[Account, Composed, Bounds]":
        """The plan with nothing left out, what it releases, and its ε."""
        if self.ledger is not None:
            event = merged(entry.event for entry in read_entries(self.ledger))
            return self, event, self._epsilon(event)
        if calibrated is None:
            event = merged((self.event(),))
            return self, event, self._epsilon(event)

        def filled(value: float) -> Account:
            whole = calibrated in ("steps", "group_size")
            return dataclasses.replace(self, **{calibrated: int(value) if whole else float(value)})  # type: ignore[arg-type]

        calibration = CALIBRATE[calibrated](
            lambda value: filled(value).event(),
            epsilon=self.target_epsilon,
            delta=self.delta,
            adjacency=Adjacency(self.adjacency),
            tolerance=self.tolerance,
        )
        plan = filled(calibration.value)
        return plan, merged((plan.event(),)), calibration.epsilon

    def _epsilon(self, event: Event) -> Bounds:
        return epsilon_bounds(event, self.delta, adjacency=Adjacency(self.adjacency), tolerance=self.tolerance)

    def _needed(self) -> list[str]:
        """The options that the plan is made of."""
        turns = ["groups"] if self.sampling == "none" else []
        return ["noise_multiplier", "steps", *STEPS[self.algorithm, self.sampling][1], *turns]

    def _left_out(self) -> str | None:
        """The one option to calibrate."""
        missing = [name for name in self._needed() if getattr(self, name) is None]
        if self.target_epsilon is None:
            if missing:
                self._given(missing[0])
            return None
        open_ones = [name for name in self._needed() if name in CALIBRATE]
        for name in missing:
            if name not in CALIBRATE:
                self._given(name)
        if len(missing) != 1:
            value = ", ".join(f"--{dashed(name)}" for name in missing) or "nothing"
            options = ", ".join(f"--{dashed(name)}" for name in open_ones)
            allowed = f"given with exactly one of {options} left out"
            raise InvalidInput("target-epsilon", self.target_epsilon, allowed, f"Left out: {value}.")
        return missing[0]

    def _given(self, name: str) -> Any:
        value = getattr(self, name)
        if value is None:
            hint = f"Add --{dashed(name)}."
            if name in CALIBRATE:
                hint = f"Add --{dashed(name)}, or --target-epsilon to have it found."
            raise InvalidInput(dashed(name), None, "given", hint)
        return value

    def _check(self) -> None:
        require_between("delta", self.delta, 0, 1)
        require_positive("tolerance", self.tolerance)
        if self.target_epsilon is not None:
            require_positive("target-epsilon", self.target_epsilon)
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise InvalidInput("plot", str(self.plot), "a file name that ends with .png")
        if self.plot is not None:
            require_writable_file(self.plot, "plot")
        if (self.algorithm, self.sampling) not in STEPS:
            allowed = " or ".join(sampling for algorithm, sampling in STEPS if algorithm == self.algorithm)
            raise InvalidInput("sampling", self.sampling, f"{allowed} for {self.algorithm}")
        require_at_least("groups", self.groups, 1)
        if self.bands is not None and (self.sampling not in ("poisson", "none") or self.ledger is not None):
            raise InvalidInput("bands", self.bands, "used with --sampling poisson or none, and without --ledger")
        if Adjacency(self.adjacency) is Adjacency.REPLACE_ONE_USER and (self.bands is not None or self.groups > 1):
            hint = "Who takes a user's place may be of another group of users."
            beside = "--groups" if self.bands is None else "--bands"
            raise InvalidInput("adjacency", self.adjacency, f"add-or-remove-one-user with {beside}", hint)
        fixed = Adjacency(self.adjacency) is Adjacency.FIXED_GRAPH and self.ledger is None
        if fixed and ((self.algorithm, self.sampling) != (EXAMPLES, "poisson") or self.bands or self.groups > 1):
            raise InvalidInput("adjacency", self.adjacency, "used with --algorithm els --sampling poisson alone")
        used = [*self._needed(), "group_size"] if self.ledger is None else []
        for name in PARAMETERS:
            value = getattr(self, name)
            if value != getattr(Account, name) and name not in used:
                beside = f"--sampling {self.sampling}" if self.ledger is None else "--ledger"
                raise InvalidInput(dashed(name), value, f"left out with {beside}")
        if self.selection.expected_runs is None and self.selection != SelectionConfig():
            raise InvalidInput("selection.eta", self.selection.eta, "used with --selection.expected-runs")
        if self.ledger is not None and self.selection != SelectionConfig():
            hint = "A ledger says by itself what was selected."
            raise InvalidInput("selection.expected-runs", self.selection.expected_runs, "left out with --ledger", hint)
        if self.ledger is None and self.modules:
            raise InvalidInput("modules", self.modules, "used with --ledger")
        if self.ledger is not None and self.target_epsilon is not None:
            raise InvalidInput("target-epsilon", self.target_epsilon, "left out with --ledger")
        if self.ledger is None and self.group_size is not None:
            require_at_least("group-size", self.group_size, 1)

    def _refuse_beside_check(self) -> None:
        for name, value in vars(self).items():
            if name not in ("check", "modules", "json") and value != getattr(_UNASKED, name):
                raise InvalidInput(dashed(name), value, "left out with --check", "The folder says it all.")

    def _described(self, event: Composed) -> dict[str, Any]:
        common = {"unit": "user", "adjacency": self.adjacency, "delta": self.delta}
        if self.ledger is not None:
            return common | {"ledger": str(self.ledger), "event": to_json(event)}
        values = {name: getattr(self, name) for name in self._needed()}
        own: dict[str, Any] = {
            "algorithm": self.algorithm,
            "sampling": self.sampling,
            "group_size": self.group_size,
        }
        if self.selection.expected_runs is not None:
            own["selection"] = dataclasses.asdict(self.selection)
        return common | own | values

    def _draw(self, event: Event, epsilon: Bounds) -> Path:
        from experiments.report.guarantee_figure import plot_guarantee
        from fedsim.privacy.tradeoff import privacy_curve

        assert self.plot is not None
        curve = privacy_curve(event, adjacency=Adjacency(self.adjacency), least_delta=min(1e-12, self.delta / 10))
        return plot_guarantee(curve, self.delta, epsilon, self._title(), self.plot)

    def _title(self) -> str:
        """What is drawn: the ledger, or the plan's parameters."""
        if self.ledger is not None:
            return f"{self.ledger}, {self.adjacency}"
        values = ", ".join(f"{dashed(name)} {shown(getattr(self, name))}" for name in self._needed())
        return f"{self.algorithm.upper()}, {self.adjacency}: {values}"


_UNASKED = Account()


def _as_typed(error: InvalidInput) -> InvalidInput:
    """The same error with its field spelled as on the command line."""
    field = {"epsilon": "target-epsilon"}.get(error.field, dashed(error.field))
    return InvalidInput(field, error.value, error.allowed, error.hint)
