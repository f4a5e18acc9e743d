"""Numericals loaded as float16: rounded once, the same at serving, never infinite."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets import Dataset, Encoder, TableError, open_dataset, prepare_table, validate
from datasets.node_cache import CACHE_VARIABLE


@pytest.fixture
def prepare(
    tmp_path: Path,
    schema_file: Path,
    write_csv: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Dataset]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    plain = schema_file.read_text()

    def run(frame: pd.DataFrame, kind: str, normalize: str = "standard") -> Dataset:
        text = plain.replace("price: {}", f"price: {{normalize: {normalize}}}")
        schema_file.write_text(text + f"numerical_type: {kind}\n")
        prepare_table(input=write_csv(frame), schema=schema_file, out=tmp_path / kind)
        return open_dataset(str(tmp_path / kind))

    return run


def test_float16_is_float32_rounded(frame: pd.DataFrame, prepare: Callable[..., Dataset]) -> None:
    full, half = prepare(frame, "float32"), prepare(frame, "float16")
    assert full.digest != half.digest
    assert validate(half) == []
    for split in ("train", "valid", "test"):
        expected, loaded = full.load(split), half.load(split)
        assert loaded.numericals_ND.dtype == np.float16
        rounded = expected.numericals_ND.astype(np.float16)
        np.testing.assert_array_equal(loaded.numericals_ND, rounded)
        np.testing.assert_array_equal(loaded.ids_NF, expected.ids_NF)
        shared = half.load_shared(split)
        assert shared.numericals_ND.dtype == np.float16
        np.testing.assert_array_equal(shared.numericals_ND, loaded.numericals_ND)
        assert half.size_bytes(split) == loaded.size_bytes
        assert full.size_bytes(split) - half.size_bytes(split) == rounded.nbytes


def test_serving_rounds_like_loading(
    frame: pd.DataFrame, prepare: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = prepare(frame, "float16")
    dataset.encoder().save(tmp_path / "encoder")
    ids_NF, numericals_ND = Encoder.load(tmp_path / "encoder").encode(frame)
    assert numericals_ND.dtype == np.float16
    pairs = zip(ids_NF.tolist(), numericals_ND.tolist(), strict=True)
    served = {(*ids, *values) for ids, values in pairs}
    for split in ("train", "valid", "test"):
        loaded = dataset.load(split)
        for ids, values in zip(loaded.ids_NF.tolist(), loaded.numericals_ND.tolist(), strict=True):
            assert (*ids, *values) in served


def test_values_beyond_float16_are_refused_in_train_and_saturate_elsewhere(
    frame: pd.DataFrame, prepare: Callable[..., Dataset]
) -> None:
    large = frame.assign(price=frame.price * 1e6)
    message = r"rows\.csv: column 'price' reaches .* float16 ends at 65504; choose another norm"
    with pytest.raises(TableError, match=message):
        prepare(large, "float16", "none")
    dataset = prepare(frame, "float16", "none")
    _, numericals_ND = dataset.encoder().encode(large)
    assert numericals_ND[:, 1].max() == 65504
    _, numericals_ND = dataset.encoder().encode(large.assign(price=-1e9))
    assert (numericals_ND[:, 1] == -65504).all()
