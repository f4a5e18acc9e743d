from pathlib import Path

import pandas as pd
import pytest
import torch

from datasets import Dataset, OutputExistsError
from trainables import TrialConfiguration, inputs_of, load
from trainables.checkpoint import save_checkpoint
from trainables.configuration import build_model
from tuner.errors import JobNotFoundError, StorageError
from tuner.export import ENCODER_DIRECTORY, export_winner
from tuner.results import BaselineResult, DatasetResult, JobResult
from tuner.storage import join

SMALL = {"embedding_dim": 4, "expert_units": [4], "num_experts": 2, "gate_units": []}


@pytest.fixture
def results(tmp_path: Path, tiny_dataset: Dataset) -> JobResult:
    """A winner as a job leaves it in its storage."""
    root = tmp_path / "storage" / "job" / "1"
    checkpoint = root / "tiny" / "mmoe" / "trial-0001"
    checkpoint.mkdir(parents=True)
    configuration = TrialConfiguration.create("mmoe", SMALL)
    inputs = inputs_of(tiny_dataset)
    torch.manual_seed(0)
    save_checkpoint(checkpoint, configuration, inputs, build_model(configuration, inputs))
    tiny_dataset.encoder().save(join(str(root), "tiny", ENCODER_DIRECTORY))
    result = DatasetResult(
        model="mmoe",
        config={},
        metrics={},
        baseline=BaselineResult(metrics={}),
        checkpoint=str(checkpoint),
        run_id="1",
    )
    return JobResult(job="job", datasets={"tiny": result})


def test_an_export_is_all_that_is_needed_to_predict(
    results: JobResult, tmp_path: Path, tiny_dataset: Dataset
) -> None:
    out = tmp_path / "exported" / "tiny"
    export_winner(results, "tiny", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "configuration.json",
        "encoder.json",
        "model.safetensors",
        "vocabularies.parquet",
    ]
    assert list(out.parent.iterdir()) == [out]
    schema = tiny_dataset.manifest.table
    raw = {name: ["1", "unseen"] for name in schema.categorical}
    raw |= {name: ["0.5", "2"] for name in schema.numerical}
    predictions = load(out).predict(pd.DataFrame(raw))
    assert sorted(predictions) == ["pctcvr", "pctr", "pcvr"]
    assert all(len(values) == 2 for values in predictions.values())


def test_an_existing_directory_is_not_touched(results: JobResult, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    out.mkdir()
    with pytest.raises(OutputExistsError, match=r"--out .*exported: already exists; give another"):
        export_winner(results, "tiny", out)
    assert list(out.iterdir()) == []


def test_an_unknown_dataset_is_told_with_the_known_ones(results: JobResult, tmp_path: Path) -> None:
    with pytest.raises(JobNotFoundError) as caught:
        export_winner(results, "tinny", tmp_path / "exported")
    assert str(caught.value) == "--dataset tinny: no such dataset in job 'job'; it has tiny"
    assert not (tmp_path / "exported").exists()


def test_a_checkpoint_that_is_gone_leaves_nothing_behind(
    results: JobResult, tmp_path: Path
) -> None:
    encoder = tmp_path / "storage" / "job" / "1" / "tiny" / ENCODER_DIRECTORY
    encoder.rename(encoder.with_name("moved"))
    with pytest.raises(StorageError) as caught:
        export_winner(results, "tiny", tmp_path / "new" / "exported")
    assert str(caught.value) == f"storage: {encoder} is not there; was it moved or deleted?"
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_told(results: JobResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "exported"
    with pytest.raises(StorageError) as caught:
        export_winner(results, "tiny", out)
    assert str(caught.value) == (
        f"--out {out}: cannot be written (Not a directory); name another directory"
    )
