"""`pwiser plan`: what a job would run, take and cost, before anything is paid for."""

import math
import os
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from datasets import Dataset
from datasets.pipeline import num_cores
from trainables.execution import fits_in_memory
from tuner.cluster import Lanes, Node
from tuner.errors import ClusterError
from tuner.job import Job
from tuner.probe import Probe, TableShape
from tuner.search import StudySearch
from tuner.study import Study

__all__ = ["LanePlan", "Plan", "StudyPlan", "make_plan", "table_shape", "this_machine"]

START_UP_S = 30.0  # of Ray and the lanes; docs/measurements.md
TRIAL_OVERHEAD_S = 0.5  # of a lane between two trials
SECONDS_PER_HOUR = 3600.0
PAIRLESS_SHARE = 0.1
"""Of the batches of an epoch, from which a note says that they hold no conversion."""
EVALUATION_BYTES = 64
"""Of an evaluation's scores, labels and sorted scores, per row of the split, at most."""

MIB = 1024**2


class LanePlan(BaseModel):
    """The lanes, and what each worker of one needs.

    Attributes:
        memory_bytes: of one worker's process, without the dataset.
        data_bytes: of the largest dataset's train and valid splits, one copy per node; 0 where they
            are streamed.
        device_bytes: of the GPU for one worker, dataset included; 0 without one. Scores of the
            largest split to evaluate are in it, or in memory_bytes.
        device_total_bytes: that the smallest GPU has; 0 without one.
    """

    model_config = ConfigDict(frozen=True)

    lanes: int
    workers_per_lane: int
    cpus_per_worker: int
    gpus_per_worker: float
    memory_bytes: int
    data_bytes: int
    device_bytes: int
    device_total_bytes: int = 0


class StudyPlan(BaseModel):
    """One study.

    Attributes:
        left_out: points of its grid that there are no trials for.
        replicates: trainings of its winner, with its loss and with plain BCE, after the search.
        parameters: weights of its model.
        steps: of one trial that is not pruned.
        trial_s: seconds of one trial that is not pruned, on one lane.
        impressions_per_s: of one lane in training.
    """

    model_config = ConfigDict(frozen=True)

    dataset: str
    model: str
    trials: int
    left_out: int
    replicates: int
    parameters: int
    steps: int
    trial_s: float
    impressions_per_s: float


class Plan(BaseModel):
    """What a job would run, take and cost.

    Attributes:
        lanes: None where they do not fit, or no model could be measured.
        hours: of the whole job at the sizes of its file, as if no trial were pruned.
        measured_on: where the probe ran.
        obstacles: every reason why the job would not run as it is.
        notes: what else its user should know.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    studies: tuple[StudyPlan, ...]
    lanes: LanePlan | None
    hours: float
    measured_on: str
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def trials(self) -> int:
        """Trials of all studies."""
        return sum(study.trials for study in self.studies)


def this_machine() -> Node:
    """This machine as a node, for a job that would run on it alone."""
    return Node(
        id="local",
        address="this machine",
        cpus=float(num_cores()),
        gpus=float(torch.cuda.device_count()),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def table_shape(dataset: Dataset) -> TableShape:
    """The shape of a dataset's rows, from its manifest."""
    return TableShape(
        vocabulary_sizes=tuple(dataset.manifest.vocabulary_sizes.values()),
        num_numericals=len(dataset.manifest.table.numerical),
        bag_lengths=dataset.manifest.bag_lengths,
        numerical_type=dataset.manifest.table.numerical_type,
    )


