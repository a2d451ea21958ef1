"""Everything that was released, as one event: equal releases counted, and who went through which told apart."""

from collections import Counter
from collections.abc import Iterable

from fedsim.privacy.events import Composed, Event, OfBlock, OfGroup, OneOf, Repeated
from fedsim.privacy.splits import OfSplit


def merged(events: Iterable[Event]) -> Composed:
    """The composition of events, with equal ones merged into Repeated, in order of first appearance.

    Releases to groups are taken as of one assignment of users for each number of groups, as those of one ledger are,
    and become a OneOf of what each group got. A OneOf that is there already stays as it is: its users are assigned
    independently. Rounds of one block are that block, once. Releases to users of one split become a OneOf of
    what either split got.
    """
    counts: Counter[Event] = Counter()
    blocks: set[OfBlock] = set()
    groups: dict[int, dict[int, Counter[Event]]] = {}
    splits: dict[str, Counter[Event]] = {}
    for event in events:
        for part, count in _parts(event).items():
            if isinstance(part, OfGroup):
                groups.setdefault(part.groups, {}).setdefault(part.group, Counter())[part.event] += count
            elif isinstance(part, OfSplit):
                splits.setdefault(part.split, Counter())[part.event] += count
            elif isinstance(part, OfBlock):
                counts[part.event] += part not in blocks
                blocks.add(part)
            else:
                counts[part] += count
    together: list[Event] = []
    for event, count in counts.items():
        # Equal alternatives stay apart: a user may be in another of them each time.
        together += [event] * count if isinstance(event, OneOf) else [Repeated(event=event, count=count)] * (count > 0)
    apart = [OneOf(events=tuple(_composed(group) for group in parts.values())) for parts in groups.values()]
    if splits:
        each = {
            split: merged(Repeated(event=one, count=number) for one, number in of.items())
            for split, of in splits.items()
        }
        apart.append(OneOf(events=tuple(OfSplit(event=event, split=split) for split, event in each.items())))
    return Composed(events=(*together, *apart))


def _parts(event: Event) -> Counter[Event]:
    """Single events, releases to groups and alternatives within an event, and how often each occurs."""
    if isinstance(event, Repeated):
        return Counter({inner: count * event.count for inner, count in _parts(event.event).items()})
    if isinstance(event, Composed):
        return sum((_parts(inner) for inner in event.events), Counter())
    return Counter({event: 1})


def _composed(counts: Counter[Event]) -> Event:
    repeated = tuple(Repeated(event=event, count=count) for event, count in counts.items())
    return repeated[0] if len(repeated) == 1 else Composed(events=repeated)
