"""The second method for ε: against closed forms and quadrature, and the accountant's bounds against it."""

import ast
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from random_events import KINDS, Question, question
from scipy.integrate import quad
from scipy.stats import norm

from fedsim.errors import InvalidInput
from fedsim.privacy import check
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import Bounds
from fedsim.privacy.check import NotCheckable, Verdict, confirm, contour
from fedsim.privacy.check.contour import CheckedDelta, delta_at
from fedsim.privacy.check.loss_laws import Direction, loss_law
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    FixedSizeSubsampledGaussian,
    Gaussian,
    MixtureOfGaussians,
    PoissonSubsampledGaussian,
    Repeated,
)
from fedsim.privacy.mechanisms.laplace.event import RandomisedScaleLaplace

ADD, REPLACE = Adjacency.ADD_OR_REMOVE_ONE_USER, Adjacency.REPLACE_ONE_USER
SEEDS = range(200)


@cache
def bounds_of(seed: int) -> tuple[Question, Bounds]:
    asked = question(seed)
    return asked, epsilon_bounds(asked.event, asked.delta, adjacency=asked.adjacency)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_bounds_of_a_random_event_are_confirmed(seed: int) -> None:
    asked, bounds = bounds_of(seed)
    found = confirm(asked.event, asked.delta, (bounds.lower, bounds.upper), asked.adjacency)
    assert (found.lower.verdict, found.upper.verdict) == (Verdict.CONFIRMED, Verdict.CONFIRMED), (asked, found)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_random_event_has_a_finite_bound(seed: int) -> None:
    asked, bounds = bounds_of(seed)
    assert math.isfinite(bounds.upper), asked


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_bounds_a_thousandth_beyond_the_truth_are_contradicted(seed: int) -> None:
    asked, bounds = bounds_of(seed)
    if not 0 < bounds.lower <= bounds.upper < math.inf:
        pytest.skip("an ε of 0 cannot be moved by a part of itself")
    low, high = bounds.lower * 0.999, bounds.upper * 1.001
    found = confirm(asked.event, asked.delta, (high, low), asked.adjacency)
    assert (found.lower.verdict, found.upper.verdict) == (Verdict.CONTRADICTED, Verdict.CONTRADICTED), (asked, found)


def test_the_random_events_are_spread_over_all_that_is_promised() -> None:
    asked = [question(seed) for seed in SEEDS]
    steps = np.array([one.event.count for one in asked])  # type: ignore[attr-defined]
    deltas = np.array([one.delta for one in asked])
    lowers = np.array([bounds_of(seed)[1].lower for seed in SEEDS])
    assert len(asked) >= 200
    assert {one.adjacency.accounted_as for one in asked} == {kind.accounted_as for kind in Adjacency}
    assert len({type(one.event.event) for one in asked}) == len(set(KINDS))  # type: ignore[attr-defined]
    for values, low, high in ((steps, 10, 3e6), (deltas, 1e-17, 1e-3), (lowers, 3e-3, 300)):
        assert (values < low).sum() >= 5
        assert (values > high).sum() >= 5


def gaussian_delta(shift: float, epsilon: float) -> float:
    with mpmath.workdps(40):
        tail = [mpmath.ncdf(mpmath.mpf(sign) * shift / 2 - mpmath.mpf(epsilon) / shift) for sign in (1, -1)]
        return float(tail[0] - mpmath.exp(epsilon) * tail[1])


@pytest.mark.parametrize(
    ("steps", "noise", "epsilon"),
    [(1, 1.0, 8.0), (10**7, 1e4, 5.0), (10**7, 1e7, 1e-3), (100, 0.3, 1000.0), (1, 0.01, 5600.0), (3, 2.0, 0.0)],
)
def test_gaussians_have_a_closed_form(steps: int, noise: float, epsilon: float) -> None:
    found = delta_at([(loss_law(Gaussian(noise_multiplier=noise), ADD), steps)], epsilon, "remove")
    exact = gaussian_delta(math.sqrt(steps) / noise, epsilon)
    assert abs(found.value - exact) <= found.error + 1e-11 * exact
    assert found.error <= 1e-9 * exact


