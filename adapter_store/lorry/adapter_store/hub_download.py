"""A process that downloads one adapter from a Hugging Face hub into a directory.

Reads one JSON object from its standard input and prints one: the commit, or why it failed. It has
limits of its own, for a hub may send more than it announces: no file grows beyond `max_bytes`, and
its parent kills it when its time is over. Only the two files of an adapter are ever asked for.
"""

import hashlib
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorry.adapter_store.ingest import CONFIG_NAME, WEIGHTS_NAME
from lorry.adapter_store.peft_config import MAX_CONFIG_BYTES

COMMIT_CHARS = 40
CALL_TIMEOUT_S = 30.0  # without a byte
FIRST_SERVER_ERROR, PASSING_CLIENT_ERRORS = 500, (408, 429)  # too late, too many


class Refused(Exception):
    """What the hub has is not taken."""


def download(request: Mapping[str, Any]) -> str:
    """Both files as of one commit, which is returned."""
    from huggingface_hub import HfApi, hf_hub_download

    repository, revision = request["repository"], request["revision"]
    info = HfApi().model_info(
        repository, revision=revision, files_metadata=True, timeout=CALL_TIMEOUT_S
    )
    commit = str(info.sha)
    if len(revision) == COMMIT_CHARS and commit != revision:
        raise Refused(f"the hub answers commit {commit[:COMMIT_CHARS]!r} for {revision}")
    files = {file.rfilename: file for file in info.siblings or ()}
    for name, most in ((CONFIG_NAME, MAX_CONFIG_BYTES), (WEIGHTS_NAME, request["max_bytes"])):
        if name not in files:
            raise Refused(f"{repository} holds no {name}")
        size = files[name].size
        if size is None or size > most:
            raise Refused(f"{name} has {size} bytes, more than {most}")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = hf_hub_download(
            repository,
            name,
            revision=commit,
            local_dir=request["directory"],
            etag_timeout=CALL_TIMEOUT_S,
        )
        _check(Path(path), files[name])
    return commit


def may_pass(error: BaseException | None) -> bool:
    """Whether the hub, or the way to it, is to blame, and not what was asked for."""
    from huggingface_hub.errors import HfHubHTTPError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= FIRST_SERVER_ERROR or status in PASSING_CLIENT_ERRORS
    client_error, _ = HfHubHTTPError.__bases__  # of whatever HTTP client the library uses
    return isinstance(error, (client_error, ConnectionError, TimeoutError))


def _check(path: Path, file: Any) -> None:
    """That the bytes are those that the commit names."""
    if path.stat().st_size != file.size:
        raise Refused(f"{path.name} came with {path.stat().st_size} bytes, not {file.size}")
    if file.lfs is not None:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != file.lfs.sha256:
            raise Refused(f"{path.name} came with sha256 {digest}, not {file.lfs.sha256}")


def main() -> None:
    request = json.loads(sys.stdin.readline())
    limit = max(request["max_bytes"], MAX_CONFIG_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        answer: dict[str, Any] = {"commit": download(request)}
    except Exception as error:  # of the library, of its HTTP client, or of the operating system
        answer = {
            "error": f"{type(error).__name__}: {error}"[:1000],
            "may_pass": may_pass(error) or may_pass(error.__cause__),
        }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
