"""Black-box canaries: held-out users put into training by fair coins, once or several times, or not at all.

Training happens in this process, by the plan's own sampling and rows, the gradient engine's clipped sum, the server's
release and its optimizer. Put in several times, a user is as many users: the guarantee of the plan is for one, so the
attack shows how fast it fades for groups, and that the attack works at all.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.clip import Clip
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.gradients import ParameterLayout, clipped_sum
from fedsim.models.evaluate import evaluate_rows
from fedsim.plan import Plan, UlsPlan
from fedsim.privacy.audit.claim import epsilon_free
from fedsim.privacy.audit.membership import AttackArea, attack_area
from fedsim.privacy.audit.rates import attack_rates
from fedsim.resources import Resources, open_resources
from fedsim.rows import TokenRows
from server.optimizer import ServerOptimizer
from server.release import Release


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """User inference on canaries that took part a number of times.

    Attributes:
        repetitions: How many users each canary is; 0 is the control, in which no coin matters.
        area: Area under the curve of canaries in against canaries out.
        epsilon_lower: Lower bound on the ε of a group of so many users.
        canaries: How many were in, and out.
    """

    repetitions: int
    area: AttackArea
    epsilon_lower: float
    canaries: tuple[int, int]

    def in_words(self) -> str:
        """One sentence."""
        area = self.area
        return (
            f"Black-box canaries, each in training {self.repetitions} times, {self.canaries[0]} in and "
            f"{self.canaries[1]} out: AUC {area.area:.3f} ({area.lower:.3f} to {area.upper:.3f}; 0.5 is guessing), "
            f"ε of the group at least {self.epsilon_lower:.2f} at {area.confidence:.0%} confidence. "
            "Evidence, no proof."
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "kind": "evidence", "in_words": self.in_words()}


def black_box_canaries(
    config: RunConfig, plan: Plan, *, canaries: int, repetitions: int, confidence: float, seed: int
) -> Repetition:
    """Train once with canaries from the test users, and tell from the model which were in.

    Args:
        config: Model, data, optimizer.
        plan: A plan by users; its population grows by the canaries that are in.
        canaries: How many test users, at most.
        repetitions: How many users each canary that is in stands for.
        confidence: Of the interval and the bound.
        seed: Seed of coins, sampling and noise.

    Raises:
        InvalidInput: For a plan by examples.
    """
    if not isinstance(plan, UlsPlan):
        raise InvalidInput("plan.algorithm", plan.name, "uls", "Black-box canaries are users.")
    resources = open_resources(config)
    test = resources.store.split("test")
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(test.num_users, size=min(canaries, test.num_users), replace=False))
    coins = generator.permutation(np.arange(len(chosen)) % 2 == 0)
    before = _user_losses(resources, chosen)
    _train(config, plan, resources, np.repeat(chosen[coins], repetitions), seed)
    gained = before - _user_losses(resources, chosen)
    finite = np.isfinite(gained)
    inside, outside = gained[coins & finite], gained[~coins & finite]
    rates = attack_rates(generator.permutation(inside), generator.permutation(outside), confidence=confidence)
    return Repetition(
        repetitions=repetitions,
        area=attack_area(inside, outside, confidence=confidence),
        epsilon_lower=epsilon_free(rates, plan.delta),
        canaries=(len(inside), len(outside)),
    )


def _train(config: RunConfig, plan: UlsPlan, resources: Resources, extra: np.ndarray, seed: int) -> None:
    """Train the resources' model in place; users from plan.num_users on are those of `extra`, test users."""
    model, objective = resources.loaded.model, resources.loaded.objective
    layout = ParameterLayout.of(model)
    parameters = np.array(layout.flatten(model).cpu(), dtype=np.float32)
    optimizer = ServerOptimizer(parameters, config.optimizer, plan.steps)
    release = Release(plan, layout.sizes, seed + 1)
    grown = dataclasses.replace(plan, num_users=plan.num_users + len(extra))
    train, test = resources.store.split("train"), resources.store.split("test")
    for round in range(plan.steps):
        units = grown.sample(round, seed)
        known, added = units[units < plan.num_users], units[units >= plan.num_users] - plan.num_users
        parts = [(train, *plan.rows_of(train, known, round, seed))]
        # Each copy draws its rows like a user of its own.
        parts += [(test, *plan.rows_of(test, extra[[copy]], round, seed + 1 + int(copy))) for copy in added]
        parts = [part for part in parts if len(part[1])]
        total, clipped = np.zeros(layout.size, dtype=np.float32), 0.0
        if parts:
            rows = _joined([view.take(indices) for view, indices, _ in parts])
            counts = [0, *np.cumsum([ids.max() + 1 for _, _, ids in parts])[:-1]]
            owners = np.concatenate([ids + start for (_, _, ids), start in zip(parts, counts, strict=True)])
            result = clipped_sum(
                model,
                rows,
                owners,
                Clip(norm=release.clip_norm, order=plan.norm_order, scales=release.scales()),
                objective=objective,
                weighting=plan.weighting,
            )
            total = result.total.cpu().numpy()
            clipped = float((result.norms.cpu().numpy() > release.clip_norm).sum())
        mean = release.noised_mean(total, round)
        release.observe(mean, parameters, {"units": float(len(units)), "clipped_units": clipped}, round)
        optimizer.step(mean)
        layout.load(model, parameters)


def _user_losses(resources: Resources, users: np.ndarray) -> np.ndarray:
    """Mean loss of each test user under the resources' model, float64 [users]."""
    test = resources.store.split("test")
    sizes = np.diff(test.user_offsets)[users]
    indices = np.repeat(test.user_offsets[users] + sizes - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
    owners = np.repeat(np.arange(len(users)), sizes)
    losses = evaluate_rows(resources.loaded.model, test.take(indices), resources.loaded.objective)
    return losses.by_unit(owners, len(users)).losses


def _joined(parts: Sequence[TokenRows]) -> TokenRows:
    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else np.concatenate(columns)

    offsets = np.concatenate([[0], *(part.lengths for part in parts)]).cumsum().astype(np.int64)
    return TokenRows(tokens=column("tokens"), offsets=offsets, labels=column("labels"), classes=column("classes"))
