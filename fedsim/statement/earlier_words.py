"""What a statement says of the runs that training went on from."""

import math

from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.bounds import shown_above
from fedsim.privacy.earlier import Earlier
from fedsim.privacy.events import Adjacency, Composed, Event, to_json


def going_on_in_words(earlier: Earlier, limit: float, delta: float, adjacency: Adjacency) -> str:
    """What is said where training goes on from earlier runs: what of the limit on ε is spent."""
    runs = ", ".join(earlier.names)
    if earlier.others:
        return f"Training goes on from {runs}. That its data was other people's is your word; the statement says so."
    spent = shown_epsilon(earlier.event, delta, adjacency)
    return f"Training goes on from {runs}, which spent ε = {spent} of the {limit:g} that all of it may spend."


def whose_models(earlier: Earlier) -> str:
    """Whose models the guarantee is about, as the beginning of a sentence."""
    if not earlier.names or earlier.others:
        return "The models of this run alone are"
    runs = ", ".join(earlier.names)
    return f"The models of this run and of what it went on from ({runs}) together are"


def whole_in_words(earlier: Earlier, charged: Event, delta: float, adjacency: Adjacency) -> str:
    """What of ε is from before, and whose word is taken for what, in sentences; empty for a run that began afresh.

    Args:
        earlier: The runs.
        charged: What this run itself was charged.
        delta, adjacency: At which ε is stated.
    """
    if not earlier.names:
        return ""
    runs = ", ".join(earlier.names)
    if not earlier.others:
        before = shown_epsilon(earlier.event, delta, adjacency)
        return (
            f" Training went on from {runs}: the charges made there come first in the ledger, and ε is of all of them "
            f"together. Before this run it was {before} at the same δ."
        )
    both = shown_epsilon(Composed(events=(earlier.all_events, charged)), delta, adjacency)
    return (
        f" Training went on from {runs}, whose charges are not counted here: whoever ran this says that nobody whose "
        f"data was used there is in the data of this run. Nothing checks it. Somebody who is in both has ε = {both} "
        "at the same δ; somebody who is in the earlier data alone, what was stated there."
    )


def shown_epsilon(event: Event, delta: float, adjacency: Adjacency) -> str:
    """ε of an event, rounded up."""
    upper = epsilon_bounds(event, delta, adjacency=adjacency).upper
    return "∞" if math.isinf(upper) else shown_above(upper)


def earlier_json(earlier: Earlier) -> dict[str, object]:
    """The same as JSON values."""
    return {
        "runs": list(earlier.names),
        "people": "others" if earlier.others else "same",
        "event": to_json(earlier.all_events),
    }
