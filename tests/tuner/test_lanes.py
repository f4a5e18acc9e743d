"""Lanes on a real Ray, without Ray Tune: the tests are the queue's other side."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from datasets import Dataset
from trainables.configuration import TrainingSettings, TrialConfiguration
from trainables.training_state import Position, TrainingState
from tuner import lanes as lanes_module
from tuner.cluster import Lanes
from tuner.lanes import open_lanes, queue_actor, spread_lanes
from tuner.messages import Ended, Report, TestTask, TrialTask

MODELS = """
import os, pathlib, shutil, signal, time
import torch.distributed as dist
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

class Mortal(nn.Module):
    '''Writes a line when it begins to train as one rank, which dies the first time.'''

    num_heads = 2

    def __init__(self, inputs: Inputs, *, record: str = "", rank: int = 0) -> None:
        super().__init__()
        self.record, self.rank, self.begun = pathlib.Path(record), rank, False
        self.linear = nn.Linear(inputs.num_numericals, 2)

    def forward(self, ids, numericals):
        mine = ids.device.type != "meta" and dist.is_initialized() and dist.get_rank() == self.rank
        if self.training and mine and not self.begun:
            self.begun = True
            with self.record.open("a") as lines:
                lines.write(f"{os.getpid()}\\n")
            if num_lines(self.record) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(numericals)

class Stepping(nn.Module):
    '''Writes a line for every step; dies once, in the step `dies_at`, and sets its state aside.'''

    num_heads = 2

    def __init__(self, inputs: Inputs, *, record: str = "", state: str = "",
                 dies_at: int = 0) -> None:
        super().__init__()
        self.record, self.state, self.dies_at = pathlib.Path(record), state, dies_at
        self.linear = nn.Linear(inputs.num_numericals, 2)
        self.dropout = nn.Dropout(0.2)

    def forward(self, ids, numericals):
        if self.training and ids.device.type != "meta":
            with self.record.open("a") as lines:
                lines.write(f"{os.getpid()}\\n")
            time.sleep(0.05)
            if num_lines(self.record) == self.dies_at:
                shutil.copytree(self.state, f"{self.record}-state")
                os.kill(os.getpid(), signal.SIGKILL)
        return self.dropout(self.linear(numericals))

class Tied(nn.Module):
    '''Has two names for one weight.'''

    num_heads = 2

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.linear = self.same = nn.Linear(inputs.num_numericals, 2)

    def forward(self, ids, numericals):
        return self.linear(numericals)

class Talkative(Tied):
    '''Has a text among its weights.'''

    def get_extra_state(self):
        return "a text"

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
    gc.collect()
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    gc.collect()
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
        state=str(directory / "states" / name),
    )


def lines(directory: Path, name: str) -> list[str]:
    return (directory / name).read_text().splitlines()


@contextmanager
def one_lane(
    directory: Path, job: str, *, workers: int = 1, cpus: int = 1
) -> Iterator[ray.actor.ActorHandle]:
    """Hold a lane open, and stop its trials once it is given up; give its queue."""
    lanes = Lanes(num_lanes=1, workers_per_lane=workers, cpus_per_worker=cpus, gpus_per_worker=0)
    queue, storage = queue_actor().remote(), str(directory / "train")

    def lose(reason: str, num_left: int) -> None:
        ray.get(queue.cancel_all.remote(f"{num_left} lanes are left: {reason}"))

    with open_lanes(lanes, queue, job=job, storage_path=storage, on_lost=lose):
        yield queue


def messages_of(queue: ray.actor.ActorHandle, name: str) -> Iterator[Report | Ended]:
    while True:
        message: Report | Ended = ray.get(queue.next_message.remote(name))
        yield message
        if isinstance(message, Ended) or message.last:
            return


def last_message(queue: ray.actor.ActorHandle, name: str) -> Report | Ended:
    *_, last = messages_of(queue, name)
    return last


