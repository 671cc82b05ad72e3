"""An engine in this process, with adapters from PEFT directories instead of a store."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from lorry.rpc.base_model import BaseModel, read_base_model
from lorry.worker import messages as m
from lorry.worker.building import build_engine
from lorry.worker.config import EngineConfig
from lorry.worker.engine import Engine
from tests.support.adapters import build_image


class EngineHarness:
    """Submits requests, serves the engine's fetches, and checks its integrity after each step."""

    def __init__(self, model: Path, image_directory: Path, **config: Any) -> None:
        self._base_model = read_base_model(model)
        defaults: dict[str, Any] = {"pool_pages": 2000, "max_running": 64, "threads": 1}
        self.config = EngineConfig(model=model, **(defaults | config))
        self.engine = self.build(self.config, self._base_model)
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[m.RowLogprobs]] = {}  # of requests that ask
        self.prompt_logprobs: dict[int, list[m.RowLogprobs]] = {}  # of requests that ask
        self.finished: dict[int, m.Finished] = {}
        self.events: list[m.Event] = []
        self._images = image_directory
        self._adapters: dict[bytes, Path] = {}
        self._built: dict[bytes, m.ImageReady] = {}
        self._numbers = itertools.count(1)

    def build(self, config: EngineConfig, base_model: BaseModel) -> Engine:
        return build_engine(config, base_model)

    def version_of(self, adapter: Path | None) -> bytes:
        if adapter is None:
            return b""
        version = hashlib.sha256(str(adapter).encode()).digest()
        self._adapters[version] = adapter
        return version

    def submit(
        self, prompt: list[int], adapter: Path | None = None, max_tokens: int = 8, **fields: Any
    ) -> int:
        """Send a greedy request that stops at token 2; returns its number."""
        number = next(self._numbers)
        defaults: dict[str, Any] = {
            "tenant": "default",
            "generated_tokens": 0,
            "min_tokens": 0,
            "stop_token_ids": [2],
            "temperature": 0.0,
            "seed": number,
            "remaining_s": None,
        }
        self.tokens[number], self.logprobs[number], self.prompt_logprobs[number] = [], [], []
        self.engine.handle(
            [
                m.Submit(
                    request=number,
                    version=self.version_of(adapter),
                    token_ids=prompt,
                    max_tokens=max_tokens,
                    **(defaults | fields),
                )
            ]
        )
        return number

    def step(self) -> None:
        """One step and what it causes."""
        self.engine.step()
        self.engine.scheduler.check_integrity()
        for event in self.engine.take_events():
            self._note(event)

    def run(self, *, most_steps: int = 20_000) -> None:
        """Step until every request has finished."""
        for _ in range(most_steps):
            if len(self.finished) == len(self.tokens):
                return
            self.step()
        raise AssertionError(f"{len(self.tokens) - len(self.finished)} requests never finished")

    def image_pages(self, adapter: Path) -> int:
        return self.image(self.version_of(adapter)).pages

    def image(self, version: bytes) -> m.ImageReady:
        """An adapter's page image, one for each rank, built once as the store does."""
        if version not in self._built:
            self._built[version] = self._build_image(version)
        return self._built[version]

    def _build_image(self, version: bytes) -> m.ImageReady:
        directory = self._adapters[version]
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        images = [
            build_image(config, tensors, self.config.page_layout(self._base_model, rank))
            for rank in range(self.config.tensor_parallel)
        ]
        files: list[m.ImageFile] = []
        for rank, (_, data) in enumerate(images):
            path = self._images / f"{version.hex()}.{id(self)}.{rank}"  # no other harness's
            path.write_bytes(data)
            files.append(m.ImageFile(str(path), 0))
        header = images[0][0]
        return m.ImageReady(
            version=version,
            path=files[0].path,
            offset=0,
            image_bytes=header.image_bytes,
            pages=header.pages,
            rank=header.rank,
            modules=list(_modules(header)),
            other_ranks=files[1:],
        )

    def _note(self, event: m.Event) -> None:
        self.events.append(event)
        if isinstance(event, m.StepTokens):
            for number, token_id in zip(event.requests, event.token_ids, strict=True):
                self.tokens[number].append(token_id)
            self._note_logprobs(event)
        elif isinstance(event, m.PromptLogprobs):
            self._note_prompt_logprobs(event)
        elif isinstance(event, m.Finished):
            assert event.request not in self.finished, "a request finished twice"
            self.finished[event.request] = event
        elif isinstance(event, m.FetchImage):
            self.engine.handle([self.image(event.version)])

    def _note_prompt_logprobs(self, event: m.PromptLogprobs) -> None:
        rows = self.prompt_logprobs[event.request]
        assert not self.tokens[event.request], "logprobs of a prompt after a token"
        assert event.first_index == len(rows) + 1
        rows += [row for row in event.logprobs.rows() if row is not None]

    def _note_logprobs(self, event: m.StepTokens) -> None:
        if event.logprobs is not None:
            for number, row in zip(event.requests, event.logprobs.rows(), strict=True):
                if row is not None:
                    self.logprobs[number].append(row)


class ImageHarness(EngineHarness):
    """Has the images of adapters, for ranks whose engine does not run, and no engine."""

    def build(self, config: EngineConfig, base_model: BaseModel) -> Any:
        return None


def _modules(header: Any) -> Iterator[m.ImageModule]:
    for module in header.modules:
        yield m.ImageModule(*(getattr(module, field) for field in module.__slots__))
