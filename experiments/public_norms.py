"""How long a user's mean gradient over G examples is, L(G), and how much of it users share, s(G), on public users."""

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.data.contribution import draw_rows
from fedsim.errors import InvalidInput
from fedsim.gradients import clipped_sum
from fedsim.gradients.objective import Objective
from fedsim.planner import NormCurve, SignalCurve
from fedsim.rows import UserView

LENGTH = 1e-4
"""To which every gradient is clipped, so that directions are summed: far below any that a model learns from."""
MOST_USERS = 24
LARGEST_GROUP = 16


def measure_curves(
    model: torch.nn.Module,
    objective: Objective,
    view: UserView,
    *,
    largest_group: int = LARGEST_GROUP,
    users: int = MOST_USERS,
    seed: int = 0,
) -> tuple[NormCurve, SignalCurve]:
    """Measure L(G) and s(G) for G = 1, 2, 4, … at a model's present weights.

    s(G)² is the mean cosine between the mean gradients of two users, over all pairs: (‖Σu‖² − Σ‖u‖²)/(n(n − 1)) of
    their directions u, which is unbiased.

    The same users answer for every group size, so that differences between group sizes are not differences between
    users: those that own the largest group size for which there are enough of them.

    Args:
        model: The pre-trained model; its trainable parameters are what is measured.
        objective: Its objective.
        view: Public users. Users to be protected must not be measured here: the norms are released.
        largest_group: Largest G, where the users own as many examples.
        users: Most users measured.
        seed: Which users, and which of their examples.

    Returns:
        The median norm over users at each group size, relative to G = 1; and the shared part of their directions.

    Raises:
        InvalidInput: When fewer than four users own two examples.
    """
    counts = np.diff(view.user_offsets)
    group = largest_group
    while group > 1 and (counts >= group).sum() < min(users, 8):
        group //= 2
    chosen = np.flatnonzero(counts >= group)
    if group < 2 or len(chosen) < 4:
        raise InvalidInput("public users", len(chosen), "at least four users with two examples each")
    chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:users])

    sizes = [1 << i for i in range(group.bit_length())]
    medians, squares = [], []
    for size in sizes:
        indices, units = draw_rows(view, chosen, size, seed, 0)
        found = clipped_sum(model, view.take(indices), units, Clip(norm=LENGTH), objective=objective)
        norms = np.asarray(found.norms.detach().cpu(), dtype=np.float64)
        medians.append(float(np.median(norms)))
        own = np.minimum(np.where(found.finite.cpu().numpy(), norms, 0.0) / LENGTH, 1.0)
        total = float((found.total.double() ** 2).sum()) / LENGTH**2
        squares.append((total - float(own @ own)) / (len(own) * (len(own) - 1)))
    return NormCurve.measured(sizes, medians), SignalCurve.measured(sizes, squares)
