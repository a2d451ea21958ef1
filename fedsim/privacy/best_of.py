"""The best of a secret number of runs, as data; what it costs is in `fedsim.privacy.selection`."""

from dataclasses import dataclass
from typing import ClassVar

from fedsim.errors import InvalidInput
from fedsim.privacy.events import EVENTS, Event

LEAST_GAMMA = 1e-12
MOST_ETA = 1e3


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class BestOf(Event):
    """The best of K independent runs by a score that is part of each run's outcome; K and all others stay secret.

    Attributes:
        events: What one run releases, its score included: one of these, whichever setting it drew and whichever role a
            user has in it. At each ε the worst of them counts.
        eta: η > −1, the shape of the law of K: 1 is geometric, 0 logarithmic.
        gamma: γ above 0 and below 1; K is the larger, the smaller it is.
    """

    kind: ClassVar[str] = "best-of"
    events: tuple[Event, ...]
    eta: float
    gamma: float

    def __post_init__(self) -> None:
        if not self.events:
            raise InvalidInput("events", self.events, "at least one")
        if any(isinstance(event, BestOf) for event in self.events):
            raise InvalidInput("events", BestOf.kind, "what one run releases", "A selection among selections is none.")
        if not -1 < self.eta <= MOST_ETA:
            raise InvalidInput("eta", self.eta, f"above −1 and at most {MOST_ETA:g}")
        if not LEAST_GAMMA <= self.gamma < 1:
            raise InvalidInput("gamma", self.gamma, f"at least {LEAST_GAMMA:g} and below 1")