def make_plan(
    job: Job,
    datasets: dict[str, Dataset],
    nodes: Sequence[Node],
    lanes: Lanes | ClusterError,
    probes: dict[tuple[str, str], Probe],
    faults: Sequence[str] = (),
) -> Plan:
    """Put a plan together from what was looked up and measured.

    Args:
        job: checked already.
        datasets: by name.
        nodes: of the cluster, or this machine.
        lanes: that fit, or why they do not.
        probes: by dataset and model.
        faults: of the nodes, in words.
    """
    fitted = lanes if isinstance(lanes, Lanes) else None
    studies = [
        _study_plan(job, datasets[name], model, fitted, probe)
        for (name, model), probe in probes.items()
    ]
    lane_plan = None
    if fitted is not None and probes:
        lane_plan = _lane_plan(job, fitted, datasets, nodes, list(probes.values()))
    obstacles = list(faults)
    if isinstance(lanes, ClusterError):
        obstacles.append(str(lanes))
    if lane_plan is not None:
        obstacles += _memory_obstacles(lane_plan, nodes)
    num_lanes = 1 if fitted is None else fitted.num_lanes
    work_s = sum(
        math.ceil((study.trials + study.replicates) / num_lanes) * study.trial_s
        for study in studies
    )
    hours = (START_UP_S + work_s) / SECONDS_PER_HOUR
    notes = ["pruned trials end sooner: the search takes less time"] if _prunes(job) else []
    notes += [
        f"{study.dataset}/{study.model}: search.trials {study.trials} leaves out {study.left_out} "
        "of the grid's points"
        for study in studies
        if study.left_out
    ]
    sizes = [path for path in job.search.space if path.startswith("model.")]
    sizes += [path for path in job.search.space if path == "training.batch_size"]
    if sizes:
        notes.append(
            f"time and memory are those of the job file's own sizes; {', '.join(sizes)} "
            "searched upwards take more"
        )
    if job.budget.hours is not None and hours > job.budget.hours:
        notes.append(f"budget.hours {job.budget.hours:g} would end the search before its trials")
    if fitted is not None and fitted.workers_per_lane > 1:
        notes.append("the workers of a lane are taken to share a batch at no cost")
    notes += _pairless_notes(datasets, job.training.batch_size)
    return Plan(
        job=job.name,
        studies=tuple(studies),
        lanes=lane_plan,
        hours=hours,
        measured_on=" and ".join(sorted({probe.device for probe in probes.values()})),
        obstacles=tuple(obstacles),
        notes=tuple(notes),
    )


def _pairless_notes(datasets: dict[str, Dataset], batch_size: int) -> list[str]:
    """Name the datasets of which many batches leave PWiseR nothing to rank."""
    notes = []
    for name, dataset in datasets.items():
        train = dataset.manifest.splits["train"]
        share = (1.0 - train.conversions / train.impressions) ** batch_size
        if share >= PAIRLESS_SHARE:
            notes.append(
                f"{name}: {share:.0%} of batches of {batch_size:,} hold no conversion, and there "
                "PWiseR is 0: a larger training.batch_size or loss.alpha makes up for it"
            )
    return notes


def _study_plan(
    job: Job, dataset: Dataset, model: str, lanes: Lanes | None, probe: Probe
) -> StudyPlan:
    training = job.configuration(model).training
    splits = dataset.manifest.splits
    num_workers = 1 if lanes is None else lanes.workers_per_lane
    steps = math.ceil(splits["train"].impressions / training.batch_size)
    epochs = _largest(job, "training.epochs", training.epochs)
    num_evaluations = epochs * max(round(1 / training.evaluate_every), 1)
    work_s = (
        epochs * splits["train"].impressions / probe.train_rate
        + num_evaluations * splits["valid"].impressions / probe.evaluation_rate
    )
    search = StudySearch(Study(dataset=dataset.name, dataset_uri=dataset.uri, model=model), job)
    return StudyPlan(
        dataset=dataset.name,
        model=model,
        trials=search.num_trials,
        left_out=search.num_left_out,
        replicates=2 * job.search.replicates,
        parameters=probe.parameters,
        steps=epochs * steps,
        trial_s=work_s / num_workers + TRIAL_OVERHEAD_S,
        impressions_per_s=probe.train_rate * num_workers,
    )


def _largest(job: Job, path: str, value: int) -> int:
    """The largest value that a trial may have of a field."""
    dimension = job.search.space.get(path)
    if dimension is None:
        return value
    return int(max([value, *(dimension.values or (dimension.high,))]))


