import math
from typing import Any

import pytest

from datasets import Dataset
from tuner.cluster import Lanes, Node
from tuner.errors import ClusterError
from tuner.job import Job
from tuner.plan import (
    EVALUATION_BYTES,
    START_UP_S,
    TRIAL_OVERHEAD_S,
    Plan,
    make_plan,
    table_shape,
    this_machine,
)
from tuner.probe import Probe

GIB = 1024**3
PROBE = Probe(
    train_rate=1_000.0,
    evaluation_rate=4_000.0,
    parameters=5_000,
    memory_bytes=GIB,
    device_bytes=0,
    device="CPU, 1 threads",
)


def evaluation_bytes(dataset: Dataset) -> int:
    splits = dataset.manifest.splits
    return EVALUATION_BYTES * max(splits["valid"].impressions, splits["test"].impressions)


def node(name: str = "a", cpus: float = 4.0, gpus: float = 0.0, memory_bytes: int = 0) -> Node:
    return Node(id=name, address=name, cpus=cpus, gpus=gpus, memory_bytes=memory_bytes)


def lanes(num_lanes: int, workers: int = 1, gpus: float = 0.0) -> Lanes:
    return Lanes(
        num_lanes=num_lanes, workers_per_lane=workers, cpus_per_worker=1, gpus_per_worker=gpus
    )


def plan(
    dataset: Dataset,
    fitted: Lanes | ClusterError,
    *,
    nodes: tuple[Node, ...] = (node(),),
    probes: dict[tuple[str, str], Probe] | None = None,
    faults: tuple[str, ...] = (),
    **content: Any,
) -> Plan:
    settings = {
        "name": "us",
        "datasets": [dataset.uri],
        "search": {"pruner": "none", "replicates": 0},
    }
    job = Job.model_validate(settings | content)
    measured = {(dataset.name, model): PROBE for model in job.models}
    return make_plan(
        job,
        {dataset.name: dataset},
        list(nodes),
        fitted,
        measured if probes is None else probes,
        faults,
    )


def test_hours_are_those_of_the_trials_over_the_lanes(tiny_dataset: Dataset) -> None:
    splits = tiny_dataset.manifest.splits
    training = {"epochs": 3, "batch_size": 100, "evaluate_every": 0.5}
    found = plan(
        tiny_dataset,
        lanes(4),
        training=training,
        search={"trials": 10, "pruner": "none", "replicates": 2},
    )
    trial_s = (
        3 * splits["train"].impressions / 1_000 + 6 * splits["valid"].impressions / 4_000
    ) + TRIAL_OVERHEAD_S
    (study,) = found.studies
    assert (study.dataset, study.model, study.trials) == ("tiny", "mmoe", 10)
    assert study.parameters == 5_000
    assert study.steps == 3 * math.ceil(splits["train"].impressions / 100)
    assert study.trial_s == pytest.approx(trial_s)
    assert study.replicates == 4
    assert found.hours == pytest.approx((START_UP_S + 4 * trial_s) / 3600)
    assert (found.trials, found.obstacles, found.notes) == (10, (), ())


def test_workers_of_a_lane_share_the_work_of_a_trial(tiny_dataset: Dataset) -> None:
    alone, shared = (plan(tiny_dataset, lanes(1, workers)) for workers in (1, 4))
    assert shared.studies[0].impressions_per_s == 4_000.0
    assert alone.studies[0].trial_s - TRIAL_OVERHEAD_S == pytest.approx(
        4 * (shared.studies[0].trial_s - TRIAL_OVERHEAD_S)
    )
    assert shared.notes == ("the workers of a lane are taken to share a batch at no cost",)


def test_a_grid_has_its_points_beside_the_baseline_and_the_papers(tiny_dataset: Dataset) -> None:
    space = {"loss.alpha": {"values": [0.01, 0.1]}, "loss.m1": {"values": [0.1, 0.2]}}
    search = {"sampler": "grid", "pruner": "none", "space": space}
    found = plan(tiny_dataset, lanes(2), search=search, models=["mmoe", "dnn"])
    assert [study.trials for study in found.studies] == [6, 6]
    assert (found.trials, found.notes) == (12, ())


def test_points_of_a_grid_that_are_left_out_are_noted(tiny_dataset: Dataset) -> None:
    search = {"sampler": "grid", "pruner": "none", "trials": 40}
    found = plan(tiny_dataset, lanes(2), search=search)
    assert [study.left_out for study in found.studies] == [26]
    assert found.notes == ("tiny/mmoe: search.trials 40 leaves out 26 of the grid's points",)


