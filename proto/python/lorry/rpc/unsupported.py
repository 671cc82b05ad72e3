"""What the protocol has and no service can do yet: refused by name, never ignored."""

from lorry.rpc.errors import FeatureUnsupported
from lorry.v1 import inference_service_pb2, worker_service_pb2


def refuse_unsupported(
    message: inference_service_pb2.GenerationSpec | worker_service_pb2.Submit,
) -> None:
    """Raise FeatureUnsupported for what is asked for; a value that changes nothing is not."""
    sampling, response = message.sampling, message.response
    asked = {
        "sampling.repetition_penalty": sampling.HasField("repetition_penalty")
        and sampling.repetition_penalty != 1,
        "sampling.presence_penalty": sampling.presence_penalty != 0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0,
        "sampling.logit_bias": len(sampling.logit_bias) > 0,
        "response.prompt_logprobs": response.HasField("prompt_logprobs"),
        "guided": message.HasField("guided"),
        "slo": isinstance(message, inference_service_pb2.GenerationSpec)
        and message.HasField("slo"),
    }
    for field, is_asked in asked.items():
        if is_asked:
            raise FeatureUnsupported(f"{field} is not supported yet", field=field)
