"""A release that hides nobody: what stands for a run without noise where others are composed with it."""

from dataclasses import dataclass
from typing import ClassVar

from fedsim.privacy.events import EVENTS, Event


@EVENTS.register
@dataclass(frozen=True, kw_only=True)
class Unprotected(Event):
    """Something about every user, released without noise or with noise that is known: ε is infinite at any δ below 1.

    It has no dominating pair: the accountant answers for it. A ledger holds it in place of charges that a run without
    a guarantee never made, so that whatever goes on from that run states none either.
    """

    kind: ClassVar[str] = "unprotected"
    tight: ClassVar[bool] = True
