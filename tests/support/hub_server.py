"""As much of a Hugging Face hub as `huggingface_hub` asks for, over HTTP on 127.0.0.1."""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PART_BYTES = 1 << 16


@dataclass
class HubRepository:
    """One repository at one commit, and the ways in which its server misbehaves."""

    name: str  # ORG/NAME
    files: dict[str, bytes]
    branch: str = "main"
    commit: str = COMMIT
    announced: dict[str, int] = field(default_factory=dict)  # sizes other than the true ones
    served: dict[str, bytes] = field(default_factory=dict)  # bytes other than the announced ones
    hang: bool = False  # in the middle of each file
    asked: list[str] = field(default_factory=list)  # files that were downloaded


@contextlib.contextmanager
def serving_hub(repository: HubRepository) -> Iterator[str]:
    """The endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._file(send=False)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == f"/api/models/{repository.name}/revision/{self._revision(path)}":
                self._answer(200, json.dumps(_info(repository)).encode())
            else:
                self._file(send=True)

        def _revision(self, path: str) -> str:
            known = (repository.branch, repository.commit)
            return next((each for each in known if path.endswith(f"/{each}")), "\0")

        def _file(self, *, send: bool) -> None:
            prefix = f"/{repository.name}/resolve/{repository.commit}/"
            name = unquote(urlsplit(self.path).path).removeprefix(prefix)
            if name not in repository.files:
                self._answer(404, b"{}")
                return
            content = repository.served.get(name, repository.files[name])
            size = repository.announced.get(name, len(content))
            headers = {
                "ETag": f'"{hashlib.sha256(repository.files[name]).hexdigest()}"',
                "X-Repo-Commit": repository.commit,
            }
            if not send:
                self._answer(200, b"", headers, size=size)
                return
            repository.asked.append(name)
            self._answer(200, content, headers, size=len(content))

        def _answer(
            self,
            status: int,
            content: bytes,
            headers: dict[str, str] | None = None,
            *,
            size: int | None = None,
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content) if size is None else size))
            self.end_headers()
            if headers and content and repository.hang:
                self.wfile.write(content[: len(content) // 2])
                time.sleep(60)
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(content), PART_BYTES):
                    self.wfile.write(content[start : start + PART_BYTES])

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _info(repository: HubRepository) -> dict[str, object]:
    siblings = []
    for name, content in repository.files.items():
        size = repository.announced.get(name, len(content))
        sibling: dict[str, object] = {"rfilename": name, "size": size, "blobId": "b" * 40}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            sibling["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
        siblings.append(sibling)
    return {
        "id": repository.name,
        "modelId": repository.name,
        "sha": repository.commit,
        "private": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }
