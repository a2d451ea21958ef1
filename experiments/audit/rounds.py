"""Rounds under audit: canary updates of known size through the code that a run uses.

Sampling, clipping, noise and division are the plan's, the gradient engine's and the server's own; only the updates are
prescribed. A build under audit names these pieces, so that tests can break one of them and see it caught.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.gradients import Batch, RowLosses, clipped_sum
from fedsim.plan import ElsPlan, Plan
from fedsim.rows import TokenRows
from server.release import Release


def sizes_of(coordinates: int) -> dict[str, int]:
    """Two blocks of parameters, of unequal size, so that allocations of noise differ between them."""
    first = max(1, coordinates // 8)
    sizes = {"blocks.0.weight": first, "blocks.1.weight": coordinates - first}
    return {name: size for name, size in sizes.items() if size}


class PrescribedUpdates(torch.nn.Module):
    """A model whose gradient on row r is updates[r]: linear maps of a fixed table, one table row a token.

    Args:
        updates: float32 [rows, P].
    """

    def __init__(self, updates: np.ndarray) -> None:
        super().__init__()
        table = torch.from_numpy(np.ascontiguousarray(updates, dtype=np.float32))
        sizes = list(sizes_of(updates.shape[1]).values())
        for index, part in enumerate(table.split(sizes, dim=1)):
            self.register_buffer(f"part_{index}", part.contiguous())
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(size, 1, bias=False) for size in sizes)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers [R] to losses [R]."""
        losses = [block(getattr(self, f"part_{index}")[rows])[:, 0] for index, block in enumerate(self.blocks)]
        return torch.stack(losses).sum(dim=0)


class PrescribedLoss:
    """The model's output is the loss; each row scores one label."""

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        return np.ones(len(rows), dtype=np.int64)

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        ids = torch.from_numpy(rows.tokens[rows.offsets[indices]]).to(device)[:, None]
        return Batch(input_ids=ids, attention_mask=None, labels=ids)

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> RowLosses:
        ones = torch.ones(len(batch.input_ids), dtype=torch.int64, device=batch.input_ids.device)
        return RowLosses(loss_sum=model(batch.input_ids[:, 0]), label_count=ones, correct=ones)


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """A clipped sum and what a release's own rules need beside it.

    Attributes:
        total: float32 [P].
        clipped: Units whose norm exceeded the clip norm.
    """

    total: np.ndarray
    clipped: float = 0.0


def worst_canary_for(plan: Plan) -> "Canary":
    """The worst case of the plan's mechanism: any direction for the plain Gaussian, one coordinate for others."""
    return worst_case_canary(plan) if plan.mechanism == "gaussian" else one_coordinate_canary(plan, 8)


def sampled_units(plan: Plan, round: int, seed: int) -> np.ndarray:
    """The plan's sample."""
    return plan.sample(round, seed)


def clipped_total(plan: Plan, release: Release, updates: Sequence[np.ndarray]) -> Clipped:
    """The gradient engine's clipped sum of units, each given by its rows' updates [rows, P]."""
    size = updates[0].shape[1] if updates else 0
    if not updates:
        return Clipped(total=np.zeros(size, dtype=np.float32))
    model = PrescribedUpdates(np.concatenate(updates)).eval()
    owners = np.repeat(np.arange(len(updates)), [len(rows) for rows in updates])
    result = clipped_sum(
        model,
        TokenRows.from_lists([[row] for row in range(len(owners))]),
        owners,
        Clip(norm=release.clip_norm, order=plan.norm_order, scales=release.scales()),
        objective=PrescribedLoss(),
    )
    norms = result.norms.numpy()
    return Clipped(total=result.total.numpy(), clipped=float((norms > release.clip_norm).sum()))


def released_mean(plan: Plan, release: Release, clipped: Clipped, units: int, round: int) -> np.ndarray:
    """The server's release."""
    return release.noised_mean(clipped.total, round)


