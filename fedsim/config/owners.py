"""Whether the guarantee that is asked for is one for the data: examples of several owners have one of their own."""

from fedsim.data.config import DataConfig
from fedsim.errors import InvalidInput
from fedsim.privacy.events import Adjacency


def require_guarantee_for(data: DataConfig, adjacency: Adjacency, chooses: str) -> None:
    """Refuse another before the data is read. A prepared store is asked when it is opened.

    Args:
        data: Where the data comes from.
        adjacency: The change of it that is to stay hidden.
        chooses: What a command chooses between, by results; empty for one that chooses nothing.

    Raises:
        InvalidInput: Names the adjacency.
    """
    fixed, keeps = adjacency is Adjacency.FIXED_GRAPH, data.several_owners == "keep"
    if keeps and not fixed:
        hint = "Examples of several owners are not hidden as those of one are (docs/data.md)."
        allowed = f"{Adjacency.FIXED_GRAPH.value} with --data.several-owners keep"
        raise InvalidInput("plan.adjacency", adjacency.value, allowed, hint)
    if fixed and not keeps and data.source != "store":
        hint = "fixed-graph claims less, and is for examples of several owners: --data.several-owners keep."
        raise InvalidInput("plan.adjacency", adjacency.value, "add-or-remove-one-user with this data", hint)
    if fixed and chooses:
        hint = "It is for els alone, and predictions know no examples of several owners."
        raise InvalidInput("plan.adjacency", adjacency.value, "given to train alone", hint)
