"""White-box attacks: canaries that are as bad as the clip permits, told from runs without them."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from experiments.audit.canaries import CanaryUsers, OwnBlocks, sizes_of
from experiments.audit.chains import one_turn
from experiments.audit.odds import log_odds
from experiments.audit.rig import FAR, OnlyRound, Rig, Seen, state_of
from experiments.audit.turns import in_every_turn, turns
from fedsim.plan import Plan
from fedsim.privacy.audit.claim import Claim, epsilon_free
from fedsim.privacy.audit.one_run import guess_by_odds, one_run_epsilon
from fedsim.privacy.audit.rates import attack_rates
from fedsim.privacy.audit.result import AuditFinding
from fedsim.privacy.events import Event

COORDINATES, BLOCKS = 8, 2
"""Values of a canary, and the blocks that they make, of which a clip may hold each by itself."""
MOST_ROWS = 4
FEWEST = 8
"""Canaries of a kind, in or out, that rates are measured of."""
CANARY = 1
"""Token of a canary's row; 0 is that of a row without a gradient."""


def attacks(
    plan: Plan, *, trials: int, canaries: int, confidence: float, seed: int, parameters: int | None = None
) -> list[AuditFinding]:
    """The canary attacks on a plan.

    Args:
        plan: The plan.
        trials: Rounds of each kind in the many-run audits; with correlated noise chains of rounds.
        canaries: Canaries of the one-run audit, at most as many as the population holds.
        confidence: Of each lower bound.
        seed: Seed of coins, sampling and noise.
        parameters: Least size of the one-run audit's model; by default two for each canary.
    """
    everybody = always_sampled(plan)
    plan = dataclasses.replace(plan, sampling=plan.scheme)
    kinds = ("one release", "one round") if plan.correlation is None else ("one turn", "one turn")
    findings = [
        many_runs(f"{kinds[0]}, canary always sampled", everybody, trials, confidence, seed),
        many_runs(f"{kinds[1]}, sampled as planned", plan, trials, confidence, seed),
    ]
    if plan.clip_rule is not None:
        findings.append(
            many_runs("the count that moves the clip norm", everybody, trials, confidence, seed, of_the_count)
        )
    return [*findings, *one_run(plan, canaries, confidence, seed, parameters=parameters)]


def always_sampled(plan: Plan) -> Plan:
    """The plan with every unit in every round of its turn, on few users: more would take time and change nothing.

    Two, or as many as keep a noised count away from the ends at which the clip norm stops following it.
    """
    rule = plan.clip_rule
    users = 2 if rule is None else max(2, math.ceil(40 * rule.count_std)) * plan.scheme.separation
    owned = np.full(users, rows_each(plan))
    few = plan.on(CanaryUsers(owned, np.zeros(owned.sum())))
    return dataclasses.replace(few, sampling_probability=in_every_turn(plan))


def rows_each(plan: Plan) -> int:
    """Rows of a user: all that may be units of its own; of those that are averaged into one unit a few say as much."""
    return min(plan.group_size, MOST_ROWS if plan.redraws else plan.population)


def users_of(plan: Plan, tokens: np.ndarray) -> CanaryUsers:
    """Users that make up the plan's population, of as many rows as it lets them use.

    Args:
        plan: The plan.
        tokens: Token of the first users' rows, int [users]; the rows of others have no gradient.
    """
    each = rows_each(plan)
    users, rest = divmod(plan.population, plan.units_per_user(each))
    owned = np.append(np.full(users, each), [rest] if rest else []).astype(np.int64)
    row_tokens = np.zeros(int(owned.sum()), dtype=np.int64)
    row_tokens[: len(tokens) * each] = np.repeat(tokens, each)
    return CanaryUsers(owned, row_tokens)


def units_of(plan: Plan, users: np.ndarray) -> np.ndarray:
    """Unit ids of some of these users."""
    each = plan.units_per_user(rows_each(plan))
    return (np.asarray(users)[:, None] * each + np.arange(each)).ravel()


