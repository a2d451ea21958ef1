"""What is accounted of a release with Laplace noise of random scale."""

from dataclasses import dataclass
from typing import ClassVar

from fedsim.privacy.events import EVENTS, Event
from fedsim.privacy.mechanisms.laplace.inverse_scale import Law, check_law
from fedsim.validation import require_at_least, require_probability


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class RandomisedScaleLaplace(Event):
    """A sum of contributions clipped in L1, released with Laplace noise whose inverse scale is drawn from a law.

    A user has K ~ Binomial(G, p) contributions in the sum, each of L1 norm at most 1: G = 1 and p = q for user-level
    sampling, group size and example probability for example-level sampling.

    Attributes:
        law: Law of the inverse scale, relative to the clip norm, as `mechanisms.laplace.inverse_scale` describes it.
        sampling_probability: q or p.
        group_size: G.
    """

    kind: ClassVar[str] = "randomised-scale-laplace"
    law: Law
    sampling_probability: float = 1.0
    group_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", check_law(self.law))
        require_probability("sampling_probability", self.sampling_probability)
        require_at_least("group_size", self.group_size, 1)
