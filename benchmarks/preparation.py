"""Preparing raw files: impressions per second and the peak memory of all processes.

    python benchmarks/preparation.py --work /tmp/raw --impressions 2000000 10000000

Raw files are generated into ``--work`` where they are missing (10 million impressions take 4 GB of
AliExpress and 3.6 GB of Ali-CCP, a tenth of the impressions being common rows), then prepared by
the command line as a user would, each in its own process. Beside it the merge that the reference
preprocessing does, both raw files whole in pandas, at the largest of the sizes that stays below
``--pandas-limit`` (a process above it is killed). Memory is the sum of the proportional set sizes
of the process and its children, sampled. The last line is one line of JSON.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from raw_files import write_raw_files
from resident_memory import run_measured
from run_header import run_header

HERE = Path(__file__).parent
COUNTRY = "nl"


def generate(kind: str, impressions: int, work: Path) -> Path:
    """Return the directory of raw files, made where it is missing."""
    directory = work / f"{kind}-{impressions}"
    if not directory.exists():
        partial = work / f"{kind}-{impressions}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_raw_files(kind, partial, impressions=impressions, common=impressions // 10)
        partial.rename(directory)
    return directory


def cpu_s() -> float:
    """Return the processor seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def prepare(kind: str, raw: Path, impressions: int) -> dict[str, object]:
    """Prepare one directory with the command line and measure it."""
    out = raw.with_name(f"{raw.name}-prepared")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tuner", "data", "prepare", kind]
    command += ["--input", str(raw), "--out", str(out)]
    if kind == "aliexpress":
        command += ["--raw", "--country", COUNTRY]
    load, cpu, started = os.getloadavg()[0], cpu_s(), time.perf_counter()
    run = run_measured(command)
    seconds = time.perf_counter() - started
    figures: dict[str, object] = {
        "what": kind,
        "impressions": impressions,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_s() - cpu, 1),
        "impressions_per_s": round(impressions / seconds),
        "peak_mib": run.peak_bytes >> 20,
        "load_before": round(load, 1),
    }
    print(json.dumps(figures), flush=True)
    shutil.rmtree(out)
    return figures


def merge_with_pandas(sizes: list[int], work: Path, limit_bytes: int) -> dict[str, object]:
    """Measure the pandas merge at the largest size that survives."""
    for impressions in sorted(sizes, reverse=True):
        raw = generate("aliexpress", impressions, work)
        command = [sys.executable, str(HERE / "join_engines.py"), "--input", str(raw)]
        command += ["--country", COUNTRY, "--only", "pandas"]
        started = time.perf_counter()
        try:
            run = run_measured(command, memory_limit_bytes=limit_bytes)
        except subprocess.CalledProcessError as error:
            print(f"pandas merge of {impressions:,}: ended with {error.returncode}", flush=True)
            continue
        seconds = time.perf_counter() - started
        rows = round(impressions * 0.9)  # train alone
        figures: dict[str, object] = {
            "what": "pandas merge of train, to Parquet",
            "impressions": rows,
            "seconds": round(seconds, 1),
            "impressions_per_s": round(rows / seconds),
            "peak_mib": run.peak_bytes >> 20,
            "limit_mib": limit_bytes >> 20,
        }
        print(json.dumps(figures), flush=True)
        return figures
    return {"what": "pandas merge", "impressions": 0}


def main() -> None:
    """Measure every kind at every size, smallest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--impressions", type=int, nargs="+", default=[2_000_000, 10_000_000])
    parser.add_argument("--kinds", nargs="+", default=["aliexpress", "aliccp"])
    parser.add_argument("--pandas-limit", type=float, default=8.0, help="GiB; 0 leaves it out")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    header = run_header(0)
    runs = [
        prepare(kind, generate(kind, impressions, arguments.work), impressions)
        for kind in arguments.kinds
        for impressions in sorted(arguments.impressions)
    ]
    if arguments.pandas_limit:
        limit_bytes = int(arguments.pandas_limit * 2**30)
        runs.append(merge_with_pandas(arguments.impressions, arguments.work, limit_bytes))
    print(json.dumps({**header, "runs": runs}))


if __name__ == "__main__":
    main()
