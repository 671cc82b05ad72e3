"""Calls by JSON and the server's own reflection alone, as grpcurl makes them."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

COMMAND = re.compile(r"grpcurl -plaintext (?:-d '([^']*)' )?([\w.]+:\d+) ([\w.]+/\w+)")
TIMEOUT_S = 60.0


class ReflectedCall(NamedTuple):
    """A grpcurl command."""

    body: str
    address: str
    method: str  # of a service, as SERVICE/METHOD


def grpcurl_calls(page: str) -> list[ReflectedCall]:
    """Those of a page of documentation."""
    commands = COMMAND.findall(page.replace("\\\n", "").replace("  ", ""))
    return [ReflectedCall(body or "{}", address, method) for body, address, method in commands]


def answers(address: str, call: ReflectedCall) -> Iterator[dict[str, Any]]:
    """What the service at `address` answers, whatever address the command names."""
    service, name = call.method.split("/")
    with grpc.insecure_channel(address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName(service).FindMethodByName(name)
        request = json_format.Parse(
            call.body, GetMessageClass(method.input_type)(), descriptor_pool=pool
        )
        begin: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
        answer = begin(
            f"/{call.method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )(request, timeout=TIMEOUT_S)
        for message in answer if method.server_streaming else [answer]:
            yield json_format.MessageToDict(message, descriptor_pool=pool)
