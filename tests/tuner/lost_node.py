"""Two lanes on two nodes, one of which is lost: run by `test_lanes.py` as a process of its own.

    python lost_node.py DIRECTORY DATASET

`DIRECTORY` holds the module `recorded`, whose models write a line whenever they begin to train.
"""

import sys
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from trainables.configuration import TrainingSettings, TrialConfiguration
from tuner import lanes as lanes_module
from tuner.cluster import Lanes
from tuner.lanes import open_lanes, queue_actor
from tuner.messages import Ended, Report, TrialTask

NAMES = ["one", "two"]


def task(directory: Path, dataset: str, name: str) -> TrialTask:
    """A trial that trains until the node is gone."""
    configuration = TrialConfiguration.create(
        "recorded:Recorded",
        {"record": str(directory / name), "other": str(directory / "gone"), "other_lines": 1},
        training=TrainingSettings(epochs=1),
    )
    return TrialTask(
        id=name,
        dataset=dataset,
        configuration=configuration.model_dump(mode="json"),
        objectives=("mean_auc",),
        checkpoint=str(directory / "checkpoints" / name),
        state=str(directory / "states" / name),
    )


def lines(directory: Path, name: str) -> list[str]:
    """The processes that began to train a trial."""
    path = directory / name
    return path.read_text().splitlines() if path.exists() else []


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs still."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def last_message(queue: ray.actor.ActorHandle, name: str) -> Report | Ended:
    """Let a trial go on to its end."""
    while True:
        message: Report | Ended = ray.get(queue.next_message.remote(name))
        if isinstance(message, Ended) or message.last:
            return message


def main(directory: Path, dataset: str) -> None:
    """Lose the second node while both lanes train, and say what became of their trials."""
    lanes_module.MAX_RUNS = 1
    lanes_module.CLOSE_TIMEOUT_S = 5.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    lost_node = cluster.add_node(num_cpus=1)  # after this process has joined the head's node
    lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0)
    queue = queue_actor().remote()
    storage = str(directory / "train")
    with open_lanes(lanes, queue, job="node", storage_path=storage, on_lost=print):
        ray.get([queue.submit.remote(task(directory, dataset, name)) for name in NAMES])
        while not all(lines(directory, name) for name in NAMES):
            time.sleep(0.05)
        workers = [psutil.Process(int(lines(directory, name)[0])) for name in NAMES]
        cluster.remove_node(lost_node, allow_graceful=False)
        while all(is_alive(worker) for worker in workers):
            time.sleep(0.05)
        (directory / "gone").write_text("yes\n")
        reports = [isinstance(last_message(queue, name), Report) for name in NAMES]
    begun = sorted(len(lines(directory, name)) for name in NAMES)
    sys.stdout.write(f"reports {sum(reports)}, begun {begun}\n")
    sys.stdout.flush()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
