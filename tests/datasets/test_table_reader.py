import gzip
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets import table_reader
from datasets.errors import TableError
from datasets.table_reader import open_table, open_tables


def csv_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    return path


def read(path: Path) -> list[tuple[int, list[dict[str, object]]]]:
    return [(batch.first_row, batch.rows.to_pylist()) for batch in open_table(path).batches()]


def test_csv_cells_are_text_with_quotes_crlf_bom_and_blank_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfa,b\r\n"x,\r\ny",007\r\n\r\n"say ""hi""",\r\n'
    path = csv_file(tmp_path, content)
    assert open_table(path).columns == ("a", "b")
    assert read(path) == [(1, [{"a": "x,\r\ny", "b": "007"}, {"a": 'say "hi"', "b": ""}])]


def test_compressed_csv_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert read(path) == [(1, [{"a": "1", "b": "2"}])]


def test_row_numbers_go_on_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_reader, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(table_reader, "_BATCH_ROWS", 7)
    frame = pd.DataFrame({"n": range(1, 101)})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        batches = read(tmp_path / name)
        assert len(batches) > 2
        for first_row, rows in batches:
            assert [int(str(row["n"])) for row in rows] == [
                first_row + offset for offset in range(len(rows))
            ]


@pytest.mark.parametrize("content", [b"a,b\n", b"a,b"])
def test_header_alone_gives_no_rows(tmp_path: Path, content: bytes) -> None:
    assert sum(len(rows) for _, rows in read(csv_file(tmp_path, content))) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; give a file with a header and rows"),
        (b"\n\n", "the file is empty"),
        (b"a,b\n1,2\n\n3\n", "row 2 has 1 cells, the header has 2; mend that line"),
        (b"a,b\n1,2,3\n", "row 1 has 3 cells, the header has 2; mend that line"),
        (b"a,b\n1,\xff\n", "a cell after row 0 is not UTF-8 text; convert the file to UTF-8"),
        (b"\xff\xfea\n", "the header is not UTF-8 text; convert the file to UTF-8"),
        (b"PAR1 but no more", "not readable as Parquet"),
        (gzip.compress(b"a,b\n1,2\n"), "is compressed by gzip; let its name end in .gz"),
        (b"PK\x03\x04...", "is a zip archive; unpack it"),
        (b'a,b\n1,x\n2,"5 inch\n3,y\n', "row 2: the quote that opens column 'b' is not closed"),
        (b'a,b\n1,x\n2,"5 inch\n3,y', "row 2: the quote that opens column 'b' is not closed"),
        (b'a,b\n1,"' + b"x" * 200_000 + b'"\n3\n', "not readable as CSV after row 0"),
    ],
)
def test_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TableError, match=message) as fault:
        read(csv_file(tmp_path, content))
    assert str(fault.value).startswith(str(tmp_path / "rows.csv"))
    assert "\n" not in str(fault.value)


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"n": range(1000)}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TableError, match="not readable as Parquet"):
        open_table(path)


def test_parquet_with_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    bytes_N = pa.array([b"x", b"ab\xb1"])
    table = pa.table({"color": pa.Array.from_buffers(pa.string(), 2, bytes_N.buffers())})
    pq.write_table(table, path)
    message = "column 'color': a cell after row 0 is not what its type says .*UTF8.*; write"
    with pytest.raises(TableError, match=message):
        read(path)
    path.write_bytes(path.read_bytes().replace(b"color", b"c\xb1lor"))
    with pytest.raises(TableError, match=r"not readable as Parquet .*; write the file again"):
        open_table(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"nowhere\.csv: no such file; give a CSV or Parquet file"):
        open_table(tmp_path / "nowhere.csv")
    with pytest.raises(TableError, match="is no file; give a CSV or Parquet file"):
        open_table(tmp_path)


def test_a_directory_and_a_pattern_name_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.tsv", ".hidden.csv", "_SUCCESS"):
        (tmp_path / name).write_text("n\n1\n")
    (tmp_path / "inside").mkdir()

    def opened(given: str | Path) -> list[str]:
        return [table.name.removeprefix(f"{tmp_path}/") for table in open_tables(given)]

    assert opened(tmp_path) == ["a.csv", "b.csv", "c.tsv"]
    assert opened(f"{tmp_path}/*.csv") == ["a.csv", "b.csv"]
    assert opened(tmp_path / "b.csv") == ["b.csv"]
    (tmp_path / "[a].csv").write_text("n\n1\n")  # a file's own name is no pattern
    assert opened(tmp_path / "[a].csv") == ["[a].csv"]


def test_a_pattern_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("n\n1\n")
    monkeypatch.chdir(tmp_path)
    assert [table.name for table in open_tables("*.csv")] == ["a.csv"]


def test_no_file_for_a_directory_or_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no file in it; give a CSV or Parquet file"):
        open_tables(tmp_path)
    with pytest.raises(TableError, match=r"\*\.csv: no file in it"):
        open_tables(f"{tmp_path}/*.csv")
    with pytest.raises(TableError, match=r"nowhere\.csv: no such file"):
        open_tables(tmp_path / "nowhere.csv")


def test_a_last_cell_of_several_lines_is_read(tmp_path: Path) -> None:
    for end in (b"", b"\n", b"\r\n"):
        path = csv_file(tmp_path, b'a,b\n1,"two\nlines\n"' + end)
        assert read(path) == [(1, [{"a": "1", "b": "two\nlines\n"}])]


def test_a_truncated_archive_is_told_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    rows = "".join(f"{number},{number * 7919}\n" for number in range(100_000))
    path.write_bytes(gzip.compress(f"a,b\n{rows}".encode())[:-1_000])
    with pytest.raises(TableError, match=r"rows\.csv\.gz: not readable as CSV after row"):
        read(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_that_are_not_wanted_are_not_read(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame({"a": ["1"], "note": ["n"], "b": ["2"], "last": ["x"]})
    path = tmp_path / f"rows.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    (table,) = open_tables(path, {"b", "a", "c"})
    assert table.columns == ("a", "note", "b", "last")
    assert [batch.rows.to_pylist() for batch in table.batches()] == [[{"a": "1", "b": "2"}]]


def test_rows_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\n1\n")
    (tmp_path / "a.csv~").write_bytes(b"a\n0\n")  # an editor's copy
    assert len(open_tables(tmp_path)) == 1
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    with pytest.raises(TableError, match=r"holds a\.csv and a\.csv\.gz, the same rows twice"):
        open_tables(tmp_path)
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(TableError, match="is a Delta table"):
        open_tables(tmp_path)


def test_files_of_a_uri_are_found_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "part 1%20.csv").write_bytes(b"a\n1\n")
    uri = tmp_path.as_uri()
    for given in (uri, f"{uri}/", f"{uri}/part*"):
        (table,) = open_tables(given)
        assert table.name == f"{uri}/part 1%20.csv"
        assert [batch.rows.to_pylist() for batch in table.batches()] == [[{"a": "1"}]]
