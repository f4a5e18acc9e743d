"""What a cluster needs beside Ray: PostgreSQL, S3 over HTTP, and MLflow with basic auth on both.

Each runs on a host of its own network and ends with it. Passwords go in environment variables and
files alone, so that no process list shows them.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosts import Host

__all__ = ["Services", "postgres_binaries", "services", "wait_until"]

SERVE = Path(__file__).parents[2] / "deploy" / "mlflow" / "serve.py"
BUCKET = "pwiser"
DATABASE = "mlflow"
POSTGRES_USER = "postgres"
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Services:
    """Where they are, and what a client of them has in its environment."""

    tracking: str
    storage: str
    s3_address: str
    environment: dict[str, str]


def postgres_binaries() -> Path | None:
    """The directory of Debian's PostgreSQL server; None if it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for something that other processes do; complain by name if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.2)


@contextmanager
def services(host: Host, directory: Path, password: str, s3_secret: str) -> Iterator[Services]:
    """Start all three on a host.

    Args:
        host: where they listen: S3 at an address of its own, the others at the host's.
        directory: for logs.
        password: of MLflow's user `admin`.
        s3_secret: the secret key that clients sign with.
    """
    database_password = "database-" + password[::-1]
    s3_address = host.add_address(100)
    s3 = f"http://{s3_address}:9000"
    tracking = f"http://{host.address}:5000"
    environment = {
        "AWS_ACCESS_KEY_ID": "pwiser",
        "AWS_SECRET_ACCESS_KEY": s3_secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }
    with tempfile.TemporaryDirectory(prefix="pwiser-postgres-") as data:
        _start_postgres(host, Path(data), directory, database_password)
        host.start("moto_server", "-H", s3_address, "-p", "9000", log=directory / "s3.log")
        wait_until(lambda: _answers(host, "PUT", f"{s3}/{BUCKET}"), "the S3 server")
        uri = f"postgresql://{POSTGRES_USER}:{database_password}@{host.address}/{DATABASE}"
        host.start(
            *("python", str(SERVE)),
            log=directory / "mlflow.log",
            environment=environment
            | {
                "MLFLOW_BACKEND_STORE_URI": uri,
                "MLFLOW_AUTH_DATABASE_URI": f"{uri}_users",
                "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
                "MLFLOW_S3_ENDPOINT_URL": s3,
                "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
                "MLFLOW_AUTH_ADMIN_PASSWORD": password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": database_password,
                "MLFLOW_SERVER_ALLOWED_HOSTS": f"{host.address}:5000",
                "MLFLOW_HOST": host.address,
                "MLFLOW_WORKERS": "1",
            },
        )
        wait_until(lambda: _answers(host, "GET", f"{tracking}/health"), "MLflow")
        try:
            yield Services(tracking, f"s3://{BUCKET}", s3_address, environment)
        finally:
            host.end_processes()


def _start_postgres(host: Host, data: Path, directory: Path, password: str) -> None:
    binaries = postgres_binaries()
    assert binaries is not None
    shutil.chown(data, POSTGRES_USER)
    secret = data / "password"
    secret.write_text(password)
    shutil.chown(secret, POSTGRES_USER)
    as_postgres = ("runuser", "-u", POSTGRES_USER, "--")
    made = host.run(
        *as_postgres,
        *(str(binaries / "initdb"), "-D", str(data / "cluster"), "--pwfile", str(secret)),
        "--auth=scram-sha-256",
        cwd=data,
    )
    assert made.returncode == 0, made.stderr
    access = data / "cluster" / "pg_hba.conf"
    access.write_text(f"host all all {host.address}/24 scram-sha-256\n")
    host.start(
        *as_postgres,
        *(str(binaries / "postgres"), "-D", str(data / "cluster"), "-h", host.address, "-k", ""),
        log=directory / "postgres.log",
    )
    login = {"PGPASSWORD": password, "PGHOST": host.address, "PGUSER": POSTGRES_USER}

    def create(database: str) -> bool:
        return host.run("createdb", database, environment=login).returncode == 0

    wait_until(lambda: create(DATABASE), "PostgreSQL")
    assert create(f"{DATABASE}_users")


def _answers(host: Host, method: str, url: str) -> bool:
    try:
        asked = host.run("curl", "-sf", "-o", "/dev/null", "-X", method, url, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0