def one_step(parts: Event, adjacency: Adjacency, epsilon: float, direction: Direction) -> float:
    """δ(ε) of one release by mpmath: the densities of all x whose loss is above ε, with 40 digits."""
    with mpmath.workdps(40):
        shifts, weights = components(parts)
        mirrored = [-shift for shift in shifts]
        p = lambda x: mpmath.fsum(w * mpmath.npdf(x, m, 1) for m, w in zip(shifts, weights, strict=True))  # noqa: E731
        others, shares = (mirrored, weights) if adjacency is REPLACE else ([mpmath.mpf(0)], [mpmath.mpf(1)])
        q = lambda x: mpmath.fsum(w * mpmath.npdf(x, m, 1) for m, w in zip(others, shares, strict=True))  # noqa: E731
        sign = 1 if direction == "remove" else -1
        low, high = mpmath.mpf(-60), mpmath.mpf(60) + shifts[-1]
        beyond = lambda x: mpmath.log(p(x)) - mpmath.log(q(x)) - sign * epsilon  # noqa: E731
        if beyond(low) * beyond(high) > 0:
            return 0.0
        while high - low > mpmath.mpf(10) ** -30:
            middle = (low + high) / 2
            low, high = (low, middle) if beyond(middle) > 0 else (middle, high)
        edge = low
        sides = [
            mpmath.fsum(w * mpmath.ncdf(sign * (m - edge)) for m, w in zip(means, parts_, strict=True))
            for means, parts_ in ((shifts, weights), (others, shares))
        ]
        first, second = sides if direction == "remove" else reversed(sides)
        return float(first - mpmath.exp(epsilon) * second)


def components(event: Event) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """Means, in units of σ, and weights of the worst case with the user."""
    if isinstance(event, PoissonSubsampledGaussian):
        q = mpmath.mpf(event.sampling_probability)
        norms, shares = [0, 1], [1 - q, q]
    elif isinstance(event, FixedSizeSubsampledGaussian):
        q = mpmath.mpf(event.cohort_size) / event.population_size
        norms, shares = [0, 2], [1 - q, q]
    else:
        assert isinstance(event, BinomialMixtureGaussian)
        n, q = event.group_size, mpmath.mpf(event.sampling_probability)
        norms = list(range(n + 1))
        shares = [mpmath.binomial(n, k) * q**k * (1 - q) ** (n - k) for k in norms]
    return [mpmath.mpf(k) / event.noise_multiplier for k in norms], shares  # type: ignore[attr-defined]


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(
    ("event", "adjacency", "epsilon"),
    [
        (PoissonSubsampledGaussian(sampling_probability=0.3, noise_multiplier=0.3), ADD, 0.2),
        (PoissonSubsampledGaussian(sampling_probability=0.3, noise_multiplier=5.0), ADD, 0.3),
        (PoissonSubsampledGaussian(sampling_probability=3e-4, noise_multiplier=1.0), REPLACE, 0.1),
        (PoissonSubsampledGaussian(sampling_probability=0.9, noise_multiplier=0.05), ADD, 210.0),
        (BinomialMixtureGaussian(group_size=5, sampling_probability=0.1, noise_multiplier=0.7), ADD, 3.0),
        (BinomialMixtureGaussian(group_size=5, sampling_probability=0.1, noise_multiplier=0.7), REPLACE, 12.0),
    ],
)
def test_one_step_is_what_forty_digits_say(
    event: Event, adjacency: Adjacency, epsilon: float, direction: Direction
) -> None:
    found = delta_at([(loss_law(event, adjacency), 1)], epsilon, direction)
    exact = one_step(event, adjacency, epsilon, direction)
    assert abs(found.value - exact) <= max(found.error, 1e-11 * exact)
    assert found.error <= 1e-5 * exact


@pytest.mark.parametrize("epsilon", [0.2, 9.0])
def test_a_cohort_of_fixed_size_has_the_same_curve_when_a_user_is_replaced(epsilon: float) -> None:
    event = FixedSizeSubsampledGaussian(cohort_size=3, population_size=60, noise_multiplier=1.25)
    exact = one_step(event, ADD, epsilon, "remove")
    found = delta_at([(loss_law(event, REPLACE), 1)], epsilon, "remove")
    assert abs(found.value - exact) <= max(found.error, 1e-11 * exact)


@pytest.mark.parametrize("direction", ["remove", "add"])
def test_two_steps_are_what_quadrature_over_the_first_says(direction: Direction) -> None:
    """δ₂(ε) = E[δ₁(ε − L)], with δ₁ in closed form, also below 0."""
    q, sigma, epsilon = 0.2, 0.8, 0.3
    sign = 1 if direction == "remove" else -1

    def density(x: float) -> float:
        null = norm.pdf(x)
        return float(null if sign < 0 else (1 - q) * null + q * norm.pdf(x - 1 / sigma))

    def loss(x: float) -> float:
        return float(sign * np.log1p(q * np.expm1(x / sigma - 1 / (2 * sigma**2))))

    def closed(level: float) -> float:
        rest = np.expm1(sign * level) / q + 1
        edge = -np.inf if rest <= 0 else sigma * np.log(rest) + 1 / (2 * sigma)
        with_user = (1 - q) * norm.sf(sign * edge) + q * norm.sf(sign * (edge - 1 / sigma))
        without = norm.sf(sign * edge)
        first, second = (with_user, without) if sign > 0 else (without, with_user)
        if rest <= 0:
            first, second = (1.0, 1.0) if sign > 0 else (0.0, 0.0)
        return float(first - np.exp(level) * second)

    exact = sum(
        quad(lambda x: density(x) * closed(epsilon - loss(x)), low, high, epsabs=1e-15, epsrel=1e-12, limit=400)[0]
        for low, high in zip([-12, -4, 0, 1, 2, 4], [-4, 0, 1, 2, 4, 14], strict=True)
    )
    event = PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=sigma)
    found = delta_at([(loss_law(event, ADD), 2)], epsilon, direction)
    assert found.value == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("shares", [1, 4])
