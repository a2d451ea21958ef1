"""A module of somebody's own, with a kind of release that the project does not know; tests write it elsewhere."""

OWN = """
from dataclasses import dataclass
from typing import ClassVar

from fedsim.privacy import dominating_pairs
from fedsim.privacy.events import EVENTS, Event, Gaussian


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class Own(Event):
    kind: ClassVar[str] = "own"

    noise_multiplier: float


@dominating_pairs.register(Own)
def _(event, adjacency):
    return dominating_pairs.dominating_pair(Gaussian(noise_multiplier=event.noise_multiplier), adjacency)
"""
