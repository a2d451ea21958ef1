"""Bytes and memory of a round by design, for each form of the sum.

W workers on N nodes, W/N on each, one of them the driver's; a sum has B bytes (4 P, or 8 P in exact mode).

server: every sum comes to the driver, so W B bytes enter it, (W − W/N) B of them over the network. Its node holds W
    sums where all arrive at once; another node holds its W/N until they are fetched.
nodes: N sums enter the driver, (N − 1) B over the network. Each node holds its W/N sums until they are added, the
    summing actor's buffer, and the copy of it that is handed over; the driver's node also one fetched sum and the
    total.
workers: no sum enters the driver or leaves its worker whole. Each of the W workers ends up with the sum of B/W bytes
    of coordinates, beside its own sum, which it holds until the round is over. Into each of them come at least
    (W − 1)/W B of others' sums, and (W − 1)/W 4 P of their new parameters.

Not counted is what all share: the driver's parameters, one copy of them a node, and each worker's own sum and model
while it computes. The driver's total of the server's form is one of the W. Nor, of the workers' form, the parameters
that each of them holds, twice while they commit, and its share of the optimizer's state, with its neighbour's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Design:
    """What one round takes, in bytes.

    Attributes:
        ingress: What enters the driver's process.
        network: Of it, what comes from other nodes.
        driver_node: Memory for sums on the driver's node at most, all workers being done at once.
        other_node: The same on another node.
    """

    ingress: int
    network: int
    driver_node: int
    other_node: int


def of_server(workers: int, nodes: int, size_bytes: int) -> Design:
    """Today's form."""
    here = workers // nodes
    return Design(
        ingress=workers * size_bytes,
        network=(workers - here) * size_bytes,
        driver_node=workers * size_bytes,
        other_node=here * size_bytes,
    )


def of_nodes(workers: int, nodes: int, size_bytes: int) -> Design:
    """A summing actor on each node."""
    here = workers // nodes
    return Design(
        ingress=nodes * size_bytes,
        network=(nodes - 1) * size_bytes,
        driver_node=(here + 4) * size_bytes,
        other_node=(here + 2) * size_bytes,
    )


def of_workers(workers: int, nodes: int, size_bytes: int) -> Design:
    """Collectives among workers: each worker's own sum stays, beside its share of the total."""
    here = workers // nodes
    held = here * (size_bytes + size_bytes // workers)
    return Design(ingress=0, network=0, driver_node=held, other_node=held)


FORMS = {"server": of_server, "nodes": of_nodes, "workers": of_workers}
"""By the value of --engine.sums. Another form is another entry."""
