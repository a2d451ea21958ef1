"""The release: sum, add noise, then divide by a public constant; and what the next round learns from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsim.plan import Plan
from fedsim.privacy.mechanisms.registry import mechanism_named
from fedsim.randomness import stream
from fedsim.secure_noise import SecureNoise

CLIP = "clip_norm"


class Release:
    """What leaves the server each round, and the mechanism's state between rounds, made of released values alone.

    Args:
        plan: Names the mechanism; its noise multiplier is that of the whole release.
        sizes: Values of each parameter by name, in the order of the flat vector.
        noise_seed: Seed or secret key of the noise; None draws it from a cryptographic generator, under a new key for
            each release.
    """

    def __init__(self, plan: Plan, sizes: Mapping[str, int], noise_seed: int | bytes | None) -> None:
        self.plan = plan
        self.clip_norm = plan.clip_norm
        self.clip_rule = plan.clip_rule
        self._noise_seed = noise_seed
        chosen = mechanism_named(plan.mechanism)
        event = plan.step_event() if plan.noise_multiplier > 0 else None
        self._noise = chosen.noise(event, plan.sum_noise_multiplier, sizes)

    def scales(self) -> dict[str, float]:
        """Scales of the whitened clip in the coming round, by parameter name; empty where all are 1."""
        return dict(self._noise.scales())

    @property
    def norm_bound(self) -> float:
        """Largest L2 norm of one unit's clipped update in the coming round."""
        return self.clip_norm * max(self._noise.scales().values(), default=1.0)

    def noised_mean(self, total: np.ndarray, round: int, *, attempt: int = 0, resolution: float = 0.0) -> np.ndarray:
        """(total + noise)/normaliser, in place: the released mean.

        The noise of one round is drawn from its own keyed stream and never used for another sum. Divided by the
        expected, never the realised, number of units: the latter would leak who took part.

        Args:
            total: The clipped sum, float32 or (from exact sums) float64 [P]; overwritten.
            round: The round, from 0.
            attempt: How often the round was released before (and lost); each attempt has noise of its own.
            resolution: Step of the grid that exact sums lie on; 0 for float sums.
        """
        self._noise.add(total, self.clip_norm, self._source("noise", round, attempt, resolution))
        total /= total.dtype.type(self.plan.normaliser)
        return total

    def observe(
        self,
        released: np.ndarray,
        parameters: np.ndarray,
        statistics: Mapping[str, float],
        round: int,
        *,
        attempt: int = 0,
    ) -> None:
        """Prepare the next round from this one's release, and from a noised count where the clip norm follows one.

        Args:
            released: The released mean [P].
            parameters: The parameters [P] it belongs to, before the step.
            statistics: Private sums over the units: "units" and "clipped_units" enter, noised.
            round: The round.
            attempt: How often the round was released before.
        """
        self._noise.observe(released, parameters)
        if self.clip_rule is not None:
            fraction = self.clip_rule.noised_fraction(
                statistics["units"] - statistics.get("clipped_units", 0.0),
                statistics["units"],
                self._source("clip-count", round, attempt),
                private=self.plan.noise_multiplier > 0,
            )
            self.clip_norm = self.clip_rule.moved(self.clip_norm, fraction)

    def _source(self, purpose: str, round: int, attempt: int, resolution: float = 0.0) -> Any:
        """Where the noise of one release comes from; used for nothing else."""
        if self._noise_seed is None:
            return SecureNoise(resolution)
        return stream(self._noise_seed, purpose, *((round, attempt) if attempt else (round,)))

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays; made of released values alone."""
        return {CLIP: np.array(self.clip_norm), **self._noise.state()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned."""
        self.clip_norm = float(arrays[CLIP])
        self._noise.load_state(arrays)
