"""The Kubernetes manifests: they build, they hold to the schemas, and they hold together."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

KUBERAY = Path(__file__).parents[2] / "deploy" / "kuberay"
KUBERNETES = "1.33"
SECRETS = {
    "pwiser-ray": {"auth_token"},
    "pwiser-mlflow-client": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    "pwiser-mlflow-server": {
        "MLFLOW_BACKEND_STORE_URI",
        "MLFLOW_AUTH_DATABASE_URI",
        "MLFLOW_AUTH_ADMIN_USERNAME",
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    },
    "pwiser-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"},
}
"""What docs/deploy.md has the operator make, and no manifest holds."""

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed"
)
pytestmark = needs_kubectl


def build(name: str) -> list[dict[str, Any]]:
    """Build a kustomization."""
    built = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / name)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


@pytest.fixture(scope="module", params=["base", "job"])
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return build(request.param)


def walk(value: object) -> Iterator[dict[str, Any]]:
    """Give every mapping, at any depth."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from walk(part)
    elif isinstance(value, list):
        for part in value:
            yield from walk(part)


def pod_templates(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod template, those inside KubeRay's own kinds included."""
    return [found for found in walk(manifests) if "containers" in found.get("spec", {})]


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    metadata = template.get("metadata", {}) | {"name": "pod"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def test_kubernetes_kinds_hold_to_their_schema(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        if not manifest["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(manifest, desired_version=KUBERNETES, strict=True)


def test_pod_templates_hold_to_their_schema(manifests: list[dict[str, Any]]) -> None:
    templates = pod_templates(manifests)
    assert templates
    for template in templates:
        kubernetes_validate.validate(as_pod(template), desired_version=KUBERNETES, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    template = pod_templates(build("base"))[0]
    template["spec"]["containers"][0]["recources"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="recources"):
        kubernetes_validate.validate(as_pod(template), desired_version=KUBERNETES, strict=True)


def test_no_container_runs_as_root_or_without_limits(manifests: list[dict[str, Any]]) -> None:
    for template in pod_templates(manifests):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["runAsUser"] == 1000
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for part in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][part].keys()


def test_images_are_pinned(manifests: list[dict[str, Any]]) -> None:
    for template in pod_templates(manifests):
        for container in template["spec"]["containers"]:
            name, _, tag = container["image"].partition(":")
            assert name == "pwiser-tuner"
            assert tag in {"0.1.0", "0.1.0-cuda"}


def test_secrets_are_named_and_never_held(manifests: list[dict[str, Any]]) -> None:
    assert [found["metadata"]["name"] for found in manifests if found["kind"] == "Secret"] == []
    named = {found["secretRef"]["name"] for found in walk(manifests) if "secretRef" in found}
    named |= {found["secretName"] for found in walk(manifests) if "secretName" in found}
    assert named <= SECRETS.keys()
    assert "pwiser-ray" in named
    for found in walk(manifests):
        for variable in found.get("env") or []:
            assert variable["name"] == "PWISER_CACHE_DIR"


def test_the_documentation_makes_every_secret() -> None:
    text = (KUBERAY.parents[1] / "docs" / "deploy.md").read_text()
    for name, keys in SECRETS.items():
        assert f"create secret generic {name}" in text
        for key in keys:
            assert f"--from-literal={key}=" in text


def test_config_maps_that_are_named_are_there(manifests: list[dict[str, Any]]) -> None:
    made = {found["metadata"]["name"] for found in manifests if found["kind"] == "ConfigMap"}
    named = {found["configMapRef"]["name"] for found in walk(manifests) if "configMapRef" in found}
    named |= {
        found["configMap"]["name"]
        for found in walk(manifests)
        if isinstance(found.get("configMap"), dict)
    }
    assert named
    assert named <= made


def test_services_reach_a_port_of_the_pods_that_they_select() -> None:
    manifests = build("base")
    services = [found for found in manifests if found["kind"] == "Service"]
    assert services
    for service in services:
        selected = [
            template
            for template in pod_templates(manifests)
            if service["spec"]["selector"].items()
            <= template.get("metadata", {}).get("labels", {}).items()
        ]
        assert len(selected) == 1
        ports = {
            port["name"]
            for container in selected[0]["spec"]["containers"]
            for port in container["ports"]
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_the_mlflow_address_is_its_service() -> None:
    manifests = build("base")
    (service,) = [found for found in manifests if found["kind"] == "Service"]
    (addresses,) = [found for found in manifests if found["kind"] == "ConfigMap"]
    host = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert addresses["data"]["MLFLOW_TRACKING_URI"] == f"http://{host}"
    assert host in addresses["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_network_policies_select_pods_and_let_nobody_else_in() -> None:
    policies = {
        found["metadata"]["name"]: found["spec"]
        for found in build("base")
        if found["kind"] == "NetworkPolicy"
    }
    assert policies.keys() == {"ray", "mlflow"}
    for policy in policies.values():
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            assert rule["from"]
    mlflow = policies["mlflow"]["podSelector"]["matchLabels"]
    (template,) = [
        found
        for found in pod_templates(build("base"))
        if mlflow.items() <= found["metadata"]["labels"].items()
    ]
    assert template["spec"]["containers"][0]["name"] == "mlflow"


def test_ray_is_the_version_of_the_lock(manifests: list[dict[str, Any]]) -> None:
    lock = (KUBERAY.parents[1] / "requirements.lock").read_text().splitlines()
    versions = {found["rayVersion"] for found in walk(manifests) if "rayVersion" in found}
    assert versions == {line.removeprefix("ray==") for line in lock if line.startswith("ray==")}


def test_both_worker_groups_grow_by_themselves() -> None:
    (cluster,) = [found for found in build("base") if found["kind"] == "RayCluster"]
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    (container,) = groups["gpu"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert groups["gpu"]["minReplicas"] == 0 < groups["gpu"]["maxReplicas"]


def test_the_example_job_is_a_job_of_the_cluster() -> None:
    from tuner.job import parse_job

    job = parse_job((KUBERAY / "job" / "job.yaml").read_text(), "job.yaml")
    (ray_job,) = [found for found in build("job") if found["kind"] == "RayJob"]
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    lanes = job.resources.lanes
    assert lanes is not None
    needed = lanes * job.resources.workers_per_lane * job.resources.cpus_per_worker
    assert needed <= group["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert ray_job["spec"]["entrypoint"] == "pwiser tune /jobs/job.yaml"
