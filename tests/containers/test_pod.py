"""The CPU overlay of deploy/kubernetes, played by podman, answers a request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.containers.engine import Engine
from tests.containers.images import TAG
from tests.support.command import REPO

RENDERED = REPO / "deploy" / "kubernetes" / "rendered" / "cpu.yaml"
POD, CLAIM, CONTAINERS = "lorry", "model", ["adapter-store", "worker", "router"]
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


@contextmanager
def played(engine: Engine, manifest: Path) -> Iterator[None]:
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
    for name in CONTAINERS:
        while not is_healthy(engine, name):
            assert time.monotonic() < deadline_s, engine.run("logs", f"{POD}-{name}")
            time.sleep(0.5)


def is_healthy(engine: Engine, name: str) -> bool:
    address = f"127.0.0.1:{dict(zip(CONTAINERS, (50052, 50053, 50051), strict=True))[name]}"
    probe = ["python", "-m", "lorry.rpc.health", f"--address={address}"]
    printed = engine.run("exec", f"{POD}-{name}", *probe, check=False)
    return printed.strip().endswith(" SERVING")


def test_the_pod_of_the_cpu_overlay_answers(engine: Engine, tmp_path: Path) -> None:
    if not engine.is_podman:
        pytest.skip("docker plays no pods")
    manifest = tmp_path / "pod.yaml"
    manifest.write_text(RENDERED.read_text().replace(":latest", f":{TAG}"))
    with played(engine, manifest):
        wait_until_healthy(engine)
        adapter = REPO / "demo" / "adapters" / "reverse"
        engine.run("cp", str(adapter), f"{POD}-adapter-store:/tmp/reverse")
        answer = engine.run("exec", f"{POD}-adapter-store", "python", "-c", ASK)
        assert answer.strip() == "ananab"
