"""Ask a service for its health: ``python -m lorry.rpc.health --address 127.0.0.1:50051``."""

import sys
from pathlib import Path
from typing import Any

import cyclopts
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.rpc.channel import Credentials, open_blocking_channel

app = cyclopts.App(name="lorry.rpc.health", version_flags=[], result_action="return_value")


@app.default
def check(
    *, address: str, service: str = "readiness", timeout_s: float = 5.0, tls: Path | None = None
) -> int:
    """Exit with 0 if the service answers SERVING, else with 1 and the reason.

    Parameters
    ----------
    address
        host:port of the server.
    service
        Full name of a service, `readiness`, or `liveness`.
    timeout_s
        Seconds to wait for an answer.
    tls
        Directory with ca.crt, and tls.crt and tls.key if the server asks for a certificate;
        without one the check is in plain text, as the --health-address of a service is.
    """
    with open_blocking_channel(address, Credentials(tls=tls)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # it has no stubs for type checkers
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            status = stub.Check(request, timeout=timeout_s).status
        except grpc.RpcError as error:
            print(f"{address} {service}: {error.code().name} {error.details()}", file=sys.stderr)
            return 1
    print(f"{address} {service}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(app())