def _lane_plan(
    job: Job,
    lanes: Lanes,
    datasets: dict[str, Dataset],
    nodes: Sequence[Node],
    probes: list[Probe],
) -> LanePlan:
    num_rows = max(
        dataset.manifest.splits[split].impressions
        for dataset in datasets.values()
        for split in ("valid", "test")
    )
    evaluation_bytes = EVALUATION_BYTES * num_rows
    memory_bytes = max(probe.memory_bytes for probe in probes)
    device_bytes = device_total_bytes = 0
    if lanes.gpus_per_worker:
        device_bytes = max(probe.device_bytes for probe in probes) + evaluation_bytes
        device_total_bytes = min(probe.device_total_bytes for probe in probes)
    else:
        memory_bytes += evaluation_bytes
    limits = [node.memory_bytes for node in nodes if node.cpus and node.memory_bytes]
    if device_total_bytes:
        limits.append(int(min(lanes.gpus_per_worker, 1.0) * device_total_bytes))
    held = [_held_bytes(job, dataset, limits) for dataset in datasets.values()]
    data_bytes = max(held)
    if 0 in held:
        memory_bytes += job.data.buffer_mib * MIB
    return LanePlan(
        lanes=lanes.num_lanes,
        workers_per_lane=lanes.workers_per_lane,
        cpus_per_worker=lanes.cpus_per_worker,
        gpus_per_worker=lanes.gpus_per_worker,
        memory_bytes=memory_bytes,
        data_bytes=data_bytes,
        device_bytes=device_bytes + data_bytes if lanes.gpus_per_worker else 0,
        device_total_bytes=device_total_bytes,
    )


def _held_bytes(job: Job, dataset: Dataset, limits: Sequence[int]) -> int:
    """What is held of a dataset in memories of these sizes; nothing where it is streamed."""
    size_bytes = sum(dataset.size_bytes(split) for split in ("train", "valid"))
    held = job.data.mode == "memory" or (
        job.data.mode == "auto" and fits_in_memory(size_bytes, limits)
    )
    return size_bytes if held else 0


def _memory_obstacles(plan: LanePlan, nodes: Sequence[Node]) -> list[str]:
    """See whether a GPU's memory is short; and, filling the largest first, which nodes' is."""
    lanes = Lanes(
        num_lanes=plan.lanes,
        workers_per_lane=plan.workers_per_lane,
        cpus_per_worker=plan.cpus_per_worker,
        gpus_per_worker=plan.gpus_per_worker,
    )
    obstacles = []
    per_gpu = min(lanes.workers_per_gpu, plan.lanes * plan.workers_per_lane)
    if plan.device_total_bytes and per_gpu * plan.device_bytes > plan.device_total_bytes:
        obstacles.append(
            f"a GPU: {per_gpu} workers of {plan.device_bytes // MIB} MiB need "
            f"{per_gpu * plan.device_bytes // MIB} MiB, it has {plan.device_total_bytes // MIB}; "
            "set resources.gpus_per_worker higher, or data.mode to stream"
        )
    num_left = plan.lanes * plan.workers_per_lane
    for node in sorted(nodes, key=lambda node: -lanes.workers_in(node.cpus, node.gpus)):
        num_workers = min(lanes.workers_in(node.cpus, node.gpus), num_left)
        num_left -= num_workers
        needed = num_workers * plan.memory_bytes + (plan.data_bytes if num_workers else 0)
        if node.memory_bytes and needed > node.memory_bytes:
            obstacles.append(
                f"node {node.address}: {num_workers} workers of {plan.memory_bytes // MIB} MiB and "
                f"{plan.data_bytes // MIB} MiB of data need {needed // MIB} MiB, it has "
                f"{node.memory_bytes // MIB}; set resources.lanes lower"
            )
    return obstacles


def _prunes(job: Job) -> bool:
    return job.search.pruner != "none"