def test_a_lane_needs_the_memory_of_the_largest_model_and_dataset(tiny_dataset: Dataset) -> None:
    larger = Probe(**{**vars(PROBE), "memory_bytes": 3 * GIB})
    probes = {("tiny", "mmoe"): PROBE, ("tiny", "ple"): larger}
    found = plan(tiny_dataset, lanes(2, workers=2), probes=probes, models=["mmoe", "ple"]).lanes
    assert found is not None
    assert (found.lanes, found.workers_per_lane, found.cpus_per_worker) == (2, 2, 1)
    needed = 3 * GIB + evaluation_bytes(tiny_dataset)
    assert (found.memory_bytes, found.device_bytes, found.gpus_per_worker) == (needed, 0, 0.0)
    assert found.data_bytes == sum(tiny_dataset.size_bytes(name) for name in ("train", "valid"))


def test_on_a_gpu_the_dataset_lies_beside_the_model(tiny_dataset: Dataset) -> None:
    probe = Probe(**{**vars(PROBE), "device_bytes": GIB, "device": "GPU"})
    found = plan(tiny_dataset, lanes(2, gpus=0.5), probes={("tiny", "mmoe"): probe})
    assert found.measured_on == "GPU"
    assert found.lanes is not None
    needed = GIB + found.lanes.data_bytes + evaluation_bytes(tiny_dataset)
    assert (found.lanes.memory_bytes, found.lanes.device_bytes) == (GIB, needed)


def test_workers_that_share_a_gpu_need_room_on_it_together(tiny_dataset: Dataset) -> None:
    gpu = {"device_bytes": GIB, "device": "GPU", "device_total_bytes": 2 * GIB}
    probes = {("tiny", "mmoe"): Probe(**{**vars(PROBE), **gpu})}
    assert plan(tiny_dataset, lanes(1, gpus=1.0), probes=probes).obstacles == ()
    assert plan(tiny_dataset, lanes(1, gpus=0.25), probes=probes).obstacles == ()  # it is alone
    (obstacle,) = plan(tiny_dataset, lanes(4, gpus=0.25), probes=probes).obstacles
    assert obstacle == (
        "a GPU: 4 workers of 1024 MiB need 4099 MiB, it has 2048; "
        "set resources.gpus_per_worker higher, or data.mode to stream"
    )


def test_what_is_too_large_for_a_share_of_a_gpu_is_streamed(tiny_dataset: Dataset) -> None:
    size_bytes = sum(tiny_dataset.size_bytes(name) for name in ("train", "valid"))
    gpu = {"device": "GPU", "device_total_bytes": 3 * size_bytes}
    probes = {("tiny", "mmoe"): Probe(**{**vars(PROBE), **gpu})}
    for gpus, held in ((1.0, size_bytes), (0.5, 0)):
        found = plan(tiny_dataset, lanes(1, gpus=gpus), probes=probes).lanes
        assert found is not None
        assert found.data_bytes == held


def test_lanes_without_a_gpu_hold_the_data_whatever_the_probe_ran_on(tiny_dataset: Dataset) -> None:
    gpu = {"device": "GPU", "device_bytes": GIB, "device_total_bytes": 80 * GIB}
    probes = {("tiny", "mmoe"): Probe(**{**vars(PROBE), **gpu})}
    found = plan(tiny_dataset, lanes(1, gpus=0.0), probes=probes).lanes
    assert found is not None
    assert found.data_bytes > 0
    assert (found.device_bytes, found.device_total_bytes) == (0, 0)


def test_memory_that_is_short_stands_in_the_way_on_each_such_node(tiny_dataset: Dataset) -> None:
    nodes = (
        node("small", cpus=1, memory_bytes=GIB),
        node("large", cpus=4, memory_bytes=2 * GIB),
        node("unknown", cpus=2),
    )
    assert plan(tiny_dataset, lanes(7), nodes=nodes).obstacles == (
        "node large: 4 workers of 1024 MiB and 0 MiB of data need 4097 MiB, it has 2048; "
        "set resources.lanes lower",
        "node small: 1 workers of 1024 MiB and 0 MiB of data need 1024 MiB, it has 1024; "
        "set resources.lanes lower",
    )


@pytest.mark.parametrize(
    ("mode", "memory_bytes", "streams"),
    [
        ("memory", GIB, False),
        ("stream", GIB, True),
        ("auto", GIB, False),
        ("auto", 1024**2, True),
        ("auto", 0, False),  # nobody knows
    ],
)
def test_a_worker_that_streams_needs_its_buffer_and_no_copy_of_the_data(
    tiny_dataset: Dataset, mode: str, memory_bytes: int, streams: bool
) -> None:
    settings = {"mode": mode, "buffer_mib": 64}
    nodes = (node(memory_bytes=memory_bytes),)
    found = plan(tiny_dataset, lanes(1), nodes=nodes, data=settings).lanes
    assert found is not None
    assert (found.data_bytes == 0) == streams
    buffer_bytes = 64 * 1024**2 if streams else 0
    assert found.memory_bytes == GIB + evaluation_bytes(tiny_dataset) + buffer_bytes


