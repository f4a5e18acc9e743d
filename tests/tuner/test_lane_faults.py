from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from datasets import DatasetError
from tuner.errors import StorageError
from tuner.lane_faults import DISK_ERRORS, LaneFaultError, blaming_lane


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StorageError("storage: cannot write /c; check access"), "storage: cannot write /c; check"),
        (DatasetError("/data/us: damaged"), "/data/us: damaged"),
    ],
)
def test_a_named_kind_of_error_is_the_lanes(error: Exception, told: str) -> None:
    with pytest.raises(LaneFaultError) as caught, blaming_lane((StorageError, DatasetError)):
        raise error
    assert str(caught.value).startswith(told)


def test_another_kind_is_left_alone() -> None:
    with (
        pytest.raises(ValueError, match="of the model"),
        blaming_lane((StorageError, DatasetError)),
    ):
        raise ValueError("of the model")


def test_weights_that_the_disk_does_not_take_are_the_lanes_fault(tmp_path: Path) -> None:
    with pytest.raises(LaneFaultError, match="No such file"), blaming_lane(DISK_ERRORS):
        save_file({"weight": torch.zeros(1)}, tmp_path / "gone" / "model.safetensors")


def test_weights_that_cannot_be_written_anywhere_are_not(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    tied = {"weight": weight, "same": weight}
    with pytest.raises(RuntimeError, match="share memory"), blaming_lane(DISK_ERRORS):
        save_file(tied, tmp_path / "model.safetensors")


def test_where_no_kind_is_named_all_are_the_lanes_on_one_line() -> None:
    with pytest.raises(LaneFaultError) as caught, blaming_lane():
        raise RuntimeError("CUDA error:\n no device")
    assert str(caught.value) == "RuntimeError: CUDA error: no device"


def test_a_fault_is_told_once() -> None:
    with pytest.raises(LaneFaultError) as caught, blaming_lane(), blaming_lane():
        raise OSError("the disk is full")
    assert str(caught.value) == "OSError: the disk is full"