def reports(queue: ray.actor.ActorHandle, name: str) -> list[Report]:
    """All messages of a trial that comes to its end."""
    found = []
    for message in messages_of(queue, name):
        assert isinstance(message, Report), message
        found.append(message)
    return found


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
    queue, lost = queue_actor().remote(), list[tuple[str, int]]()

    def lose(reason: str, num_left: int) -> None:
        lost.append((reason, num_left))
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
        lanes, queue, job="shared", storage_path=str(directory / "train"), on_lost=lose
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
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_dies_fails_no_trial_of_its_lane(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset, rank: int
) -> None:
    name = f"mortal-{rank}"
    configuration = TrialConfiguration.create(
        "recorded:Mortal",
        {"record": str(directory / name), "rank": rank},
        training=TrainingSettings(epochs=1),
    )
    one = replace(
        task(directory, tiny_dataset, name), configuration=configuration.model_dump(mode="json")
    )
    with one_lane(directory, name, workers=2) as queue:
        ray.get(queue.submit.remote(one))
        message = last_message(queue, name)
    assert isinstance(message, Report), message
    assert len(lines(directory, name)) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_deaths_do_not_add_up_while_a_lane_does_its_work(
    directory: Path,
    ray_of_three_cores: None,
    tiny_dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes_module, "MAX_RESTARTS", 1)
    with one_lane(directory, "days") as queue:
        for day in range(3):  # one death a day
            for name, deaths in ((f"dies-{day}", 1), (f"works-{day}", 0)):
                ray.get(queue.submit.remote(task(directory, tiny_dataset, name, deaths=deaths)))
                assert reports(queue, name)[-1].last


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_beyond_its_limit_leaves_the_next_one_all_of_its_own_time(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    limit_s = 8.0
    with one_lane(directory, "limit") as queue:
        first = task(directory, tiny_dataset, "before-limit")
        ray.get(queue.submit.remote(first))
        assert reports(queue, first.id)[-1].last
        for name, other_lines in (("beyond-limit", 1), ("after-limit", 0)):  # the first one waits
            waits = {"other": str(directory / "nobody"), "other_lines": other_lines}
            ray.get(
                queue.submit.remote(
                    replace(task(directory, tiny_dataset, name, **waits), limit_s=limit_s)
                )
            )
        while not (directory / "beyond-limit").is_file():
            time.sleep(0.05)
        time.sleep(limit_s)  # from its first step on
        (directory / "nobody").write_text("go on")
        failed = last_message(queue, "beyond-limit")
        assert isinstance(failed, Ended)
        assert "it took longer than budget.trial_hours" in failed.reason
        assert reports(queue, "after-limit")[-1].last


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_trial_goes_on_from_its_last_state_to_the_same_end(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    told = dict[str, list[Report]]()
    with one_lane(directory, "goes-on") as queue:
        for name, dies_at in (("whole", 0), ("broken", 12)):
            one = stepping(directory, tiny_dataset, name, dies_at=dies_at)
            ray.get(queue.submit.remote(replace(one, state_every_s=0.0)))
            told[name] = reports(queue, name)
    whole, broken = told["whole"], told["broken"]
    assert [(r.index, r.step, r.metrics) for r in broken] == [
        (r.index, r.step, r.metrics) for r in whole
    ]
    assert len(lines(directory, "whole")) == whole[-1].step
    # what was trained after the last state before its death was trained again, nothing else
    kept = TrainingState.load(directory / "broken-state").position.step
    assert 0 < kept < 12
    assert len(lines(directory, "broken")) == 12 + whole[-1].step - kept
    assert len(set(lines(directory, "broken"))) == 2
    assert broken[-1].seconds.training > broken[-2].seconds.training


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_starts_over_where_its_state_is_of_another_layout(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset, workers: int
) -> None:
    untouched, other = f"untouched-{workers}", f"other-{workers}"
    (directory / "states" / other).mkdir(parents=True)
    TrainingState({}, Position(step=1)).save(directory / "states" / other)
    told = []
    with one_lane(directory, other, workers=workers) as queue:
        for name in (untouched, other):
            ray.get(queue.submit.remote(task(directory, tiny_dataset, name)))
            told.append([(report.step, report.metrics) for report in reports(queue, name)])
    assert told[0] == told[1]


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_trial_itself_is_to_blame_for_fails_it_and_not_its_lane(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    gone = str(directory / "no-checkpoint")
    faulty = [
        (of_model(directory, tiny_dataset, "Tied"), "RuntimeError: Some tensors share memory"),
        (of_model(directory, tiny_dataset, "Talkative"), "AttributeError: 'str' object has no "),
        (
            TestTask(id="gone", dataset=tiny_dataset.uri, checkpoint=gone),
            f"CheckpointError: {gone} is not there; was it moved or deleted?",
        ),
    ]
    with one_lane(directory, "blameless") as queue:
        for one, reason in faulty:
            ray.get(queue.submit.remote(one))
            failed = last_message(queue, one.id)
            assert isinstance(failed, Ended)
            assert (failed.kind, failed.reason[: len(reason)]) == ("failed", reason)
        ray.get(queue.submit.remote(task(directory, tiny_dataset, "blameless")))
        assert reports(queue, "blameless")[-1].last


@pytest.mark.ray
@pytest.mark.slow
def test_a_storage_that_is_away_for_a_while_fails_no_trial(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    obstacle = directory / "away"
    obstacle.write_text("in the way")
    with one_lane(directory, "patient") as queue:
        one = task(directory, tiny_dataset, "stateless")
        ray.get(queue.submit.remote(replace(one, state=f"{obstacle}/state", state_every_s=0.0)))
        assert reports(queue, "stateless")[-1].last  # its states are not worth a trial
        back = threading.Timer(6.0, obstacle.unlink)
        back.start()
        one = task(directory, tiny_dataset, "patient")
        ray.get(queue.submit.remote(replace(one, checkpoint=f"{obstacle}/checkpoint")))
        assert reports(queue, "patient")[-1].last
        assert not back.is_alive()
    assert (obstacle / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_stopped_with_its_job_goes_on_at_that_very_step(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    one = stepping(directory, tiny_dataset, "stopped")
    with one_lane(directory, "stops") as queue:
        ray.get(queue.submit.remote(one))
        first = ray.get(queue.next_message.remote("stopped"))
        second = queue.next_message.remote("stopped")  # go on
        while len(lines(directory, "stopped")) < first.step + 1:
            time.sleep(0.01)
        ray.get(queue.cancel_all.remote("interrupted"))
        assert ray.get(second) == Ended(kind="stopped", reason="interrupted")
    with one_lane(directory, "starts-again") as queue:
        ray.get(queue.submit.remote(one))
        told = reports(queue, "stopped")
    assert told[0] == first
    assert len(lines(directory, "stopped")) == told[-1].step
    assert len(set(lines(directory, "stopped"))) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_lanes_whose_controller_dies_come_back_in_the_room_that_they_had(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    record = directory / "orphan"
    one = task(directory, tiny_dataset, "orphan", other=str(record), other_lines=2)
    with one_lane(directory, "orphan", cpus=2) as queue:
        ray.get(queue.submit.remote(one))
        while not record.exists():
            time.sleep(0.05)
        os.kill(controller_pid(), signal.SIGKILL)
        assert isinstance(last_message(queue, "orphan"), Report)
    assert len(set(lines(directory, "orphan"))) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_the_controller_of_a_released_run_is_killed(
    directory: Path, ray_of_three_cores: None
) -> None:
    """Left to itself it would end by destructors, which may wait for each other for ever."""
    lanes = Lanes(num_lanes=1, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0)
    queue, closing = queue_actor().remote(), threading.Event()
    run = lanes_module._Run(("released",), lanes, queue, str(directory / "train"))
    serving = threading.Thread(target=run.serve, args=(closing,), daemon=True)
    serving.start()
    while not ray.get(queue.num_lanes.remote()):
        time.sleep(0.05)
    closing.set()
    run.trainer.release()
    serving.join(60.0)
    assert not serving.is_alive()
    while (controller := controller_actor())["State"] != "DEAD":
        time.sleep(0.05)
    assert "ray.kill" in str(controller["DeathCause"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_lane_that_hangs_leaves_its_stacks_and_starts_again(
    directory: Path, ray_of_three_cores: None, tiny_dataset: Dataset
) -> None:
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    hanging = [  # for ever at its first start, and for good
        task(directory, tiny_dataset, "once", other=str(directory / "once"), other_lines=2),
        task(directory, tiny_dataset, "always", other=str(directory / "always"), other_lines=9),
    ]
    with one_lane(directory, "hangs") as queue:
        for one in hanging:
            ray.get(queue.submit.remote(replace(one, hang_s=8.0)))
        assert isinstance(last_message(queue, "once"), Report)
        reason = "it took down its lane 2 times"
        assert last_message(queue, "always") == Ended(kind="failed", reason=reason)
    assert len(set(lines(directory, "once"))) == 2
    said = "".join(path.read_text() for path in logs.glob("worker-*.err"))
    assert said.count("Timeout (0:00:08)!") == 3
    assert "in begin" in said


@pytest.mark.ray
def test_a_run_is_not_started_anew_once_the_job_closes(
    directory: Path, ray_of_three_cores: None
) -> None:
    lanes = Lanes(num_lanes=1, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=0.0)
    run = lanes_module._Run(("late",), lanes, queue_actor().remote(), str(directory))
    closing = threading.Event()
    closing.set()
    assert run.serve(closing) is None
    assert run.trainer.controller is None


def stepping(directory: Path, dataset: Dataset, name: str, *, dies_at: int = 0) -> TrialTask:
    configuration = TrialConfiguration.create(
        "recorded:Stepping",
        {
            "record": str(directory / name),
            "state": str(directory / "states" / name),
            "dies_at": dies_at,
        },
        training=TrainingSettings(epochs=2, batch_size=256, evaluate_every=0.25),
    )
    return replace(
        task(directory, dataset, name), configuration=configuration.model_dump(mode="json")
    )


def of_model(directory: Path, dataset: Dataset, model: str) -> TrialTask:
    configuration = TrialConfiguration.create(
        f"recorded:{model}", {}, training=TrainingSettings(epochs=1)
    )
    return replace(
        task(directory, dataset, model), configuration=configuration.model_dump(mode="json")
    )


def controller_pid() -> int:
    (pid,) = [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::LaneController")
    ]
    return pid


def controller_actor() -> dict[str, Any]:
    actors = ray._private.state.actors().values()
    (found,) = [actor for actor in actors if actor["ActorClassName"] == "LaneController"]
    return found


UNPLACED = """
import sys, ray
from tuner import lanes as lanes_module
from tuner.cluster import Lanes
from tuner.lanes import open_lanes, queue_actor

lanes_module.CLOSE_TIMEOUT_S = 5.0
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
queue, lost = queue_actor().remote(), []
lanes = Lanes(num_lanes=2, workers_per_lane=1, cpus_per_worker=2, gpus_per_worker=0)
def lose(*told): lost.append(told)
with open_lanes(lanes, queue, job="unplaced", storage_path=sys.argv[1], on_lost=lose):
    while not ray.get(queue.num_lanes.remote()):
        pass
print("ended", lost)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_lanes_that_were_never_placed_do_not_hold_up_the_end(directory: Path) -> None:
    # a process of its own: what is left of such a run must not outlive its Ray in this one
    program = [sys.executable, "-c", UNPLACED, str(directory / "train")]
    found = subprocess.run(program, check=False, capture_output=True, text=True, timeout=300)
    assert found.stdout.splitlines()[-1:] == ["ended []"], found.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_trial_of_a_node_that_is_gone_for_good_goes_to_another_lane(
    directory: Path, tiny_dataset: Dataset
) -> None:
    # a process of its own, for the same reason
    program = [sys.executable, str(Path(__file__).parent / "lost_node.py")]
    found = subprocess.run(
        [*program, str(directory), tiny_dataset.uri],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert "reports 2, begun [1, 2]" in found.stdout.splitlines(), found.stdout + found.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_cannot_load_the_dataset_fails_no_trial_and_is_given_up(
    directory: Path, tiny_dataset: Dataset
) -> None:
    own = directory / "broken-node"
    own.mkdir()
    program = [sys.executable, str(Path(__file__).parent / "broken_node.py")]
    found = subprocess.run(
        [*program, str(own), tiny_dataset.uri],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = found.stdout.splitlines()[-1:]
    assert len(said) == 1, found.stdout + found.stderr
    assert said[0].startswith("reports 6, lost [("), said
    assert " gave back its trials, at last on node " in said[0]
    assert f"{own / 'in-the-way'}/" in said[0]
    assert said[0].endswith(
        '; make room or set PWISER_CACHE_DIR to another directory of this node", 1)]'
    ), said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("num_lanes", "workers"), [(2, 1), (1, 2)])
def test_a_fault_that_every_lane_has_gives_up_one_after_another_and_fails_no_trial(
    directory: Path,
    ray_of_three_cores: None,
    tiny_dataset: Dataset,
    num_lanes: int,
    workers: int,
) -> None:
    queue, lost = queue_actor().remote(), list[tuple[str, int]]()

    def lose(reason: str, num_left: int) -> None:
        lost.append((reason, num_left))
        if not num_left:
            ray.get(queue.cancel_all.remote("no lane is left"))

    missing, names = str(directory / "missing"), ["one", "two", "three"]
    trial = replace(task(directory, tiny_dataset, "alike"), dataset=missing)
    lanes = Lanes(
        num_lanes=num_lanes, workers_per_lane=workers, cpus_per_worker=1, gpus_per_worker=0
    )
    storage = str(directory / "train")
    with open_lanes(lanes, queue, job=f"alike-{workers}", storage_path=storage, on_lost=lose):
        ray.get([queue.submit.remote(replace(trial, id=name)) for name in names])
        messages = [last_message(queue, name) for name in names]
    assert messages == [Ended(kind="stopped", reason="no lane is left")] * 3
    assert [num_left for _, num_left in lost] == list(reversed(range(num_lanes)))
    assert all(f": {missing}: no such dataset; make one with " in reason for reason, _ in lost)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that works")
def test_a_lane_without_the_device_that_it_was_given_is_given_up_and_fails_no_trial(
    directory: Path, tiny_dataset: Dataset
) -> None:
    ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
    queue, lost = queue_actor().remote(), list[str]()

    def lose(reason: str, num_left: int) -> None:
        lost.append(reason)
        ray.get(queue.cancel_all.remote("no lane is left"))

    lanes = Lanes(num_lanes=1, workers_per_lane=1, cpus_per_worker=1, gpus_per_worker=1)
    storage = str(directory / "train")
    with open_lanes(lanes, queue, job="no-gpu", storage_path=storage, on_lost=lose):
        ray.get(queue.submit.remote(task(directory, tiny_dataset, "no-gpu")))
        message = last_message(queue, "no-gpu")
    ray.shutdown()
    assert message == Ended(kind="stopped", reason="no lane is left")
    (reason,) = lost
    assert "CUDA" in reason or "NVIDIA driver" in reason
