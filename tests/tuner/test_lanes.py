"""Lanes on a real Ray, without Ray Tune: the tests are the queue's other side."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from datasets import Dataset
from trainables.configuration import TrainingSettings, TrialConfiguration
from tuner import lanes as lanes_module
from tuner.cluster import Lanes
from tuner.lanes import open_lanes, queue_actor, spread_lanes
from tuner.messages import Ended, Report, TrialTask

MODELS = """
import os, pathlib, signal, time
from torch import nn
from trainables.models import Inputs

class Recorded(nn.Module):
    '''Writes a line whenever it begins to train; may wait for another's lines, and may die.'''

    num_heads = 2

    def __init__(self, inputs: Inputs, *, record: str = "", other: str = "", other_lines: int = 0,
                 deaths: int = 0) -> None:
        super().__init__()
        self.record, self.other = pathlib.Path(record), pathlib.Path(other)
        self.other_lines, self.deaths, self.begun = other_lines, deaths, False
        self.linear = nn.Linear(inputs.num_numericals, 2)

    def forward(self, ids, numericals):
        if self.training and not self.begun and ids.device.type != "meta":
            self.begin()
        return self.linear(numericals)

    def begin(self):
        self.begun = True
        with self.record.open("a") as lines:
            lines.write(f"{os.getpid()}\\n")
        while num_lines(self.other) < self.other_lines:
            time.sleep(0.05)
        if num_lines(self.record) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)

def num_lines(path):
    return len(path.read_text().splitlines()) if path.is_file() else 0
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the models and the storage lie, on the path of this process and of Ray's workers."""
    directory = tmp_path_factory.mktemp("lanes")
    (directory / "recorded.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(directory)
        monkeypatch.setenv("PYTHONPATH", ":".join([str(directory), *filter(None, sys.path)]))
        yield directory


@pytest.fixture
def ray_of_three_cores(directory: Path) -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def task(directory: Path, dataset: Dataset, name: str, **settings: Any) -> TrialTask:
    configuration = TrialConfiguration.create(
        "recorded:Recorded",
        {"record": str(directory / name), **settings},
        training=TrainingSettings(epochs=1),
    )
    return TrialTask(
        id=name,
        dataset=dataset.uri,
        configuration=configuration.model_dump(mode="json"),
        objectives=("mean_auc",),
        checkpoint=str(directory / "checkpoints" / name),
    )


def lines(directory: Path, name: str) -> list[str]:
    return (directory / name).read_text().splitlines()


def last_message(queue: ray.actor.ActorHandle, name: str) -> Report | Ended:
    while True:
        message: Report | Ended = ray.get(queue.next_message.remote(name))
        if isinstance(message, Ended) or message.last:
            return message


@pytest.mark.parametrize(
    ("num_lanes", "workers_per_lane", "lanes_of_runs"),
    [
        (1, 1, [1]),
        (4, 1, [1, 1, 1, 1]),
        (6, 1, [1, 2, 1, 2]),
        (100, 1, [25, 25, 25, 25]),
        (6, 2, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_lanes_of_one_worker_share_few_runs(
    num_lanes: int, workers_per_lane: int, lanes_of_runs: list[int]
) -> None:
    names = [f"lane-{index}" for index in range(num_lanes)]
    runs = spread_lanes(names, workers_per_lane=workers_per_lane)
    assert [len(run) for run in runs] == lanes_of_runs
    assert [name for run in runs for name in run] == names


def test_a_controller_need_not_import_torch() -> None:
    program = "import sys, tuner.lane_backend; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert found.stdout == "False\n", found.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_worker_takes_its_own_lane_down_and_no_other_lane_of_its_run(
    directory: Path,
    ray_of_three_cores: None,
    tiny_dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes_module, "MAX_RUNS", 1)
    lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0)
    queue, lost = queue_actor().remote(), list[str]()

    def lose_all(reason: str) -> None:
        lost.append(reason)
        ray.get(queue.cancel_all.remote(reason))

    tasks = [
        # dies once, as soon as the bystander trains; which goes on until the other has begun anew
        task(
            directory, tiny_dataset, "dies", other=str(directory / "stays"), other_lines=1, deaths=1
        ),
        task(directory, tiny_dataset, "stays", other=str(directory / "dies"), other_lines=2),
        task(directory, tiny_dataset, "poison", deaths=9),
        task(directory, tiny_dataset, "after"),
    ]
    with open_lanes(
        lanes, queue, job="shared", storage_path=str(directory / "train"), on_all_lost=lose_all
    ):
        ray.get([queue.submit.remote(one) for one in tasks])
        messages = {one.id: last_message(queue, one.id) for one in tasks}
    assert messages["poison"] == Ended(kind="failed", reason="it took down its lane 2 times")
    for name in ("dies", "stays", "after"):
        message = messages[name]
        assert isinstance(message, Report), message
    begun = {one.id: lines(directory, one.id) for one in tasks}
    assert {name: len(pids) for name, pids in begun.items()} == {
        "dies": 2,
        "stays": 1,
        "poison": 2,
        "after": 1,
    }
    assert begun["dies"][0] != begun["dies"][1]
    assert lost == []


@pytest.mark.ray
@pytest.mark.slow
def test_lanes_that_were_never_placed_do_not_hold_up_the_end(
    directory: Path,
    ray_of_three_cores: None,
    tiny_dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes_module, "CLOSE_TIMEOUT_S", 5.0)
    lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=2, gpus_per_worker=0)
    queue, lost = queue_actor().remote(), list[str]()

    def lose_all(reason: str) -> None:
        lost.append(reason)
        ray.get(queue.cancel_all.remote(reason))

    with open_lanes(
        lanes, queue, job="unplaced", storage_path=str(directory / "train"), on_all_lost=lose_all
    ):
        ray.get(queue.submit.remote(task(directory, tiny_dataset, "alone")))
        assert isinstance(last_message(queue, "alone"), Report)
    assert lost == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_trial_of_a_node_that_is_gone_for_good_goes_to_another_lane(
    directory: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "MAX_RUNS", 1)
    monkeypatch.setattr(lanes_module, "CLOSE_TIMEOUT_S", 5.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    lost_node = cluster.add_node(num_cpus=1)  # after this process has joined the head's node
    try:
        lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0)
        queue = queue_actor().remote()
        names, gone = ["one", "two"], directory / "gone"  # they train until the node is gone
        tasks = [
            task(directory, tiny_dataset, name, other=str(gone), other_lines=1) for name in names
        ]
        with open_lanes(
            lanes, queue, job="node", storage_path=str(directory / "train"), on_all_lost=print
        ):
            ray.get([queue.submit.remote(one) for one in tasks])
            wait_for_file(directory / "one")
            wait_for_file(directory / "two")
            cluster.remove_node(lost_node, allow_graceful=False)
            gone.write_text("yes\n")
            assert all(isinstance(last_message(queue, name), Report) for name in names)
        assert sorted(len(lines(directory, name)) for name in names) == [1, 2]
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
