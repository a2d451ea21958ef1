"""Users who are trained on and users who are held out: releases about the ones alone, and about the others.

Which of the two a user is follows from a keyed hash of the user's own id: from nobody's data, and from no other user.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedsim.errors import InvalidInput
from fedsim.privacy.events import EVENTS, Composed, Event, OneOf, Repeated

TRAINING, HELD_OUT = "training", "held-out"
SPLITS = (TRAINING, HELD_OUT)


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class OfSplit(Event):
    """A release about the users of one split alone, for the whole run.

    One line of a ledger. Such lines of one ledger speak of the same split; `fedsim.privacy.merged.merged` makes them
    one `OneOf`, as parallel composition has it. By itself it counts as about everybody. What a ledger holds beside
    them, the runs that its run went on from, is about everybody too: there the split may have been another.

    Attributes:
        event: What is released.
        split: Of whom: TRAINING or HELD_OUT.
    """

    kind: ClassVar[str] = "of-split"
    event: Event
    split: str

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InvalidInput("split", self.split, " or ".join(SPLITS))


def of_split(event: Event, split: str) -> Event:
    """What users of one split go through, of an event in which a split is told apart once, as of one ledger.

    Args:
        event: Merged or not.
        split: TRAINING or HELD_OUT.

    Returns:
        The event without what is about the other split; as it is where it tells of no splits.
    """
    if isinstance(event, OfSplit):
        return event.event if event.split == split else Composed(events=())
    if isinstance(event, OneOf) and any(isinstance(one, OfSplit) for one in event.events):
        return Composed(events=tuple(of_split(one, split) for one in event.events))
    if isinstance(event, Composed):
        return Composed(events=tuple(of_split(one, split) for one in event.events))
    if isinstance(event, Repeated):
        return Repeated(event=of_split(event.event, split), count=event.count)
    return event