Score = Callable[[Plan, Seen, np.ndarray], float]
"""(plan, what was seen, the canary's whitened direction) → larger where the canary seems to be in."""


def of_the_sum(plan: Plan, seen: Seen, direction: np.ndarray) -> float:
    """The likelihood ratio's statistic for Gaussian noise: the sum along the canary's update."""
    return float(direction @ seen.sum)


def of_the_count(plan: Plan, seen: Seen, direction: np.ndarray) -> float:
    """How few units the moved clip norm shows below it: the canary, if it is in, is above."""
    rule = plan.clip_rule
    assert rule is not None
    fraction = rule.quantile - math.log(seen.clip_norm / plan.clip_norm) / rule.learning_rate
    return (0.5 - fraction) * rule.expected_units


def many_runs(
    name: str, plan: Plan, trials: int, confidence: float, seed: int, score: Score = of_the_sum
) -> AuditFinding:
    """Independent rounds with and without one canary user, which has the first place in the population.

    Where noise is correlated, a trial is a chain of its own, as far as it tells of the canary's first turn.
    """
    canary, direction = worst_canary(plan)
    rig = Rig(
        plan,
        users_of(plan, np.array([CANARY])),
        np.stack([np.zeros_like(canary), canary]),
        sampling_seed=seed,
        noise_seed=seed + 1,
    )
    turn = int(turns(plan, rig.users, seed)[0])
    present = {True: units_of(plan, np.array([0])), False: np.empty(0, dtype=np.int64)}
    scores: dict[bool, np.ndarray] = {}
    for inside, units in present.items():
        round = rig.round(units, other_noise=int(plan.correlation is not None and not inside))
        start = state_of(round)
        found = []
        for trial in range(trials):
            round.load_state(start)
            found.append(score(plan, _one_trial(rig, round, turn, 2 * trial + (not inside)), direction))
        scores[inside] = np.array(found)
    rates = attack_rates(scores[True], scores[False], confidence=confidence)
    claim = claim_of(plan)
    return AuditFinding(
        attack=name,
        epsilon_lower=claim.epsilon_from(rates),
        epsilon_lower_free=epsilon_free(rates, plan.delta),
        epsilon_certified=claim.epsilon,
        delta=plan.delta,
        confidence=confidence,
        contradicts=claim.contradicted_by(rates),
        trials=2 * trials,
    )


def claim_of(plan: Plan, *, whole: bool = False) -> Claim:
    """What is certified of one round, or of the whole run, in the family of other noise multipliers."""

    def event(noise: float) -> Event:
        other = dataclasses.replace(plan, noise_multiplier=noise)
        return other.event() if whole else other.step_event()

    return Claim(make_event=event, noise_multiplier=plan.noise_multiplier, delta=plan.delta, adjacency=plan.adjacency)


def _one_trial(rig: Rig, round: OnlyRound, turn: int, place: int) -> Seen:
    """What is seen of a round of the canary's turn; each place has noise of its own, and so has each chain."""
    if rig.plan.correlation is not None:
        return one_turn(rig, round, turn)
    return rig.seen(round, turn + rig.plan.scheme.separation * place)


