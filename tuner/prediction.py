"""`pwiser predict`: scores of a table's rows, by an export, batch by batch."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import trainables
from datasets import TableError
from datasets.filesystem import Location, locate, refuse_existing
from datasets.table_reader import RowSource, open_tables
from tuner.errors import StorageError

__all__ = ["predict_table"]


def predict_table(export: Path, table: str, out: str) -> int:
    """Score every row of a table, in its order, and write `pctr` (and `pctcvr`, `pcvr`) as Parquet.

    Memory holds a batch; the file appears whole or not at all.

    Args:
        export: directory that `pwiser export` wrote.
        table: CSV or Parquet rows: a file, a directory of files, a pattern; columns that are no
            features are left out.
        out: path or URI of the file to write; it must not exist.

    Returns:
        The number of rows.

    Raises:
        CheckpointError: if the export cannot be used.
        TableError: if the table cannot be read, or its rows do not fit the export.
        OutputExistsError: if something lies at `out`.
        StorageError: if `out` cannot be written.
    """
    target = locate(out)
    refuse_existing(target, shown=out)
    predictor = trainables.load(export)
    encoder = predictor.encoder
    sources = open_tables(table, frozenset((*encoder.categorical, *encoder.numerical)))
    folder, _, name = target.path.rpartition("/")
    partial = Location(target.filesystem, f"{folder}/.{name}.partial")
    try:
        target.filesystem.create_dir(folder, recursive=True)
        with partial.filesystem.open_output_stream(partial.path) as sink:
            num_rows = _write(predictor, sources, sink)
        target.filesystem.move(partial.path, target.path)
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written ({error}); name another file"
        ) from error
    finally:
        if partial.exists():
            partial.filesystem.delete_file(partial.path)
    return num_rows


def _write(
    predictor: trainables.Predictor, sources: tuple[RowSource, ...], sink: pa.NativeFile
) -> int:
    columns = list(predictor.predict(_no_rows(predictor)))
    schema = pa.schema([(column, pa.float64()) for column in columns])
    num_rows = 0
    with pq.ParquetWriter(sink, schema) as writer:
        for source in sources:
            for batch in source.batches():
                table = pa.Table.from_batches([batch.rows])
                try:
                    scores = predictor.predict(table)
                except TableError as error:
                    last = batch.first_row + table.num_rows - 1
                    raise TableError(
                        f"{source.name}: rows {batch.first_row} to {last}: {error}"
                    ) from error
                writer.write_table(pa.table(scores, schema=schema))
                num_rows += table.num_rows
    return num_rows


def _no_rows(predictor: trainables.Predictor) -> pa.Table:
    names = (*predictor.encoder.categorical, *predictor.encoder.numerical)
    return pa.table({name: pa.array([], pa.string()) for name in names})
