import pytest

from tuner.cluster import Lanes, Node, plan_lanes
from tuner.errors import ClusterError
from tuner.job import ResourceSettings


def lanes(num_lanes: int, workers: int = 1, cpus: int = 1, gpus: float = 0.0) -> Lanes:
    return Lanes(
        num_lanes=num_lanes, workers_per_lane=workers, cpus_per_worker=cpus, gpus_per_worker=gpus
    )


def node(cpus: float, gpus: float = 0, gigabytes: float = 0) -> Node:
    size_bytes = int(gigabytes * 1024**3)
    return Node(id="node", address="10.0.0.1", cpus=cpus, gpus=gpus, memory_bytes=size_bytes)


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "planned"),
    [
        ({}, 2, 0, lanes(2)),
        ({}, 16, 1, lanes(1, cpus=4, gpus=1.0)),
        ({}, 4, 8, lanes(4, gpus=1.0)),
        ({"lanes": 1}, 16, 4, lanes(1, cpus=4, gpus=1.0)),
        ({"lanes": 1}, 2, 0, lanes(1, cpus=2)),
        ({"lanes": 3}, 16, 0, lanes(3, cpus=5)),
        ({"workers_per_lane": 2}, 5, 0, lanes(2, workers=2)),
        ({"cpus_per_worker": 2}, 7, 0, lanes(3, cpus=2)),
        ({"workers_per_lane": 2, "cpus_per_worker": 4}, 16, 4, lanes(2, 2, 4, 1.0)),
        ({"gpus_per_worker": 0}, 16, 4, lanes(16)),
        ({"gpus_per_worker": 0.1}, 16, 1, lanes(10, gpus=0.1)),
        (
            {"gpus_per_worker": 0.5, "workers_per_lane": 2},
            16,
            2,
            lanes(2, workers=2, cpus=4, gpus=0.5),
        ),
    ],
)
def test_as_many_lanes_as_the_cluster_holds(
    settings: dict[str, float], cpus: float, gpus: float, planned: Lanes
) -> None:
    assert plan_lanes(ResourceSettings(**settings), [node(cpus, gpus)]) == planned


@pytest.mark.parametrize(
    ("settings", "nodes", "free", "planned"),
    [
        ({}, [node(64, gigabytes=8)], None, lanes(4, cpus=16)),
        ({}, [node(4, gigabytes=8)], None, lanes(4)),
        ({}, [node(4, gigabytes=1)], None, lanes(1, cpus=4)),
        ({"lanes": 4}, [node(4, gigabytes=1)], None, lanes(4)),
        ({"workers_per_lane": 2}, [node(64, gigabytes=6)], None, lanes(2, workers=2, cpus=16)),
        ({"lanes": 3}, [node(4), node(4)], None, lanes(3, cpus=2)),
        ({"lanes": 2}, [node(8)], {"CPU": 5.0}, lanes(2, cpus=2)),
        ({}, [node(8)], {"CPU": 3.0}, lanes(3)),
        ({}, [node(8)], {"CPU": 0.0}, lanes(1)),
    ],
)
def test_lanes_share_cores_and_memory_and_leave_other_jobs_theirs(
    settings: dict[str, int], nodes: list[Node], free: dict[str, float] | None, planned: Lanes
) -> None:
    assert plan_lanes(ResourceSettings(**settings), nodes, free=free) == planned


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "message"),
    [
        (
            {"lanes": 3},
            *(2, 0),
            "resources: 3 lane(s) of 1 worker(s) need 3 CPUs and 0 GPUs, the cluster has 2 and 0; "
            "set resources.lanes to 2 or less",
        ),
        (
            {"workers_per_lane": 4, "cpus_per_worker": 2},
            *(6, 0),
            "resources: 1 lane(s) of 4 worker(s) need 8 CPUs and 0 GPUs, the cluster has 6 and 0; "
            "ask for less per lane",
        ),
        (
            {"gpus_per_worker": 1},
            *(6, 0),
            "resources: 1 lane(s) of 1 worker(s) need 1 CPUs and 1 GPUs, the cluster has 6 and 0; "
            "ask for less per lane",
        ),
        (
            {"lanes": 4, "gpus_per_worker": 0.5},
            *(8, 1),
            "resources: 4 lane(s) of 1 worker(s) need 4 CPUs and 2 GPUs, the cluster has 8 and 1; "
            "set resources.lanes to 2 or less",
        ),
    ],
)
def test_lanes_that_do_not_fit_are_refused(
    settings: dict[str, float], cpus: float, gpus: float, message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        plan_lanes(ResourceSettings(**settings), [node(cpus, gpus)])
    assert str(caught.value) == message