def worst_canary(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The update that the mechanism hides worst, far beyond its clip, and what to project the sum on; both [P]."""
    canary, scales = _hidden_worst(plan, COORDINATES)
    return (FAR * canary).astype(np.float32), canary / scales**2 / plan.clip_norm


def _hidden_worst(plan: Plan, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An update that uses up the clip of the first round, and that round's scales; both float64 [size]."""
    sizes = sizes_of(size)
    noise = plan.mechanism.noise(plan.step_event(), plan.sum_noise_multiplier, sizes)
    clip = noise.clip(plan.clip_norm)
    scales = np.repeat([clip.scales.get(name, 1.0) for name in sizes], list(sizes.values()))
    return plan.mechanism.canary(clip, sizes), scales


def one_run(
    plan: Plan, canaries: int, confidence: float, seed: int, *, parameters: int | None = None
) -> list[AuditFinding]:
    """A whole run under audit at once: many canary users, each in or out by a fair coin.

    The first bounds need nothing of how canaries hang together. Where every unit joins by itself, and noise is drawn
    for each value, canaries with parameters of their own are as many runs with one each, and the second bounds are
    those of many runs: they see more, and at any sampling probability.

    Args:
        plan: The plan.
        canaries: How many, at most as many as the population holds.
        confidence: Of each bound.
        seed: Seed of coins, sampling and noise.
        parameters: Least size of the model, which is divided among them; by default two each, one in each block.
    """
    canaries = min(canaries, plan.population // plan.units_per_user(rows_each(plan)))
    coins = np.random.default_rng(seed).random(canaries) < 0.5
    size = max(BLOCKS, math.ceil((parameters or 0) / canaries))
    scores = one_run_scores(plan, coins, seed, size)
    guesses = guess_by_odds(scores, coins, guesses_of(canaries))
    claim = claim_of(plan, whole=True)
    free = one_run_epsilon(guesses, plan.delta, confidence=confidence)

    def finding(name: str, lower: float, free: float, contradicts: bool) -> AuditFinding:
        return AuditFinding(
            attack=f"one run, {name}",
            epsilon_lower=lower,
            epsilon_lower_free=free,
            epsilon_certified=claim.epsilon,
            delta=plan.delta,
            confidence=confidence,
            contradicts=contradicts,
            trials=canaries,
        )

    lower = claim.epsilon_from_guesses(guesses, confidence=confidence)
    impossible = claim.contradicted_by_guesses(guesses, confidence=confidence) or free > claim.epsilon
    findings = [finding("many canaries", lower, free, impossible)]
    if plan.scheme.permits_empty_places() and min(coins.sum(), canaries - coins.sum()) >= FEWEST:
        rates = attack_rates(scores[coins], scores[~coins], confidence=confidence)
        bounds = claim.epsilon_from(rates), epsilon_free(rates, plan.delta)
        findings.append(finding("each canary by itself", *bounds, claim.contradicted_by(rates)))
    return findings


def guesses_of(canaries: int) -> int:
    """How many coins to guess of so many: the fewer, the surer each; 4√m found most at 500 to 200,000 canaries."""
    return min(canaries, math.ceil(4 * math.sqrt(canaries)))


def one_run_scores(plan: Plan, coins: np.ndarray, seed: int, size: int = BLOCKS) -> np.ndarray:
    """Log odds of the canaries after all the plan's steps, float64 [m]; larger means more likely in.

    Canary u updates parameters of its own, far beyond the clip; what was released there tells of it alone.

    Args:
        plan: The plan; its population must hold all canaries.
        coins: bool [m]; whether each takes part in the run at all.
        seed: Seed of sampling and noise.
        size: Parameters of each canary.
    """
    canaries = len(coins)
    canary, scales = _hidden_worst(plan, size)
    rig = Rig(
        plan,
        users_of(plan, 1 + np.arange(canaries)),
        OwnBlocks(canaries, FAR * canary),
        sampling_seed=seed,
        noise_seed=seed + 1,
        workers=1,
    )
    round = rig.round(units_of(plan, np.flatnonzero(coins)))
    whitened = canary / scales
    direction = whitened / np.linalg.norm(whitened)
    rows = (OwnBlocks.along(row, direction) for row in _whole_run(rig, round))
    return log_odds(plan, turns(plan, rig.users, seed)[:canaries], plan.units_per_user(rows_each(plan)), rows)


def _whole_run(rig: Rig, round: OnlyRound) -> Iterator[np.ndarray]:
    """The whitened sum of each of the plan's rounds."""
    for number in range(rig.plan.steps):
        round.release.clip_norm = rig.plan.clip_norm  # where it follows a count, absent users would let it run away
        each = rig.units_of_noise(round)
        yield rig.seen(round, number).sum / each