def test_a_cluster_without_a_worker_yet_can_be_planned_for(tiny_dataset: Dataset) -> None:
    found = plan(tiny_dataset, lanes(1), nodes=(node(cpus=0, memory_bytes=GIB),))
    assert found.obstacles == ()


def test_memory_of_nodes_that_no_worker_comes_to_is_not_counted(tiny_dataset: Dataset) -> None:
    nodes = (node("head", cpus=0, memory_bytes=1), node("worker", cpus=4, memory_bytes=9 * GIB))
    assert plan(tiny_dataset, lanes(4), nodes=nodes).obstacles == ()


def test_lanes_that_do_not_fit_and_faults_of_nodes_stand_in_the_way(tiny_dataset: Dataset) -> None:
    fault = "node a: MLflow gave no answer within 30 s"
    found = plan(tiny_dataset, ClusterError("resources: too many lanes"), faults=(fault,))
    assert found.obstacles == (fault, "resources: too many lanes")
    assert found.lanes is None
    assert found.hours == pytest.approx(
        (START_UP_S + found.trials * found.studies[0].trial_s) / 3600
    )


def test_a_model_that_could_not_be_measured_leaves_the_rest_of_the_plan(
    tiny_dataset: Dataset,
) -> None:
    fault = "tiny/mmoe: the probe was killed; is the memory enough?"
    found = plan(tiny_dataset, lanes(2), probes={}, faults=(fault,))
    assert (found.studies, found.lanes, found.measured_on) == ((), None, "")
    assert found.obstacles == (fault,)


def test_a_budget_that_ends_the_search_early_and_pruning_are_noted(tiny_dataset: Dataset) -> None:
    assert plan(tiny_dataset, lanes(2), budget={"hours": 1_000}).notes == ()
    assert plan(tiny_dataset, lanes(2), budget={"hours": 0.001}, search={}).notes == (
        "pruned trials end sooner: the search takes less time",
        "budget.hours 0.001 would end the search before its trials",
    )


def test_batches_that_hold_no_conversion_are_noted(tiny_dataset: Dataset) -> None:
    train = tiny_dataset.manifest.splits["train"]
    share = (1 - train.conversions / train.impressions) ** 8
    assert plan(tiny_dataset, lanes(1), training={"batch_size": 8}).notes == (
        f"tiny: {share:.0%} of batches of 8 hold no conversion, and there PWiseR is 0: "
        "a larger training.batch_size or loss.alpha makes up for it",
    )
    assert plan(tiny_dataset, lanes(1), training={"batch_size": 1_000}).notes == ()


def test_searched_epochs_count_at_their_largest_and_searched_sizes_are_noted(
    tiny_dataset: Dataset,
) -> None:
    def searched(**space: dict[str, Any]) -> Plan:
        found = {name.replace("__", "."): dimension for name, dimension in space.items()}
        search = {"pruner": "none", "replicates": 0, "space": found}
        return plan(tiny_dataset, lanes(1), training={"epochs": 2}, search=search)

    (two,) = searched(loss__alpha={"low": 0.0, "high": 1.0}).studies
    for epochs in ({"low": 1, "high": 6}, {"values": [1, 6]}):
        (six,) = searched(training__epochs=epochs).studies
        assert six.steps == 3 * two.steps
        assert six.trial_s > 2 * two.trial_s
    sizes = searched(
        model__num_experts={"low": 2, "high": 8}, training__batch_size={"values": [64]}
    )
    assert sizes.notes == (
        "time and memory are those of the job file's own sizes; model.num_experts, "
        "training.batch_size searched upwards take more",
    )


def test_the_shape_of_a_table_is_that_of_its_manifest(tiny_dataset: Dataset) -> None:
    shape = table_shape(tiny_dataset)
    encoder = tiny_dataset.encoder()
    assert len(shape.vocabulary_sizes) == len(encoder.categorical)
    assert shape.vocabulary_sizes == tuple(tiny_dataset.manifest.vocabulary_sizes.values())
    assert shape.num_numericals == len(tiny_dataset.manifest.table.numerical)


def test_this_machine_has_cores_and_memory() -> None:
    found = this_machine()
    assert found.cpus >= 1
    assert found.memory_bytes > 100 * 1024**2
