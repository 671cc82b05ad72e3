"""Adapters from the Hugging Face hub, for operators, where the store's configuration allows it."""

import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from lorry.adapter_store.import_scan import opened
from lorry.adapter_store.ingest import Ingested, Source, ingest
from lorry.adapter_store.store import Store
from lorry.rpc.errors import (
    AdapterInvalid,
    DeadlineExpired,
    InvalidRequest,
    PermissionDenied,
    StoreFull,
    StoreUnavailable,
)
from lorry.rpc.names import AdapterName

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_IMPORTS = 8  # under way or waiting; one is downloaded at a time
RETRY_AFTER_S = 10.0
# Its own cache would be trusted by later runs, and its other protocol is not needed.
ENVIRONMENT = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
}


class HubAdapter(NamedTuple):
    """An adapter that came from the hub."""

    ingested: Ingested
    commit: str


class Hub:
    """Imports what `allowed` patterns match, such as ``my-org/*``; without patterns nothing."""

    def __init__(
        self, store: Store, *, allowed: tuple[str, ...], commits_only: bool, timeout_s: float
    ) -> None:
        self._store = store
        self._allowed, self._commits_only, self._timeout_s = allowed, commits_only, timeout_s
        self._num_imports = 0
        self._one_at_a_time = asyncio.Lock()

    async def bring(
        self, repository: str, revision: str, name: AdapterName, *, replace: bool
    ) -> HubAdapter:
        """Download a revision and publish it.

        Raises PermissionDenied where that is not allowed, AdapterInvalid naming what is wrong with
        it, StoreUnavailable while the hub is away, and what an upload raises.
        """
        self._check(repository, revision)
        async with self._counted(), self._one_at_a_time:
            with tempfile.TemporaryDirectory(prefix="lorry-hub-") as directory:
                commit = await self._download(repository, revision, Path(directory))
                with contextlib.ExitStack() as stack:
                    descriptor = stack.enter_context(opened(Path(directory)))
                    most = self._store.limits.max_weights_bytes
                    source = await asyncio.to_thread(Source.open, descriptor, most)
                    stack.callback(os.close, source.weights)
                    labels = {"hub-commit": commit}
                    ingested = await ingest(
                        self._store, name, source, labels=labels, replace=replace
                    )
                    return HubAdapter(ingested, commit)

    def _check(self, repository: str, revision: str) -> None:
        if not REPOSITORY.fullmatch(repository) or ".." in repository:
            raise InvalidRequest.of("repository", f"must be ORG/NAME, got {repository[:200]!r}")
        if not REVISION.fullmatch(revision) or ".." in revision:
            raise InvalidRequest.of(
                "revision", f"must be a commit, branch or tag, got {revision[:200]!r}"
            )
        if not any(fnmatchcase(repository, pattern) for pattern in self._allowed):
            raise PermissionDenied(
                f"{repository} matches no pattern that this store allows (--hub-allow)"
            )
        if self._commits_only and not COMMIT.fullmatch(revision):
            raise PermissionDenied(f"revision must be a whole commit here, got {revision[:200]!r}")

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        if self._num_imports >= MAX_IMPORTS:
            raise StoreFull(
                f"{MAX_IMPORTS} imports from the hub are under way", retry_after_s=RETRY_AFTER_S
            )
        self._num_imports += 1
        try:
            yield
        finally:
            self._num_imports -= 1

    async def _download(self, repository: str, revision: str, directory: Path) -> str:
        """Both files, by a process that is ended when its time is over or nobody waits for it.

        Raises StoreUnavailable where another attempt may succeed, else AdapterInvalid.
        """
        request = {
            "repository": repository,
            "revision": revision,
            "directory": str(directory),
            "max_bytes": self._store.limits.max_weights_bytes,
        }
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "lorry.adapter_store.hub_download"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | ENVIRONMENT | {"HF_HOME": str(directory / ".home")},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                reply, _ = await process.communicate(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise DeadlineExpired(
                f"{repository} was not downloaded within {self._timeout_s:g} s"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        answer = json.loads(reply) if reply else {"error": "the download was ended"}
        if answer.get("may_pass"):
            raise StoreUnavailable(
                f"the hub cannot be used now: {answer['error']}", retry_after_s=RETRY_AFTER_S
            )
        if "error" in answer:
            raise AdapterInvalid.of("repository", f"{repository}: {answer['error']}")
        return str(answer["commit"])
