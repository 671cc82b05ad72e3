"""What can be checked of the manifests without a cluster, beyond their schemas."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support.command import REPO, child_environment

RENDERED = REPO / "deploy" / "kubernetes" / "rendered"
KINDS = {"router": "Deployment", "adapter-store": "StatefulSet", "worker": "StatefulSet"}
GRACE_S = 30  # of the services, on SIGTERM


@cache
def documents(overlay: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(RENDERED / f"{overlay}.yaml"))


GPU = {(each["kind"], each["metadata"]["name"]): each for each in documents("gpu")}
PODS: Mapping[str, Any] = {
    name: GPU[kind, name]["spec"]["template"]["spec"] for name, kind in KINDS.items()
}
OVERLAYS = sorted(path.stem for path in RENDERED.iterdir())


def pods() -> Iterator[Mapping[str, Any]]:
    """Of all overlays."""
    for document in (each for overlay in OVERLAYS for each in documents(overlay)):
        if document["kind"] == "Pod":
            yield document["spec"]
        elif document["kind"] in ("Deployment", "StatefulSet"):
            yield document["spec"]["template"]["spec"]


def containers() -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each with its pod."""
    for pod in pods():
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            yield pod, container


def test_every_container_is_restricted() -> None:
    for pod, container in containers():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_ranks_have_a_gpu_each_and_memory_to_share() -> None:
    [worker] = [
        d
        for d in documents("gpu-tensor-parallel")
        if d["metadata"]["name"] == "worker" and d["kind"] == "StatefulSet"
    ]
    pod = worker["spec"]["template"]["spec"]
    [container] = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(variables["LORRY_WORKER_TENSOR_PARALLEL"]) == gpus > 1
    [shared] = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    [volume] = [each["emptyDir"] for each in pod["volumes"] if each["name"] == shared]
    assert volume == {"medium": "Memory", "sizeLimit": "2Gi"}


@pytest.mark.parametrize("name", KINDS)
def test_a_pod_has_time_to_drain(name: str) -> None:
    pod = PODS[name]
    pause = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {})
    assert pod["terminationGracePeriodSeconds"] >= pause.get("seconds", 0) + GRACE_S + 10


@pytest.mark.parametrize("name", KINDS)
def test_probes_and_services_go_where_the_service_listens(name: str) -> None:
    [container] = PODS[name]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    variables = {each["name"]: each["value"] for each in container["env"]}
    prefix = f"LORRY_{name.upper().replace('-', '_')}_"
    assert variables[f"{prefix}ADDRESS"] == f"0.0.0.0:{ports['grpc']}"
    assert variables[f"{prefix}METRICS_ADDRESS"] == f"0.0.0.0:{ports['metrics']}"
    assert variables[f"{prefix}HEALTH_ADDRESS"] == f"0.0.0.0:{ports['health']}"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
    served = GPU["Service", name]["spec"]["ports"]
    assert {each["port"] for each in served} == {ports["grpc"], ports["metrics"]}


def test_every_variable_is_an_option_of_its_service() -> None:
    for name in KINDS:
        helped = subprocess.run(
            [sys.executable, "-m", f"lorry.{name.replace('-', '_')}", "--help"],
            env=child_environment(COLUMNS="200"),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.replace(",", "]")
        for _, container in containers():
            if container["name"] == name:
                for variable in (each["name"] for each in container["env"]):
                    assert not variable.startswith("LORRY") or f"{variable}]" in helped


@pytest.mark.parametrize("name", KINDS)
def test_one_pod_at_a_time_goes_and_only_named_peers_come_in(name: str) -> None:
    labels = {"app.kubernetes.io/component": name}
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = GPU[kind, name]["spec"]
        selected = spec["selector" if kind == "PodDisruptionBudget" else "podSelector"]
        assert selected == {"matchLabels": labels}
    assert GPU["PodDisruptionBudget", name]["spec"]["maxUnavailable"] == 1
    assert all(
        rule["from"] and rule["ports"] for rule in GPU["NetworkPolicy", name]["spec"]["ingress"]
    )


def test_what_no_policy_names_is_denied() -> None:
    spec = GPU["NetworkPolicy", "default-deny"]["spec"]
    assert spec["podSelector"] == {}
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in spec


@pytest.mark.parametrize("file", ["components/keda/scaled-object.yaml"])
def test_scaling_asks_for_metrics_that_there_are(file: str) -> None:
    known = set(re.findall(r"`(lorry_\w+)`", (REPO / "docs" / "metrics.md").read_text()))
    asked = set(re.findall(r"lorry_\w+", (Path(REPO) / "deploy" / "kubernetes" / file).read_text()))
    assert asked
    assert asked <= known
