"""A short training run, timed and weighed: what a trial costs on the machine it runs on."""

import resource
from dataclasses import dataclass
from itertools import pairwise

import torch

from datasets.schema import NumericalType
from trainables.configuration import TrainingSettings, TrialConfiguration
from trainables.execution import check_can_compile
from trainables.models import Inputs
from trainables.training import DeviceImpressions, train
from trainables.workers import Workers

__all__ = ["Probe", "TableShape", "measure"]

NUM_STEPS = 8
NUM_ROUNDS = 5
CLICK_SHARE, CONVERSION_SHARE = 0.1, 0.01


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """What a dataset's rows look like.

    Attributes:
        vocabulary_sizes: ids of each categorical field.
        num_numericals: numerical fields.
        bag_lengths: ids of each categorical field in a row; 1 for all if left out.
        numerical_type: of the loaded numericals.
    """

    vocabulary_sizes: tuple[int, ...]
    num_numericals: int
    bag_lengths: tuple[int, ...] = ()
    numerical_type: NumericalType = "float32"

    @property
    def inputs(self) -> Inputs:
        """What a model of these rows reads."""
        return Inputs(
            vocabulary_sizes=self.vocabulary_sizes,
            num_numericals=self.num_numericals,
            bag_lengths=self.bag_lengths,
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured.

    Attributes:
        train_rate: impressions per second and worker in training.
        evaluation_rate: the same in evaluation.
        parameters: weights of the model.
        memory_bytes: of the process at its peak, without a dataset; run it in one of its own.
        device_bytes: of the GPU at its peak, without the dataset; 0 on a CPU.
        device_total_bytes: that the GPU has; 0 on a CPU.
        device: what it ran on.
    """

    train_rate: float
    evaluation_rate: float
    parameters: int
    memory_bytes: int
    device_bytes: int
    device: str
    device_total_bytes: int = 0


def measure(
    configuration: TrialConfiguration,
    shape: TableShape,
    num_workers: int,
    threads: int,
    gpus: float,
) -> Probe:
    """Train a few steps on random rows of a dataset's shape, after as many to warm up.

    Of several rounds the quickest counts, since whatever else the machine does only slows it.

    Args:
        configuration: of a trial; its epochs and evaluations are the probe's own.
        shape: of the dataset.
        num_workers: of a lane, which share every batch.
        threads: of one worker.
        gpus: of one worker; with 0 it is measured on the CPU, whatever the machine has.

    Raises:
        ValueError: if a lane of so many workers would refuse the configuration.
    """
    torch.set_num_threads(threads)
    on_gpu = gpus > 0 and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if num_workers > 1:
        _refuse_for_several(configuration.training, device, num_workers)
    rows_per_step = max(configuration.training.batch_size // num_workers, 1)
    split = _random_rows(shape, rows_per_step * NUM_STEPS, device)
    short = configuration.replace(
        {
            "training.epochs": NUM_ROUNDS + 1,
            "training.evaluate_every": 1.0,
            "training.batch_size": rows_per_step,
            "training.cuda_graph": configuration.training.cuda_graph if num_workers == 1 else "off",
        }
    )
    rounds = list(train(short, shape.inputs, split, split, Workers(device=device)))
    model = rounds[0][1]
    pairs = list(pairwise(evaluation for evaluation, _ in rounds))
    training_s = min(after.training_s - before.training_s for before, after in pairs)
    evaluation_s = min(after.evaluation_s - before.evaluation_s for before, after in pairs)
    return Probe(
        train_rate=len(split) / training_s,
        evaluation_rate=len(split) / evaluation_s,
        parameters=sum(weight.numel() for weight in model.parameters()),
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        # What is reserved: a captured step keeps its memory between two replays.
        device_bytes=torch.cuda.max_memory_reserved() if on_gpu else 0,
        device=torch.cuda.get_device_name() if on_gpu else f"CPU, {threads} threads",
        device_total_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else 0,
    )


def _refuse_for_several(training: TrainingSettings, device: torch.device, num_workers: int) -> None:
    """Refuse what a lane of several workers would, of which the probe is but one."""
    if training.compile:
        check_can_compile(device, num_workers)
    if training.cuda_graph == "on":
        raise ValueError("training.cuda_graph: on needs one worker per lane; set it to auto")
    if training.embedding_optimizer == "sparse" and device.type == "cuda":
        raise ValueError(
            "training.embedding_optimizer: sparse needs gradients that several GPU workers cannot "
            "add up; set it to dense"
        )


def _random_rows(shape: TableShape, num_rows: int, device: torch.device) -> DeviceImpressions:
    generator = torch.Generator().manual_seed(0)
    # every bag is full: padding takes the same time
    fields = [
        torch.randint(size, (num_rows, length), generator=generator)
        for size, length in zip(shape.vocabulary_sizes, shape.inputs.bag_lengths, strict=True)
    ]
    ids_NF = torch.cat(fields, 1) if fields else torch.zeros(num_rows, 0, dtype=torch.int64)
    numericals_ND = torch.randn(num_rows, shape.num_numericals, generator=generator)
    numericals_ND = numericals_ND.to(getattr(torch, shape.numerical_type))
    luck_N = torch.rand(num_rows, generator=generator)
    luck_N[:2] = torch.tensor([0.0, 1.0])  # both classes are there, however few the rows
    labels_NT = torch.stack([luck_N < CLICK_SHARE, luck_N < CONVERSION_SHARE], 1).byte()
    return DeviceImpressions(ids_NF.to(device), numericals_ND.to(device), labels_NT.to(device))
