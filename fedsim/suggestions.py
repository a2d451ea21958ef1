"""What may have been meant by a name that there is not."""

import difflib
import re
from collections.abc import Iterable

SEPARATORS = re.compile(r"[._-]+")
SURE = 0.9
CLOSE = 0.75
"""How alike two spellings must be, by `difflib`'s ratio."""


def suggested(name: str, known: Iterable[str], *, first: Iterable[str] = (), most: int = 3) -> list[str]:
    """Names that are misspelt, abbreviated (`lr`, `eps`) or cut short by the one given; the likeliest first.

    Names may have a group before their last dot. A name that is right but for its group comes first, then the ones of
    the group that was given.

    Args:
        name: What was given.
        known: The names that there are.
        first: Those of them that come before others as good.
        most: How many to return.
    """
    group, own = _parted(name)
    preferred = set(first)

    def rank(other: str) -> tuple[float, ...] | None:
        its_group, its_own = _parted(other)
        likeness = _likeness(own, its_own)
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        if likeness is None and whole < CLOSE:
            return None
        return (
            -(likeness or whole),
            group != its_group if group else 0,
            other not in preferred,
            its_group.count("."),
            len(other),
        )

    ranked = sorted((found, other) for other in known if (found := rank(other)) is not None)
    if ranked and ranked[0][0][0] <= -SURE:  # nothing else was meant
        ranked = [(found, other) for found, other in ranked if found[:3] == ranked[0][0][:3]]
    return [other for _, other in ranked[:most]]


def _parted(name: str) -> tuple[str, str]:
    group, _, own = name.rpartition(".")
    return group, own


def _likeness(given: str, own: str) -> float | None:
    """How well a name is told by another, 1 for the same; None where it is not."""
    words, own_words = SEPARATORS.split(given), SEPARATORS.split(own)
    if words == own_words:
        return 1.0
    if given == "".join(word[:1] for word in own_words) and len(given) > 1:
        return 0.95
    if len(given) > 1 and own.startswith(given):
        return 0.9
    ratio = difflib.SequenceMatcher(None, given, own).ratio()
    if ratio >= CLOSE:
        return ratio
    if any(difflib.get_close_matches(word, own_words, n=1, cutoff=0.8) for word in words if len(word) > 2):
        return 0.5
    return None
