"""The CPU overlay of deploy/kubernetes, played by podman, answers a request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.containers.engine import Engine
from tests.containers.images import TAG
from tests.support.command import REPO

RENDERED = REPO / "deploy" / "kubernetes" / "rendered" / "cpu.yaml"
POD, CLAIM = "lorry-test-system", "lorry-test-system-model"
HEALTH_PORTS = {"adapter-store": 52052, "worker": 52053, "router": 52051}
HEALTHY_S = 180.0
# What `kubectl port-forward` and the lorry command do, from within the pod.
ASK = """
import asyncio, pathlib
from lorry.client import Client, Request

async def main():
    request = Request(prompt="banana>", adapter="reverse", temperature=0)
    async with Client() as client:
        await client.adapters.push(pathlib.Path("/tmp/reverse"))
        print((await client.generate(request)).text)

asyncio.run(main())
"""


def for_test(pod: dict[str, Any]) -> dict[str, Any]:
    """With names that are the test's own."""
    pod["metadata"]["name"] = POD
    for container in pod["spec"]["containers"]:
        container["image"] = container["image"].replace(":latest", f":{TAG}")
    for volume in pod["spec"]["volumes"]:
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = CLAIM
    return pod


@contextmanager
def played(engine: Engine, manifest: Path) -> Iterator[None]:
    engine.run("kube", "down", str(manifest), check=False)  # of a run that was killed
    engine.run("volume", "rm", "--force", CLAIM, check=False)
    bind = ["--opt", "type=none", "--opt", "o=bind", "--opt", f"device={REPO / 'demo' / 'model'}"]
    engine.run("volume", "create", *bind, CLAIM)
    try:
        engine.run("kube", "play", str(manifest))
        yield
    finally:
        engine.run("kube", "down", str(manifest), check=False)
        engine.run("volume", "rm", "--force", CLAIM, check=False)


def wait_until_healthy(engine: Engine) -> None:
    """Probe as a kubelet would: podman leaves that to systemd, which not every machine has."""
    deadline_s = time.monotonic() + HEALTHY_S
    for name, port in HEALTH_PORTS.items():
        while not is_healthy(engine, name, port):
            assert time.monotonic() < deadline_s, engine.logs(f"{POD}-{name}")
            time.sleep(0.5)


def is_healthy(engine: Engine, name: str, port: int) -> bool:
    probe = ["python", "-m", "lorry.rpc.health", f"--address=127.0.0.1:{port}"]
    printed = engine.run("exec", f"{POD}-{name}", *probe, check=False)
    return printed.strip().endswith(" SERVING")


def test_the_pod_of_the_cpu_overlay_answers(engine: Engine, tmp_path: Path) -> None:
    if not engine.is_podman:
        pytest.skip("docker plays no pods")
    manifest = tmp_path / "pod.yaml"
    YAML().dump(for_test(YAML(typ="safe").load(RENDERED)), manifest)
    with played(engine, manifest):
        wait_until_healthy(engine)
        adapter = REPO / "demo" / "adapters" / "reverse"
        engine.run("cp", str(adapter), f"{POD}-adapter-store:/tmp/reverse")
        answer = engine.run("exec", f"{POD}-adapter-store", "python", "-c", ASK)
        assert answer.strip() == "ananab"