@dataclass(frozen=True, kw_only=True)
class Build:
    """The pieces that are audited; by default the project's own."""

    sample: Callable[[Plan, int, int], np.ndarray] = sampled_units
    clip: Callable[[Plan, Release, Sequence[np.ndarray]], Clipped] = clipped_total
    release: Callable[[Plan, Release, Clipped, int, int], np.ndarray] = released_mean


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One user chosen by the adversary, who also knows everybody else's data and who else took part.

    Attributes:
        rows: The canary's rows' updates, float32 [rows, P]; in ULS they are one unit, in ELS a unit each.
        others: Every other unit's update, float32 [P].
        direction: What the released mean is projected on; None for a likelihood ratio given by `score`.
        score: Scores a round from (released·normaliser − the others' sum, both [P]); default: the projection.
    """

    rows: np.ndarray
    others: np.ndarray
    direction: np.ndarray
    score: Callable[[np.ndarray], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Audited:
    """A plan, a build of it, and a canary to run them on.

    Attributes:
        plan: What is claimed.
        canary: The adversary.
        build: The pieces.
        sampling_seed: Seed of the sampling.
        noise_seed: Seed of the noise.
    """

    plan: Plan
    canary: Canary
    build: Build = field(default_factory=Build)
    sampling_seed: int = 1
    noise_seed: int = 2

    def round(self, round: int, *, present: bool) -> np.ndarray:
        """What is left of the released sum when the others' part is taken off, [P].

        The canary owns the last unit of a ULS population, and the last rows of an ELS one. Without it those units
        hold nothing: sampling them and dropping them is sampling from the others.
        """
        size = self.canary.rows.shape[1]
        sampled = self.build.sample(self.plan, round, self.sampling_seed)
        owned = len(self.canary.rows) if isinstance(self.plan, ElsPlan) else 1
        own = sampled[sampled >= self.plan.population - owned] - (self.plan.population - owned)
        others = len(sampled) - len(own)
        updates = [self.canary.others[None]] * others
        if present:
            updates += [self.canary.rows[row : row + 1] for row in own] if owned > 1 else [self.canary.rows] * len(own)
        release = Release(self.plan, sizes_of(size), self.noise_seed)
        clipped = (
            self.build.clip(self.plan, release, updates) if updates else Clipped(total=np.zeros(size, np.float32))
        )
        released = self.build.release(self.plan, release, clipped, len(updates), round)
        known = (
            min(1.0, self.plan.clip_norm / max(float(np.linalg.norm(self.canary.others)), 1e-30)) * self.canary.others
        )
        return released.astype(np.float64) * self.plan.normaliser - others * known

    def score(self, round: int, *, present: bool) -> float:
        """The adversary's score of a round."""
        left = self.round(round, present=present)
        return float(self.canary.direction @ left) if self.canary.score is None else self.canary.score(left)

    def scores(self, trials: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores of independent rounds with and without the canary, float64 [trials] each."""
        inside = [self.score(2 * trial, present=True) for trial in range(trials)]
        outside = [self.score(2 * trial + 1, present=False) for trial in range(trials)]
        return np.array(inside), np.array(outside)


def worst_case_canary(plan: Plan, size: int = 8, seed: int = 0) -> Canary:
    """A user whose rows all point in one random direction, far beyond the clip norm; the others give nothing."""
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(size)
    direction /= np.linalg.norm(direction)
    rows = np.repeat(100 * plan.clip_norm * direction[None], plan.group_size, axis=0)
    return Canary(rows=rows.astype(np.float32), others=np.zeros(size, dtype=np.float32), direction=direction)


def one_coordinate_canary(plan: Plan, size: int) -> Canary:
    """A user whose update is in the first coordinate alone: the worst case of an L1 clip and of any allocation."""
    axis = np.zeros(size)
    axis[0] = 1.0
    rows = np.repeat(100 * plan.clip_norm * axis[None], plan.group_size, axis=0)
    return Canary(rows=rows.astype(np.float32), others=np.zeros(size, dtype=np.float32), direction=axis)
