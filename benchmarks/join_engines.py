"""The join of raw AliExpress files by three engines: seconds and peak memory of each.

    python benchmarks/raw_files.py aliexpress --impressions 10000000 --out /tmp/raw
    python benchmarks/join_engines.py --input /tmp/raw --country nl

Each reads the header-less CSV files with typed columns, joins item rows with user rows by search,
and writes Parquet. Run in turns, ``--repeat`` times. Polars and pandas are not installed with the
product's lock (``pip install polars``). The last line is one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from resident_memory import run_measured

USER, ITEM = range(1, 34), range(1, 50)


def join_duckdb(user: Path, item: Path, out: Path) -> None:
    """Join with DuckDB, two threads, at most 600 MB before it spills."""
    import duckdb

    connection = duckdb.connect(config={"memory_limit": "600MB", "threads": 2})
    users = {f"u{i}": "BIGINT" if i == 1 else "DOUBLE" for i in USER}
    items = {f"i{i}": "BIGINT" if i == 1 else "DOUBLE" for i in ITEM}
    options = "header=false, delim=',', quote='', auto_detect=false"
    connection.execute(
        f"COPY (SELECT * FROM read_csv('{item}', {options}, columns={items}) AS i LEFT JOIN "
        f"read_csv('{user}', {options}, columns={users}) AS u ON i.i1 = u.u1) "
        f"TO '{out}' (FORMAT parquet, COMPRESSION lz4_raw, ROW_GROUP_SIZE 61440)"
    )


def join_polars(user: Path, item: Path, out: Path) -> None:
    """Join with Polars' streaming engine."""
    import polars as pl

    users = {f"u{i}": pl.Int64 if i == 1 else pl.Float64 for i in USER}
    items = {f"i{i}": pl.Int64 if i == 1 else pl.Float64 for i in ITEM}
    left = pl.scan_csv(item, has_header=False, schema=items, quote_char=None)
    right = pl.scan_csv(user, has_header=False, schema=users, quote_char=None)
    joined = left.join(right, left_on="i1", right_on="u1", how="left", maintain_order="left")
    joined.sink_parquet(out, compression="lz4", row_group_size=61_440, engine="streaming")


def join_pandas(user: Path, item: Path, out: Path) -> None:
    """Join as the reference preprocessing does: both files whole, one merge."""
    import pandas as pd

    users = pd.read_csv(user, header=None, names=[f"u{i}" for i in USER])
    items = pd.read_csv(item, header=None, names=[f"i{i}" for i in ITEM])
    items.merge(users, left_on="i1", right_on="u1", how="left").to_parquet(out)


ENGINES: dict[str, Callable[[Path, Path, Path], None]] = {
    "duckdb": join_duckdb,
    "polars": join_polars,
    "pandas": join_pandas,
}


def main() -> None:
    """Measure every engine in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--country", default="nl")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=list(ENGINES))
    parser.add_argument("--only", choices=tuple(ENGINES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    user, item = (arguments.input / f"{arguments.country}_{k}_train.csv" for k in ("user", "item"))
    if arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.input) as directory:
            started = time.perf_counter()
            ENGINES[arguments.only](user, item, Path(directory) / "joined.parquet")
            print(time.perf_counter() - started)
        return
    figures: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repeat):
        for engine in arguments.engines:
            command = [sys.executable, __file__, "--input", str(arguments.input)]
            command += ["--country", arguments.country, "--only", engine]
            try:
                run = run_measured(command)
            except subprocess.CalledProcessError as error:
                print(f"{engine}: failed with code {error.returncode}")
                continue
            seconds = float(run.output.split()[-1])
            print(f"{engine}: {seconds:.1f} s, peak {run.peak_bytes / 2**20:,.0f} MiB", flush=True)
            figure = {"seconds": round(seconds, 1), "peak_mib": run.peak_bytes >> 20}
            figures.setdefault(engine, []).append(figure)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
