"""What to expect before training: which algorithm, which group size, how many rounds of how many units."""

from fedsim.plan import UserSizes
from fedsim.planner.allocation import Allocation, Total, allocate
from fedsim.planner.candidates import (
    Target,
    best_bands,
    calibrated_plans,
    default_group_sizes,
    draft_plan,
)
from fedsim.planner.norms import ALIGNED, ORTHOGONAL, NormCurve
from fedsim.planner.signal import ALIGNMENT, ASSUMED_SIGNAL, SIMILARITY, SignalCurve, effective_rounds
from fedsim.planner.verdict import (
    BASELINE,
    CHALLENGER,
    Verdict,
    break_even_norm,
    compare,
    predicted_noise,
    what_if,
)

__all__ = [
    "ALIGNED",
    "ALIGNMENT",
    "ASSUMED_SIGNAL",
    "BASELINE",
    "CHALLENGER",
    "ORTHOGONAL",
    "SIMILARITY",
    "Allocation",
    "NormCurve",
    "SignalCurve",
    "Target",
    "Total",
    "UserSizes",
    "Verdict",
    "allocate",
    "best_bands",
    "break_even_norm",
    "calibrated_plans",
    "compare",
    "default_group_sizes",
    "draft_plan",
    "effective_rounds",
    "predicted_noise",
    "what_if",
]
