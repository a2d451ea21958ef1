"""Private mean estimation, simulated: sampling, clipping, noise and server steps of many repetitions at once."""

import numpy as np
import scipy

from experiments.mean_estimation.error import Population
from fedsim.plan import Plan
from fedsim.randomness import stream

EXAMPLES_AT_ONCE = 1 << 17
"""Examples drawn in one go: bounds the memory."""


def squared_errors(
    population: Population, plan: Plan, learning_rate: float, repetitions: int, seed: int, point: int = 0
) -> np.ndarray:
    """‖θ_T − μ‖² of independent repetitions, each with its own users, float64 [repetitions].

    Args:
        population: Users and the law of their examples.
        plan: Sampling, clip, noise, normaliser and number of steps.
        learning_rate: η of the server.
        repetitions: How many.
        seed: Seed of everything drawn.
        point: Tells apart the points of a sweep, so that they draw independently.
    """
    per_repetition = max(
        population.num_users * population.examples_per_user, int(plan.steps * plan.gradients_per_round)
    )
    at_once = max(1, min(repetitions, EXAMPLES_AT_ONCE // per_repetition))
    errors = []
    for start in range(0, repetitions, at_once):
        rng = stream(seed, "mean-estimation", point, start)
        errors.append(_batch(population, plan, learning_rate, min(at_once, repetitions - start), rng))
    return np.concatenate(errors)


def _batch(
    population: Population, plan: Plan, learning_rate: float, repetitions: int, rng: np.random.Generator
) -> np.ndarray:
    examples = _draw_examples(population, repetitions, rng)
    sums = _round_sums(examples, plan, rng)
    sums += plan.noise_std * rng.standard_normal(sums.shape)
    releases = sums / plan.normaliser
    theta = np.zeros((repetitions, population.dimension))
    for step in range(plan.steps):
        theta -= learning_rate * (theta - releases[:, step])
    theta[:, 0] -= population.mean_norm
    errors: np.ndarray = np.einsum("rd,rd->r", theta, theta)
    return errors


def _draw_examples(population: Population, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """x_{u,i}, float32 [repetitions, N, n, d]; μ points along the first axis."""
    shape = (repetitions, population.num_users, population.examples_per_user, population.dimension)
    examples = rng.standard_normal(shape, dtype=np.float32)
    examples *= np.float32(np.sqrt(population.diversity / population.dimension))
    users = rng.standard_normal((*shape[:2], 1, shape[3]), dtype=np.float32)
    users *= np.float32(np.sqrt((1 - population.diversity) / population.dimension))
    users[..., 0] += np.float32(population.mean_norm)
    examples += users
    return examples


def _round_sums(examples: np.ndarray, plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """Σ clip(unit) over each round's sampled units, float64 [repetitions, T, d]; a unit is the mean of its rows."""
    repetitions, users, owned, dimension = examples.shape
    rows, units = plan.rows_per_unit(owned), plan.units_per_user(owned)
    kept = None if plan.redraws else _draw_group(repetitions * users, owned, units * rows, rng)
    rounds, members = _poisson_sample(repetitions * plan.steps, users * units, plan.sampling_probability, rng)
    owners = rounds // plan.steps * users + members // units
    if kept is None:
        places = _draw_group(len(owners), owned, rows, rng)
    else:
        places = kept.reshape(-1, units, rows)[owners, members % units]
    flat = examples.reshape(repetitions * users, owned, dimension)
    return _clipped_sums(np.mean(flat[owners[:, None], places], axis=1), rounds, repetitions, plan)


def _draw_group(count: int, owned: int, group: int, rng: np.random.Generator) -> np.ndarray:
    """group of owned examples, uniformly without replacement, for each of count users: int [count, group]."""
    if group == 1:
        return rng.integers(owned, size=(count, 1))
    if group == owned:
        return np.broadcast_to(np.arange(owned), (count, owned))
    return np.argpartition(rng.random((count, owned), dtype=np.float32), group, axis=1)[:, :group]


def _poisson_sample(
    rounds: int, population: int, probability: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Each member joins each round independently: (round, member) pairs in order.

    The gaps of a Bernoulli process are geometric, so drawing costs what is drawn and not rounds × population.
    """
    cells = rounds * population
    drawn: list[np.ndarray] = []
    last = -1
    while last < cells:
        expected = (cells - last) * probability
        gaps = rng.geometric(probability, size=int(expected + 4 * np.sqrt(expected) + 16))
        drawn.append(last + np.cumsum(gaps))
        last = int(drawn[-1][-1])
    places = np.concatenate(drawn)
    return np.divmod(places[places < cells], population)


def _clipped_sums(units: np.ndarray, rounds: np.ndarray, repetitions: int, plan: Plan) -> np.ndarray:
    norms = np.sqrt(np.einsum("ud,ud->u", units, units))
    factors = np.minimum(np.float32(1), np.float32(plan.clip_norm) / np.maximum(norms, np.float32(1e-30)))
    bounds = np.searchsorted(rounds, np.arange(repetitions * plan.steps + 1))
    membership = scipy.sparse.csr_array((factors, np.arange(len(units)), bounds), shape=(len(bounds) - 1, len(units)))
    sums: np.ndarray = (membership @ units).astype(np.float64)
    return sums.reshape(repetitions, plan.steps, units.shape[1])
