"""Pushing many adapters: several at a time, each to its own end, whatever becomes of the others."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorry.client.adapter import Adapter
from lorry.client.adapters import Adapters
from lorry.client.upload import Progress
from lorry.client.weights import AdapterFiles, default_id
from lorry.rpc.errors import InvalidRequest, LorryError
from lorry.rpc.names import check_id

PARALLEL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One adapter to push."""

    path: Path  # a directory or a safetensors file
    adapter_id: str
    config: Path | None = None  # None: beside the weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What has become of one push: an adapter or an error."""

    push: Push
    adapter: Adapter | None = None
    error: Exception | None = None
    unchanged: bool = False  # the very same files were there already


def plan_pushes(paths: Sequence[Path]) -> list[Push]:
    """One push for each path, named after it; raises ValueError before anything is sent."""
    pushes = [Push(path=path, adapter_id=name_of(path)) for path in paths]
    for adapter_id, count in Counter(push.adapter_id for push in pushes).items():
        if count > 1:
            raise ValueError(f"{count} of the paths would be pushed as {adapter_id!r}")
    return pushes


def name_of(path: Path) -> str:
    """The id that a path gives; raises ValueError if it gives none."""
    try:
        return check_id(default_id(path), field=f"name of {path}")
    except InvalidRequest as error:
        raise ValueError(f"{error}; --name gives it another") from error


async def push_all(
    adapters: Adapters,
    pushes: Sequence[Push],
    *,
    replace: bool,
    labels: Mapping[str, str],
    progress_of: Callable[[Push], Progress],
    ended: Callable[[Outcome], None],
    parallel: int = PARALLEL,
) -> list[Outcome]:
    """Push `parallel` adapters at a time, and call `ended` as soon as one has.

    What a name was published from already is not sent again, unless it would get other labels.
    """
    waiting, outcomes = iter(pushes), list[Outcome]()

    async def work() -> None:
        for push in waiting:
            outcome = await _push(adapters, push, progress_of(push), replace, labels)
            outcomes.append(outcome)
            ended(outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(parallel, len(pushes))):
            group.create_task(work())
    return outcomes


async def _push(
    adapters: Adapters, push: Push, progress: Progress, replace: bool, labels: Mapping[str, str]
) -> Outcome:
    try:
        files = await AdapterFiles.read(push.path, config=push.config)
        same = await adapters.find_same(push.adapter_id, files)
        if same is not None and (not labels or labels == same.labels):
            return Outcome(push=push, adapter=same, unchanged=True)
        adapter = await adapters.push_files(
            push.adapter_id, files, replace=replace, labels=labels, progress=progress
        )
    except (LorryError, ValueError, OSError) as error:
        return Outcome(push=push, error=error)
    return Outcome(push=push, adapter=adapter)
