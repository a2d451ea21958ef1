"""What a mechanism is: one class that gives the clip, the noise, the event and the words of a release."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.clip import Clip
from fedsim.privacy.events import Event
from fedsim.privacy.mechanisms.noise import Noise, Sizes
from fedsim.registry import Choice, Choices


@dataclass(frozen=True, kw_only=True)
class Mechanism(Choice):
    """How a clipped sum is released. A mechanism is a frozen dataclass of this, registered by `MECHANISMS.register`.

    Its fields are its options, set by `--plan.mechanism-options name=value`.

    Attributes:
        norm_order: The norm in which units are clipped, 2 or 1; that of every clip its noise gives.
        secure: Whether its noise can come from a cryptographic generator (`--noise.secure`).
        correlates: Whether its noise is to be correlated over rounds where nothing is said about it.
    """

    norm_order: ClassVar[int] = 2
    secure: ClassVar[bool] = True
    correlates: ClassVar[bool] = False

    @abstractmethod
    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> Noise:
        """The clip and noise of one run, and their state from round to round.

        Args:
            release: What one release is accounted as; None for a run without privacy.
            noise_multiplier: Noise standard deviation over the clip norm; 0 for a run without privacy.
            sizes: Values of each trainable parameter by name, in the order of the flat vector.
        """

    def event(self, sampled: Event) -> Event:
        """What one release is accounted as.

        Args:
            sampled: The event of a plain Gaussian release, at the plan's noise multiplier, of units sampled as the
                plan does. It is right as it stands wherever noise of that multiplier hides one clipped unit.
        """
        return sampled

    def canary(self, clip: Clip, sizes: Sizes) -> np.ndarray:
        """The update that this mechanism hides worst, float64 [P]; the audit attacks with it, scaled up.

        Args:
            clip: The clip of the first round.
            sizes: Values of each parameter by name.
        """
        return clip.extreme(sizes)


MECHANISMS: Choices[Mechanism] = Choices("plan.mechanism")
"""Mechanisms by name."""
