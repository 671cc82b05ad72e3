"""A file backend whose process is killed at its N-th call of the operating system.

    python -m tests.support.crashing DIRECTORY

For each N from 1 on a child does the work of two uploads, a publish, an update and a delete, on a
directory of its own, and kills itself by SIGKILL right before its N-th call that changes a file;
for writes also once half of the bytes are written. It reports each step that it has acknowledged.
When a child survives, all points have been seen. Prints a line of JSON for each.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorry.adapter_store import edits
from lorry.adapter_store.file_backend import FileBackend
from lorry.adapter_store.peft_config import resolve
from lorry.adapter_store.records import Adapter, Content, UploadRecord, Version
from lorry.rpc.names import AdapterName
from tests.support.adapters import TINY, lora_config

SPEC = resolve(lora_config(), TINY)
NAME = AdapterName("default", "sql")
PARTS = {b"1" * 32: (b"one-", b"first"), b"2" * 32: (b"two--", b"second")}
CALLS = ("mkdir", "link", "rename", "unlink", "rmdir", "fsync", "ftruncate", "pwrite")
MODEL = b"m" * 32


def upload_of(digest: bytes, etag: str = "") -> UploadRecord:
    return UploadRecord(
        key=digest[:1].decode() * 64,
        name=NAME,
        spec=SPEC,
        weights_bytes=sum(map(len, PARTS[digest])),
        weights_sha256=digest,
        labels={},
        expected_etag=etag,
        create_time_ns=1,
    )


def version_of(digest: bytes) -> Version:
    weights_bytes = sum(map(len, PARTS[digest]))
    return Version(
        digest=digest,
        max_rank=8,
        modules=("q_proj",),
        weights_bytes=weights_bytes,
        file_bytes=weights_bytes,
        upload=upload_of(digest).key,
        create_time_ns=1,
    )


def work(directory: Path) -> Iterator[str]:
    """What a store does with its backend; yields each step that it would acknowledge."""
    backend = FileBackend(directory, model_digest=MODEL)
    loaded = backend.load()
    adapter: Adapter | None = loaded.adapters[0] if loaded.adapters else None
    yield "opened"
    for digest in PARTS:
        upload = upload_of(digest, adapter.etag if adapter else "")
        backend.create_upload(upload)
        yield f"created {digest[:1].decode()}"
        offset = 0
        for part in PARTS[digest]:
            backend.append(upload.key, offset, part)
            offset += len(part)
            yield f"received {digest[:1].decode()} {offset}"
        backend.keep(upload.key, digest, Content(SPEC, 7))
        after = edits.publish(adapter, upload, version_of(digest), now_ns=2, kept=1)
        adapter = backend.commit(NAME, adapter, after).adapter
        yield f"published {digest[:1].decode()}"
        backend.drop_upload(upload.key)
        for old in backend.unreferenced():
            backend.drop(old)
    assert adapter is not None
    described = replace(adapter, description="an update")
    backend.commit(NAME, adapter, described)
    yield "described"
    backend.commit(NAME, described, None)
    yield "deleted"
    for old in backend.unreferenced():
        backend.drop(old)
    backend.close()
    yield "closed"


class Countdown:
    """Kills this process at its N-th call."""

    def __init__(self, count: int, *, torn: bool) -> None:
        self._left, self._torn = count, torn

    def watch(self) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        io.open = self._counted("open", io.open)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if not self._left:
                if self._torn and name == "pwrite":
                    descriptor, data, offset = arguments
                    call(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper


def run_child(directory: Path, count: int, *, torn: bool) -> tuple[bool, list[str]]:
    """Whether it survived, and what it acknowledged."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            Countdown(count, torn=torn).watch()
            for step in work(directory):
                os.write(writer, f"{step}\n".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        acknowledged = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the child ended with status {status}"
    return status == 0, acknowledged


def main() -> None:
    root = Path(sys.argv[1])
    for torn in (False, True):
        count, survived = 0, False
        while not survived:
            count += 1
            directory = root / f"{'torn' if torn else 'whole'}-{count}"
            survived, acknowledged = run_child(directory, count, torn=torn)
            found = {
                "directory": str(directory),
                "survived": survived,
                "acknowledged": acknowledged,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
