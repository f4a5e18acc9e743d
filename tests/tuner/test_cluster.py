from dataclasses import replace
from typing import Any

import pytest

from tuner.cluster import Lanes, Node, plan_lanes
from tuner.errors import ClusterError
from tuner.job import ResourceSettings


def lanes(num_lanes: int, workers: int = 1, cpus: int = 1, gpus: float = 0.0) -> Lanes:
    return Lanes(
        num_lanes=num_lanes, workers_per_lane=workers, cpus_per_worker=cpus, gpus_per_worker=gpus
    )


def nodes(*sizes: tuple[float, float]) -> list[Node]:
    """Nodes of so many CPUs and GPUs."""
    return [
        Node(id=f"node{number}", address=f"10.0.0.{number}", cpus=cpus, gpus=gpus)
        for number, (cpus, gpus) in enumerate(sizes)
    ]


def refusal(settings: dict[str, Any], *sizes: tuple[float, float], **known: Any) -> str:
    with pytest.raises(ClusterError) as caught:
        plan_lanes(ResourceSettings(**settings), nodes(*sizes), **known)
    return str(caught.value)


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
        ({"gpus_per_worker": 0.5}, 16, 2, lanes(4, cpus=4, gpus=0.5)),
        ({"gpus_per_worker": 0.6}, 16, 2, lanes(2, cpus=4, gpus=0.6)),
        ({"gpus_per_worker": 0.34}, 16, 2, lanes(4, cpus=4, gpus=0.34)),
        ({"gpus_per_worker": 2}, 16, 5, lanes(2, cpus=4, gpus=2.0)),
    ],
)
def test_as_many_lanes_as_the_cluster_holds(
    settings: dict[str, float], cpus: float, gpus: float, planned: Lanes
) -> None:
    assert plan_lanes(ResourceSettings(**settings), nodes((cpus, gpus))) == planned


@pytest.mark.parametrize(
    ("settings", "sizes", "planned"),
    [
        ({"cpus_per_worker": 2}, [(3, 0), (3, 0)], lanes(2, cpus=2)),
        ({"cpus_per_worker": 2, "workers_per_lane": 2}, [(3, 0), (3, 0)], lanes(1, 2, 2)),
        ({"workers_per_lane": 4}, [(2, 0), (2, 0)], lanes(1, workers=4)),
        ({}, [(0, 0), (2, 0), (3, 0)], lanes(5)),
        ({}, [(8, 0), (2, 4)], lanes(2, gpus=1.0)),
        ({"gpus_per_worker": 0.6}, [(4, 1), (4, 1)], lanes(2, cpus=4, gpus=0.6)),
    ],
)
def test_each_worker_finds_room_on_one_node(
    settings: dict[str, float], sizes: list[tuple[float, float]], planned: Lanes
) -> None:
    assert plan_lanes(ResourceSettings(**settings), nodes(*sizes)) == planned


@pytest.mark.parametrize(
    ("free", "num_lanes"),
    [
        ({"CPU": 8.0}, 8),
        ({"CPU": 3.0}, 3),
        ({"CPU": 3.9}, 3),
        ({"CPU": 0.0}, 1),
        ({}, 1),
        ({"CPU": 100.0}, 8),
    ],
)
def test_what_other_jobs_hold_lowers_the_default_number_but_never_below_one(
    free: dict[str, float], num_lanes: int
) -> None:
    assert plan_lanes(ResourceSettings(), nodes((4, 0), (4, 0)), free=free) == lanes(num_lanes)


@pytest.mark.parametrize(
    ("settings", "cpus", "gigabytes", "planned"),
    [
        ({}, 64, 6, lanes(4, cpus=16)),
        ({}, 4, 6, lanes(4)),
        ({}, 4, 1, lanes(1, cpus=4)),
        ({"lanes": 4}, 4, 1, lanes(4)),
        ({"workers_per_lane": 2}, 64, 6, lanes(2, workers=2, cpus=16)),
    ],
)
def test_memory_bounds_the_default_number_and_fewer_lanes_have_more_cores(
    settings: dict[str, int], cpus: float, gigabytes: int, planned: Lanes
) -> None:
    node = replace(*nodes((cpus, 0)), memory_bytes=gigabytes * 1024**3)
    assert plan_lanes(ResourceSettings(**settings), [node]) == planned


