"""One Ray cluster of two nodes on this machine, started once for all tests of this folder."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

CPUS_PER_NODE = 4
SYSTEM = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
"""Ray looks after its nodes so often, where one that is gone refuses at once; one that is slow gets its usual time."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two raylets of four pretended cores each; nothing is connected to it yet."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS_PER_NODE,
            "object_store_memory": 200 << 20,
            "include_dashboard": False,
            "_system_config": SYSTEM,
        },
    )
    made.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=200 << 20)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()