def test_plain_laplace_noise_has_a_closed_form(shares: int) -> None:
    event = RandomisedScaleLaplace(law=(("point", 1.0, 0.75, 0.0),), group_size=shares)
    for epsilon in (0.1, 0.5, 0.74 * shares):
        found = delta_at([(loss_law(event, ADD), 1)], epsilon, "remove")
        assert found.value == pytest.approx(-math.expm1((epsilon - 0.75 * shares) / 2), rel=1e-4)
        assert found.value == pytest.approx(-math.expm1((epsilon - 0.75 * shares) / 2), abs=found.error)
    assert delta_at([(loss_law(event, ADD), 1)], 0.75 * shares, "remove").value == 0.0


def test_dp_accounting_agrees() -> None:
    cases: list[tuple[float, float, int, float]] = [(0.01, 1.0, 1000, 1.5), (0.1, 2.0, 50, 0.8)]
    for q, noise, steps, epsilon in cases:
        theirs = privacy_loss_distribution.from_gaussian_mechanism(
            noise, sampling_prob=q, value_discretization_interval=1e-3
        ).self_compose(steps)
        event = PoissonSubsampledGaussian(sampling_probability=q, noise_multiplier=noise)
        laws = [(loss_law(event, ADD), steps)]
        ours = max(delta_at(laws, epsilon, direction).value for direction in ("remove", "add"))
        assert ours <= theirs.get_delta_for_epsilon(epsilon) * (1 + 1e-9)
        assert ours == pytest.approx(theirs.get_delta_for_epsilon(epsilon), rel=1e-2)


STEP = PoissonSubsampledGaussian(sampling_probability=0.01, noise_multiplier=0.9)
PLAN = Repeated(event=STEP, count=2000)


@pytest.mark.parametrize(
    "other",
    [
        Repeated(event=STEP, count=2010),
        Repeated(event=PoissonSubsampledGaussian(sampling_probability=0.0101, noise_multiplier=0.9), count=2000),
        Repeated(event=PoissonSubsampledGaussian(sampling_probability=0.01, noise_multiplier=0.895), count=2000),
        Repeated(
            event=BinomialMixtureGaussian(group_size=2, sampling_probability=0.01, noise_multiplier=0.9), count=2000
        ),
        Composed(events=(PLAN, Gaussian(noise_multiplier=20.0))),
    ],
)
def test_bounds_of_less_than_was_released_are_contradicted(other: Event) -> None:
    bounds = epsilon_bounds(PLAN, 1e-6)
    assert confirm(PLAN, 1e-6, (bounds.lower, bounds.upper)).verdict is Verdict.CONFIRMED
    found = confirm(other, 1e-6, (bounds.lower, bounds.upper))
    assert found.upper.verdict is Verdict.CONTRADICTED
    assert found.lower.verdict is Verdict.CONFIRMED
    claimed = epsilon_bounds(other, 1e-6)
    reversed_roles = confirm(PLAN, 1e-6, (claimed.lower, claimed.upper))
    assert reversed_roles.lower.verdict is Verdict.CONTRADICTED


def test_an_epsilon_of_one_direction_or_the_other_adjacency_is_contradicted() -> None:
    laws = [(loss_law(STEP, ADD), 2000)]
    bounds = epsilon_bounds(PLAN, 1e-6)
    smaller = min(delta_at(laws, bounds.upper, direction).value for direction in ("remove", "add"))
    assert smaller < 0.5e-6, "the directions differ"
    claimed = bounds.upper
    while min(delta_at(laws, claimed, direction).value for direction in ("remove", "add")) < 1e-6:
        claimed *= 0.98
    assert confirm(PLAN, 1e-6, (0.0, claimed)).upper.verdict is Verdict.CONTRADICTED
    assert confirm(PLAN, 1e-6, (0.0, bounds.upper), REPLACE).upper.verdict is Verdict.CONTRADICTED


