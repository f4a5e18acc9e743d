"""A registered model behind MLflow's server: latency over HTTP of 1 row and of 1,000.

    python benchmarks/serving.py [--requests 300]

An MMoE with random weights on the demo preset's schema (16 categorical and 63 numerical fields) is
registered in a store of its own and served by ``mlflow models serve`` with one worker. The client
keeps one connection and sends JSON records; latency includes encoding and parsing. The prediction
alone, in a process of its own, stands beside it. The last line is JSON.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from run_header import run_header

from datasets import Dataset, open_dataset, synthesize
from trainables import TrialConfiguration, inputs_of, load
from trainables.checkpoint import save_checkpoint
from trainables.configuration import build_model
from tuner.export import ENCODER_DIRECTORY, export_winner, save_encoder
from tuner.registry import CHAMPION, register_winner
from tuner.results import BaselineResult, DatasetResult, JobResult
from tuner.tracking import connect

SEED = 0
IMPRESSIONS = 20_000
ROWS = (1, 1_000)
WARM_UP = 20
SIZES: dict[str, dict[str, Any]] = {
    "demo": {"embedding_dim": 16, "num_experts": 4, "expert_units": [64, 32], "gate_units": []},
    "paper": {},
}


def save_job(directory: Path, dataset: Dataset, settings: dict[str, Any], run_id: str) -> JobResult:
    """Leave a winner in a storage, as a job does."""
    checkpoint = directory / "storage" / "data" / "mmoe" / "trial-0001"
    checkpoint.mkdir(parents=True)
    configuration = TrialConfiguration.create("mmoe", settings)
    inputs = inputs_of(dataset)
    torch.manual_seed(SEED)
    save_checkpoint(checkpoint, configuration, inputs, build_model(configuration, inputs))
    save_encoder(dataset, str(directory / "storage" / "data" / ENCODER_DIRECTORY))
    result = DatasetResult(
        model="mmoe",
        config={},
        metrics={},
        baseline=BaselineResult(metrics={}),
        checkpoint=str(checkpoint),
        run_id=run_id,
    )
    return JobResult(job="serving", datasets={"data": result})


@contextmanager
def served(tracking: str, directory: Path) -> Iterator[int]:
    """Serve the champion; give its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", f"models:/pwiser-data@{CHAMPION}", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (directory / "server.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"MLFLOW_TRACKING_URI": tracking, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        sys.exit((directory / "server.log").read_text())
                    time.sleep(0.2)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def latencies_ms(call: Callable[[], object], requests: int) -> dict[str, float]:
    """Call so often; return the median, the 95th and the 99th percentile in milliseconds."""
    taken = []
    for index in range(requests + WARM_UP):
        started = time.perf_counter()
        call()
        if index >= WARM_UP:
            taken.append(1_000 * (time.perf_counter() - started))
    cuts = statistics.quantiles(taken, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def measure(size: str, requests: int) -> dict[str, dict[str, float]]:
    """Serve a model of that size; return its latencies by the number of rows."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        synthesize(out=directory / "data", impressions=IMPRESSIONS, seed=SEED)
        dataset = open_dataset(str(directory / "data"))
        tracking = f"sqlite:///{directory / 'mlflow.db'}"
        client = connect(tracking)
        experiment = client.create_experiment("serving", str(directory / "artifacts"))
        run = client.create_run(experiment)
        results = save_job(directory, dataset, SIZES[size], run.info.run_id)
        register_winner(client, results, "data", force=True)
        export_winner(results, "data", directory / "export")
        rows = dataset.raw_rows("test", max(ROWS)).to_pandas()
        predictor = load(directory / "export")
        with served(tracking, directory) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            for count in ROWS:
                some = rows[:count]
                body = json.dumps({"dataframe_records": json.loads(some.to_json(orient="records"))})

                def ask(body: str = body) -> None:
                    connection.request(
                        "POST", "/invocations", body, {"Content-Type": "application/json"}
                    )
                    answer = connection.getresponse()
                    content = answer.read()
                    if answer.status != 200:
                        sys.exit(content.decode())

                def predict(some: pd.DataFrame = some) -> dict[str, np.ndarray]:
                    return predictor.predict(some)

                found[f"{count} over HTTP"] = latencies_ms(ask, requests)
                found[f"{count} in process"] = latencies_ms(predict, requests)
    return found


def main() -> None:
    """Print latencies by size of the model and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=300, help="of each row of the table")
    requests = parser.parse_args().requests
    header = run_header(SEED, "mlflow", "torch", requests=requests)
    found = {}
    print("model   rows                p50 ms   p95 ms   p99 ms")
    for size in SIZES:
        found[size] = measure(size, requests)
        for what, taken in found[size].items():
            figures = "".join(f"{taken[name]:9.1f}" for name in ("p50", "p95", "p99"))
            print(f"{size:7} {what:16}{figures}", flush=True)
    print(json.dumps({"header": header, "latencies_ms": found}))


if __name__ == "__main__":
    main()