def with_memory(*sizes: tuple[float, int]) -> list[Node]:
    """Nodes of so many CPUs and GiB of memory."""
    return [
        replace(node, memory_bytes=gigabytes * 1024**3)
        for node, (_, gigabytes) in zip(
            nodes(*((cpus, 0) for cpus, _ in sizes)), sizes, strict=True
        )
    ]


@pytest.mark.parametrize(
    ("sizes", "num_lanes"),
    [
        ([(16, 6)], 4),
        ([(0, 40), (16, 6)], 4),  # a head that holds no worker lends its memory to none
        ([(2, 40), (16, 6)], 6),
        ([(16, 1), (16, 6)], 4),
        ([(16, 0), (16, 6)], 20),  # of the first nothing is known
    ],
)
def test_the_memory_of_a_node_bounds_its_own_workers_alone(
    sizes: list[tuple[float, int]], num_lanes: int
) -> None:
    assert plan_lanes(ResourceSettings(), with_memory(*sizes)).num_lanes == num_lanes


def test_lanes_share_the_cores_of_their_node_that_other_jobs_leave() -> None:
    three, two = ResourceSettings(lanes=3), ResourceSettings(lanes=2)
    assert plan_lanes(three, nodes((4, 0), (4, 0))) == lanes(3, cpus=2)
    assert plan_lanes(two, nodes((8, 0)), free={"CPU": 5.0}) == lanes(2, cpus=2)


def test_free_gpus_bound_the_default_number_too() -> None:
    planned = plan_lanes(ResourceSettings(), nodes((16, 4)), free={"CPU": 16.0, "GPU": 2.0})
    assert planned == lanes(2, cpus=4, gpus=1.0)


def test_a_number_that_fits_when_other_jobs_end_is_never_refused() -> None:
    settings = ResourceSettings(lanes=8)
    assert plan_lanes(settings, nodes((4, 0), (4, 0)), free={}) == lanes(8)
    assert "; set resources.lanes to 8 or less, or" in refusal(
        {"lanes": 9}, (4, 0), (4, 0), free={"CPU": 8.0}
    )


def test_what_an_autoscaler_may_add_can_be_waited_for() -> None:
    with_gpus = ResourceSettings(lanes=4, gpus_per_worker=1, autoscaled=True)
    assert plan_lanes(with_gpus, nodes((0, 0))) == lanes(4, gpus=1.0)
    assert plan_lanes(ResourceSettings(autoscaled=True), nodes((0, 0))) == lanes(1)
    settings = ResourceSettings(
        lanes=8, workers_per_lane=2, cpus_per_worker=2, gpus_per_worker=0, autoscaled=True
    )
    assert plan_lanes(settings, nodes((4, 0))) == lanes(8, 2, 2)
    assert refusal({"gpus_per_worker": 1}, (0, 0)).endswith(
        "ask for less per lane, or resources.autoscaled to true where nodes are added as they are "
        "asked for"
    )


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
    assert refusal(settings, (cpus, gpus)) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lanes": 3, "cpus_per_worker": 2},
            "resources: 3 lane(s) of 1 worker(s) need 6 CPUs and 0 GPUs, the cluster has 6 and 0 "
            "on 2 nodes (the largest 3 and 0; a worker needs 2 and 0 on one node); "
            "set resources.lanes to 2 or less",
        ),
        (
            {"cpus_per_worker": 4},
            "resources: 1 lane(s) of 1 worker(s) need 4 CPUs and 0 GPUs, the cluster has 6 and 0 "
            "on 2 nodes (the largest 3 and 0; a worker needs 4 and 0 on one node); "
            "ask for less per lane",
        ),
    ],
)
def test_of_several_nodes_the_largest_is_named(settings: dict[str, Any], message: str) -> None:
    growing = ", or resources.autoscaled to true where nodes are added as they are asked for"
    assert refusal(settings, (3, 0), (3, 0)) == message + growing