def test_the_worse_direction_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for worse in ("remove", "add"):
        fake = lambda laws, epsilon, direction, worse=worse: CheckedDelta(1e-3 if direction == worse else 0.0, 0.0)  # noqa: E731
        monkeypatch.setattr("fedsim.privacy.check.confirmation.delta_at", fake)
        assert confirm(PLAN, 1e-6, (0.0, 2.0)).verdict is Verdict.CONTRADICTED


def test_order_and_grouping_do_not_matter() -> None:
    events = (PLAN, Repeated(event=Composed(events=(STEP, Gaussian(noise_multiplier=9.0))), count=3))
    found = [
        confirm(Composed(events=order), 1e-6, (2.0, 3.0)).upper.delta for order in (events, tuple(reversed(events)))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_nothing_released_has_no_delta() -> None:
    found = confirm(Repeated(event=STEP, count=0), 1e-6, (0.0, 0.0))
    assert (found.verdict, found.upper.delta) == (Verdict.CONFIRMED, 0.0)
    assert confirm(Composed(events=()), 1e-6, (0.1, 0.2)).lower.verdict is Verdict.CONTRADICTED
    assert confirm(PLAN, 1e-6, (0.0, math.inf)).verdict is Verdict.CONFIRMED, "infinity claims nothing"


def test_what_it_cannot_resolve_it_does_not_confirm(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = epsilon_bounds(PLAN, 1e-6)
    edges = (bounds.lower, bounds.upper)
    monkeypatch.setattr(contour, "MOST_POINTS", 10)
    assert confirm(PLAN, 1e-6, edges).verdict is Verdict.UNDECIDED
    monkeypatch.undo()

    def vague(of: Callable[..., CheckedDelta]) -> Callable[..., CheckedDelta]:
        return lambda *arguments: CheckedDelta(of(*arguments).value, 1e-6)

    monkeypatch.setattr("fedsim.privacy.check.confirmation.delta_at", vague(delta_at))
    assert confirm(PLAN, 1e-6, edges).verdict is Verdict.UNDECIDED


def test_kinds_it_does_not_know_are_not_confirmed() -> None:
    class Foreign(Event):
        kind = "foreign"

    with pytest.raises(NotCheckable, match="foreign"):
        confirm(Composed(events=(STEP, Foreign())), 1e-6, (0.0, 1.0))
    law = RandomisedScaleLaplace(law=(("gamma", 1.0, 2.0, 0.1),), group_size=3, sampling_probability=0.1)
    with pytest.raises(NotCheckable, match="law"):
        confirm(law, 1e-6, (0.0, 1.0))
    with pytest.raises(NotCheckable, match="adjacency"):
        confirm(RandomisedScaleLaplace(law=(("point", 1.0, 1.0, 0.0),)), 1e-6, (0.0, 1.0), REPLACE)


@pytest.mark.parametrize(("delta", "bounds"), [(0.0, (0.0, 1.0)), (1e-6, (-1.0, 1.0)), (1e-6, (0.0, math.nan))])
def test_bad_input_is_refused(delta: float, bounds: tuple[float, float]) -> None:
    with pytest.raises(InvalidInput):
        confirm(PLAN, delta, bounds)


def test_laws_of_random_inverse_scales_are_confirmed() -> None:
    law = (("uniform", 0.6, 0.1, 1.0), ("point", 0.4, 0.3, 0.0))
    event = Repeated(event=RandomisedScaleLaplace(law=law, sampling_probability=0.3), count=50)
    bounds = epsilon_bounds(event, 1e-6)
    assert confirm(event, 1e-6, (bounds.lower, bounds.upper)).verdict is Verdict.CONFIRMED
    assert confirm(event, 1e-6, (0.0, bounds.lower * 0.999)).verdict is Verdict.CONTRADICTED


def test_a_mixture_with_equal_and_absent_contributions_is_one_of_fewer() -> None:
    scattered = MixtureOfGaussians(
        sensitivities=(1.0, 0.0, 1.0, 3.0), probabilities=(0.004, 0.99, 0.006, 0.0), noise_multiplier=0.9
    )
    one, other = (delta_at([(loss_law(event, ADD), 2000)], 2.0, "remove") for event in (scattered, STEP))
    assert one.value == pytest.approx(other.value, rel=1e-9)


def test_it_shares_no_code_with_the_accountant() -> None:
    events = (f"fedsim.privacy.{name}" for name in ("events", "splits", "best_of", "mechanisms.laplace.event"))
    allowed = ("fedsim.privacy.check", *events)
    for path in Path(check.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("fedsim.privacy") or name.startswith(allowed), f"{path.name} imports {name}"
                assert not name.startswith("dp_accounting"), path.name
