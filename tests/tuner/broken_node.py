"""Two lanes on two nodes, one of which cannot load a dataset: run by `test_lanes.py`.

    python broken_node.py DIRECTORY DATASET

The module `recorded` is on the path, see `lost_node`; `DIRECTORY` is for its lines.
"""

import sys
from pathlib import Path

import ray
from lost_node import last_message, task
from ray.cluster_utils import Cluster

from datasets.node_cache import CACHE_VARIABLE
from tuner import lanes as lanes_module
from tuner.cluster import Lanes
from tuner.lanes import open_lanes, queue_actor
from tuner.messages import Report

NUM_TRIALS = 6


def main(directory: Path, dataset: str) -> None:
    """Search on both nodes, and say what became of the trials and of the lanes."""
    lanes_module.MAX_RUNS = 1
    lanes_module.CLOSE_TIMEOUT_S = 5.0
    in_the_way = directory / "in-the-way"
    in_the_way.write_text("no directory")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.add_node(num_cpus=1, env_vars={CACHE_VARIABLE: str(in_the_way)})
    lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0)
    queue, lost = queue_actor().remote(), list[tuple[str, int]]()

    def lose(reason: str, num_left: int) -> None:
        lost.append((reason, num_left))
        (directory / "gone").write_text("yes\n")  # the healthy lane's first trial waits for it

    names = [f"broken-{number}" for number in range(NUM_TRIALS)]
    storage = str(directory / "train")
    with open_lanes(lanes, queue, job="broken", storage_path=storage, on_lost=lose):
        ray.get([queue.submit.remote(task(directory, dataset, name)) for name in names])
        reports = [isinstance(last_message(queue, name), Report) for name in names]
    sys.stdout.write(f"reports {sum(reports)}, lost {lost}\n")
    sys.stdout.flush()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
