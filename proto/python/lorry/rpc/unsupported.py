"""What the protocol has and no service can do yet: refused by name, never ignored."""

from lorry.rpc.errors import FeatureUnsupported
from lorry.v1 import inference_service_pb2, worker_service_pb2


def refuse_unsupported(
    message: inference_service_pb2.GenerationSpec | worker_service_pb2.Submit,
) -> None:
    """Raise FeatureUnsupported for what is asked for; a value that changes nothing is not."""
    if message.HasField("guided"):
        raise FeatureUnsupported("guided is not supported yet", field="guided")
