import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray

from tuner.cluster import Lanes, connected
from tuner.errors import ClusterError
from tuner.lanes import open_lanes, queue_actor

RAY_ITSELF = ["gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("num_lanes", "workers_per_lane"), [(2, 1), (1, 2)])
def test_no_process_is_started_that_a_job_has_no_use_for(
    num_lanes: int, workers_per_lane: int, tmp_path: Path
) -> None:
    lanes = Lanes(
        num_lanes=num_lanes,
        workers_per_lane=workers_per_lane,
        cpus_per_worker=1,
        gpus_per_worker=0.0,
    )
    with connected():
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        queue, lost = queue_actor().remote(), list[str]()
        with open_lanes(
            lanes,
            queue,
            job="lean",
            storage_path=str(tmp_path),
            on_lost=lambda reason, _: lost.append(reason),
        ):
            while ray.get(queue.num_lanes.remote()) < num_lanes:
                assert not lost
            found = processes_of_ray()
    controllers, workers = ["ray::LaneController"] * num_lanes, ["ray::RayTrainWorker"] * 2
    assert found == Counter([*RAY_ITSELF, "ray::TrialQueue", *controllers, *workers])
    said = "".join(path.read_text() for path in logs.glob("dashboard_agent*"))
    assert said
    assert "Get dashboard http address failed" not in said  # every second, for ever


def processes_of_ray() -> Counter[str]:
    """Count the processes of Ray below this one, by name."""
    names = list[str]()
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if command and command[0].startswith("ray::"):
            names.append(command[0].split(".")[0])
        elif "/ray/" in " ".join(command):
            names.append(Path(command[0]).name)
    return Counter(names)


def speak() -> None:
    sys.stdout.write("said by a worker\n")


@pytest.mark.ray
@pytest.mark.slow
def test_what_workers_print_is_shown_where_it_is_asked_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    printed, deadline = "", time.monotonic() + 30.0
    with connected(verbose=True):
        ray.get(ray.remote(speak).remote())
        while "said by a worker" not in printed:
            assert time.monotonic() < deadline, printed
            printed += capfd.readouterr().out


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.ray
def test_a_ray_that_cannot_be_started_is_told(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(variable, str(file))
    with pytest.raises(ClusterError) as raised, connected():
        pass
    assert str(raised.value) == (
        f"Ray cannot be started on this machine ([Errno 20] Not a directory: '{file}/ray'); its "
        f"files and logs are below {file}/ray: set RAY_TMPDIR to put them elsewhere"
    )
