"""A worker process of the store: checks what strangers upload and packs page images.

Reads requests as JSON lines from its standard input and answers each with one line. A request
that takes longer than its limit ends the process, even if its parent is gone by then.
"""

import base64
import hashlib
import json
import logging
import mmap
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from crc32c import crc32c

from lorry.adapter_store.image import NUMPY_DTYPES, pack
from lorry.adapter_store.layout_json import layout_from_json
from lorry.adapter_store.lora import LoraSpec
from lorry.adapter_store.peft_config import parse_config, resolve
from lorry.adapter_store.safetensors_file import SafetensorsFile
from lorry.adapter_store.weights import check_weights
from lorry.kernels.page_layout import Dtype, ModelGeometry
from lorry.rpc.errors import DigestMismatch, LorryError
from lorry.rpc.heap import keep_freed_memory
from lorry.rpc.status import to_status

Request = Mapping[str, Any]
log = logging.getLogger(__name__)


def check_config_request(request: Request, geometry: ModelGeometry) -> str:
    """Resolve an adapter_config.json."""
    return resolve(parse_config(request["config"]), geometry).to_json()


def check_weights_request(request: Request, geometry: ModelGeometry) -> dict[str, Any]:
    """Check an uploaded file against its digest and its config."""
    spec, dtype = LoraSpec.from_json(request["spec"]), NUMPY_DTYPES[Dtype(request["dtype"])]
    content = map_file(Path(request["weights"]))
    if hashlib.sha256(content).hexdigest() != request["sha256"]:
        raise DigestMismatch("weights_sha256 is not the digest of the bytes received")
    checked = check_weights(content, spec, geometry, dtype)
    return {
        "digest": checked.digest.hex(),
        "weights_bytes": checked.weights_bytes,
        "crc32c": crc32c(content),
    }


def build_request(request: Request, geometry: ModelGeometry) -> int:
    """Pack an image into its preallocated file; returns its CRC-32C."""
    content = map_file(Path(request["weights"]))
    with ThreadPoolExecutor(1) as beside:
        checksum = beside.submit(crc32c, content)
        try:
            return _packed(request, content, geometry)
        finally:  # which goes before whatever came of damaged weights
            if checksum.result() != request["crc32c"]:
                raise DigestMismatch("the stored weights are damaged")


def _packed(request: Request, content: memoryview, geometry: ModelGeometry) -> int:
    file = SafetensorsFile(content)
    tensors = {name: file.tensor(name) for name in file.entries}
    spec = LoraSpec.from_json(request["spec"])
    layout = layout_from_json(request["layout"], geometry)
    with Path(request["image"]).open("r+b", buffering=0) as image:
        return pack(spec, tensors, layout, image.fileno())


OPERATIONS: Mapping[str, Callable[[Request, ModelGeometry], Any]] = {
    "check_config": check_config_request,
    "check_weights": check_weights_request,
    "build": build_request,
}


def map_file(path: Path) -> memoryview:
    """A file's bytes, read-only; unmapped with the last view of them."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def answer(request: Request, geometry: ModelGeometry) -> dict[str, Any]:
    """The result, or the status of the failure."""
    try:
        return {"result": OPERATIONS[request["operation"]](request, geometry)}
    except Exception as error:
        if not isinstance(error, LorryError):
            log.error("unexpected error in %s", request["operation"], exc_info=error)
        status = to_status(error).SerializeToString()
        return {"status": base64.b64encode(status).decode()}


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    geometry = ModelGeometry(**json.loads(sys.argv[1]))
    os.nice(int(sys.argv[2]))
    # Each tensor's arrays are new pages else: 45,000, and 140 ms and not 70 to check 80 MiB.
    keep_freed_memory()
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(request["limit_s"])
        reply = json.dumps(answer(request, geometry))
        signal.alarm(0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
