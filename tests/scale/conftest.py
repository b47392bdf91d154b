"""A cluster of Ray on this machine: two nodes, which share one network address."""

import os
from collections.abc import Iterator

import pytest
from processes import children, wait_until

STORE_BYTES = 80 * 2**20


class TwoNodes:
    """The tests' own node, and another one with room for two actors that require `prefill`."""

    def __init__(self) -> None:
        # Ray is a large package, so it is imported only when a test needs it.
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
            },
        )
        self.add()
        ray.init(address=self._cluster.address, logging_level="ERROR", log_to_driver=False)

    def add(self) -> None:
        """Start the other node."""
        self._other = self._cluster.add_node(
            num_cpus=1, object_store_memory=STORE_BYTES, resources={"prefill": 2}
        )

    def remove(self) -> None:
        """End the other node and its processes, like a power cut."""
        self._cluster.remove_node(self._other, allow_graceful=False)

    def close(self) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _settings() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Else everything else on the machine comes before Ray's actors, and they time out.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # On a machine under load a frontend takes longer to start than Serve allows.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    before = children()
    cluster = TwoNodes()
    yield cluster
    cluster.close()
    wait_until(lambda: children() <= before, "processes of Ray are left")
