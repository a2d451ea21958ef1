"""Noise allocation: more noise on some blocks of parameters and less on others, at the same guarantee.

After ANADP (Li et al. 2024, "Fine-Tuning Language Models with Differential Privacy through Adaptive Noise
Allocation"), in whitened form. With scales s > 0 fixed before the round, each update Δ is clipped so that
‖Δ⊘s‖₂ ≤ C, and the released sum is Σ clip(Δ) + s·N(0, σ²C²I). Divided by s this is the plain Gaussian mechanism at
noise multiplier σ, so ε does not depend on s. It does not follow that any s is useful: a block with little noise is
also one on which updates use up the clip quickly.

The scales may depend only on public values and on what was released in earlier rounds. Scales of the update itself,
or noise scales without the whitened clip, would leak (both are caught by the audit's tests).
"""

import math
from dataclasses import dataclass

import numpy as np

from fedsim.privacy.mechanisms.blocks import Blocks
from fedsim.validation import require_at_least, require_between


def normalised(scales: np.ndarray, blocks: Blocks, bound: float) -> np.ndarray:
    """Scales within a factor of `bound` of each other's mean, with the plain Gaussian's total noise energy.

    Returns:
        float64 [blocks] with Σ size·s² = Σ size, so that C keeps its meaning: equal scales become exactly 1.
    """
    logs = np.log(scales)
    centred = np.clip(logs - np.average(logs, weights=blocks.block_sizes), -math.log(bound), math.log(bound))
    if np.ptp(centred) < 1e-12:
        return np.ones(len(blocks))
    bounded = np.exp(centred)
    energy = math.sqrt(np.average(bounded**2, weights=blocks.block_sizes))
    normal: np.ndarray = bounded / energy
    return normal


def equal_energy(blocks: Blocks, bound: float) -> np.ndarray:
    """Scales that give each block the same total noise, whatever its size: s ∝ size^(−1/2)."""
    return normalised(blocks.block_sizes**-0.5, blocks, bound)


@dataclass(frozen=True, kw_only=True)
class AllocationSettings:
    """How an adaptive allocation follows importance.

    Attributes:
        exponent: γ: scales are importance^(−γ), so that 0 is the plain Gaussian.
        decay: Decay of the moving averages of sensitivity and of its uncertainty.
        smoothing: Share of the old (log) scales bounded in a round.
        bound: No scale leaves [1/bound, bound] before it is normalised.
        warmup: Rounds with equal scales, until the averages mean something.
    """

    exponent: float = 0.25
    decay: float = 0.85
    smoothing: float = 0.5
    bound: float = 4.0
    warmup: int = 2

    def __post_init__(self) -> None:
        require_at_least("exponent", self.exponent, 0)
        require_between("decay", self.decay, 0, 1)
        if self.smoothing:
            require_between("smoothing", self.smoothing, 0, 1)
        require_at_least("bound", self.bound, 1)
        require_at_least("warmup", self.warmup, 0)


class ImportanceAllocator:
    """Scales from released values alone.

    Importance of a block is the mean over it of Ī·Ū: Ī the moving average of the sensitivity |w·z|, w the parameter
    and z the released mean, and Ū that of |sensitivity − Ī|, per block. Both inputs are public once released, so
    whatever is computed from them is post-processing.

    Args:
        blocks: The blocks.
        settings: How scales follow importance.
    """

    def __init__(self, blocks: Blocks, settings: AllocationSettings | None = None) -> None:
        self.blocks = blocks
        self.settings = settings or AllocationSettings()
        self._sensitivity = np.zeros(len(blocks))
        self._uncertainty = np.zeros(len(blocks))
        self._logs = np.zeros(len(blocks))
        self._rounds = 0

    @property
    def scales(self) -> np.ndarray:
        """Scales of the next round, float64 [blocks]."""
        return normalised(np.exp(self._logs), self.blocks, self.settings.bound)

    def observe(self, released: np.ndarray, parameters: np.ndarray) -> None:
        """Take in a round's released mean z and the parameters w it belongs to, both [P]."""
        chosen = self.settings
        sensitivity = self.blocks.means(np.abs(np.multiply(released, parameters, dtype=np.float64)))
        first = self._rounds == 0
        average = sensitivity if first else chosen.decay * self._sensitivity + (1 - chosen.decay) * sensitivity
        spread = np.abs(sensitivity - average)
        self._uncertainty = spread if first else chosen.decay * self._uncertainty + (1 - chosen.decay) * spread
        self._sensitivity = average
        self._rounds += 1
        if self._rounds <= chosen.warmup:
            return
        importance = self._sensitivity * self._uncertainty
        positive = importance > 0
        if not positive.any():
            return
        importance = np.where(positive, importance, importance[positive].min())
        wanted = -chosen.exponent * np.log(importance)
        wanted -= np.average(wanted, weights=self.blocks.block_sizes)
        self._logs = chosen.smoothing * self._logs + (1 - chosen.smoothing) * wanted

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays."""
        return {
            "sensitivity": self._sensitivity.copy(),
            "uncertainty": self._uncertainty.copy(),
            "log_scales": self._logs.copy(),
            "rounds": np.array(self._rounds, dtype=np.int64),
        }

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        self._sensitivity = np.array(arrays["sensitivity"], dtype=np.float64)
        self._uncertainty = np.array(arrays["uncertainty"], dtype=np.float64)
        self._logs = np.array(arrays["log_scales"], dtype=np.float64)
        self._rounds = int(arrays["rounds"])
