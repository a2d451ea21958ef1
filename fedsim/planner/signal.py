"""How far a budget of noise and gradients gets: rounds, each counted by how well its release points.

With every unit clipped at the typical norm C, a released mean over M units is made of three parts: what the units'
updates have in common, of length s·C; the chance of who was drawn, of variance (1 − s²)·C²/M; and noise, of squared
length d·σ²·C²/M² in d trainable parameters. The cosine between the release and the direction that all units share is

    cos² = s² / (s² + (1 − s²)/M + d·σ²/M²).

A step of the best size along a release gains cos² of what it gains along the shared direction itself (a quadratic
bound on the loss, minimised over the step's length), so that T rounds are worth about T·cos² rounds without noise.
That weighs everything a budget buys at once: more units a round leave less noise and fewer rounds; a larger group
makes units more alike (s grows) and fewer; more rounds cost noise.

It compares ways to spend one budget on one model; it is no loss. It takes s as it is before training, the learning
rate as tuned, and each round's gain as that of the first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.plan import Plan, UserSizes
from fedsim.validation import require_at_least

LEAST_SQUARE = 1e-4
"""The least s² that is believed of a measurement: what is measured of few users may come out at 0 or below."""


@dataclass(frozen=True, kw_only=True)
class SignalCurve:
    """s(G): how much of a clipped unit's update all units share, when a unit is the mean over G examples of a user.

    Attributes:
        name: "measured" or "assumed".
        group_sizes: Ascending from 1.
        shares: s at them, above 0 and at most 1: ‖E[u]‖ of units u scaled to length 1, each of another user; between
            them interpolated in logarithms, beyond them held.
    """

    name: str
    group_sizes: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = list(self.group_sizes)
        if not sizes or sizes[0] != 1 or sizes != sorted(set(sizes)) or len(sizes) != len(self.shares):
            raise InvalidInput("group_sizes", self.group_sizes, "ascending from 1, with one share each")
        if not all(0 < share <= 1 for share in self.shares):
            raise InvalidInput("shares", self.shares, "above 0 and at most 1")

    @classmethod
    def of_similarity(cls, name: str, similarity: float, alignment: float, largest: int = 1 << 20) -> Self:
        """s(G)² = similarity/(alignment + (1 − alignment)/G): a mean keeps what examples share, the rest averages out.

        Args:
            name: Its name.
            similarity: Mean cosine between gradients of examples of different users, s(1)².
            alignment: Mean cosine between those of one user's examples, at least the similarity.
            largest: Largest group size covered.

        Raises:
            InvalidInput: For a similarity that is not above 0, or an alignment outside [similarity, 1].
        """
        if not 0 < similarity <= 1:
            raise InvalidInput("similarity", similarity, "a number above 0 and at most 1")
        if not similarity <= alignment <= 1:
            hint = "Examples of one user are no less alike than those of two."
            raise InvalidInput("alignment", alignment, f"a number from {similarity:g}, the similarity, to 1", hint)
        sizes = tuple(sorted({round(2 ** (i / 8)) for i in range(8 * largest.bit_length())}))
        squares = (similarity / (alignment + (1 - alignment) / size) for size in sizes)
        return cls(name=name, group_sizes=sizes, shares=tuple(math.sqrt(square) for square in squares))

    @classmethod
    def measured(cls, group_sizes: Sequence[int], squares: Sequence[float]) -> Self:
        """From s² measured at some group sizes, the first of which is 1; values below LEAST_SQUARE are taken as it."""
        shares = (math.sqrt(min(max(square, LEAST_SQUARE), 1.0)) for square in squares)
        return cls(name="measured", group_sizes=tuple(group_sizes), shares=tuple(shares))

    def among(self, sizes: UserSizes) -> "SignalCurve":
        """The same of users of these sizes, some of whom own fewer than G examples: the mean of s(min(G, owned))."""
        owned = np.maximum(sizes.sizes, 1)
        means = (np.average(self._at(np.minimum(owned, group)), weights=sizes.users) for group in self.group_sizes)
        return replace(self, shares=tuple(min(1.0, float(mean)) for mean in means))

    def __call__(self, group_size: float) -> float:
        """s(G)."""
        return float(self._at(np.array(group_size)))

    def _at(self, group_sizes: np.ndarray) -> np.ndarray:
        logs: np.ndarray = np.interp(np.log(group_sizes), np.log(self.group_sizes), np.log(self.shares))
        shares: np.ndarray = np.exp(logs)
        return shares


SIMILARITY, ALIGNMENT = 0.1, 0.2
"""Mean cosines between gradients of examples of different users and of one user, where nothing was measured: about
those of a small pre-trained model on text of a kind that is new to it."""
ASSUMED_SIGNAL = SignalCurve.of_similarity("assumed", SIMILARITY, ALIGNMENT)


def effective_rounds(plan: Plan, signal: SignalCurve, parameters: int, noise_ratio: float = 1.0) -> float:
    """T·cos²: rounds without noise, and over all users, that a plan's rounds are worth; at most its steps.

    Args:
        plan: With calibrated noise.
        signal: s(G), of its users (`SignalCurve.among`) where some own fewer than G examples.
        parameters: d, trainable parameters.
        noise_ratio: Noise in what the optimizer makes of all rounds, over that of independent noise at the plan's own
            noise multiplier: `BandsForecast.ratio` for a plan that was calibrated with independent noise.

    Raises:
        InvalidInput: For fewer than one parameter, or a negative ratio.
    """
    require_at_least("noise_ratio", noise_ratio, 0)
    share = signal(plan.rows_per_unit(plan.group_size))
    noise = plan.noise_std / plan.clip_norm * noise_ratio / plan.normaliser
    return worth_of_rounds(plan.steps, share, plan.normaliser, noise, parameters)


def worth_of_rounds(rounds: int, share: float, units: float, noise: float, parameters: int) -> float:
    """T·cos² of the formula above.

    Args:
        rounds: T.
        share: s, above 0 and at most 1.
        units: M, expected units of a round.
        noise: σ/M, on one coordinate of the released mean, in clip norms.
        parameters: d, trainable parameters.

    Raises:
        InvalidInput: For fewer than one parameter.
    """
    require_at_least("parameters", parameters, 1)
    return rounds * share**2 / (share**2 + (1 - share**2) / units + parameters * noise**2)
