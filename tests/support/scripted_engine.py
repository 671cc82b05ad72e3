"""An engine process that computes nothing: a request's first token tells what becomes of it.

A request of a version first waits for its page image and then begins with two tokens that tell its
rank and its bytes. After that it repeats its prompt, one token a step. The environment variable
SCRIPTED_ENGINE tells how the process begins: ready, die-at-start, or never-ready.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lorry.worker import messages as m
from lorry.worker.engine_channel import EngineArguments, EngineChannel

CRASH, HANG, HOLD, FLOOD, FAIL, BABBLE = range(3, 9)  # first tokens
ECHO = 20  # any other one
BEGINNING = "SCRIPTED_ENGINE"
COMMAND = (sys.executable, "-m", "tests.support.scripted_engine")
MAX_RUNNING = 4
STEP_TOKENS = 32
STEP_S = 0.002
HEARTBEAT_S = 0.1
FLOOD_ROWS = 20_000


class ScriptedEngine:
    def __init__(self) -> None:
        self.events: list[m.Event] = []
        self._steps = 0
        self._running: dict[int, m.Submit] = {}
        self._sent: dict[int, int] = {}
        self._images: dict[bytes, m.ImageReady | None] = {}  # None: asked for
        self._pins: dict[bytes, int | None] = {}  # the call that waits for it

    def handle(self, command: m.Command) -> None:
        match command:
            case m.Submit():
                self._submit(command)
            case m.Cancel(requests):
                for number in requests:
                    self._end(number, m.FinishReason.CANCELLED)
            case m.Prefetch(versions):
                for version in versions:
                    self._want(version)
            case m.ImageReady(version):
                self._images[version] = command
                self.events.append(m.ResidencyChange([], [], [version], []))
                self._answer_pin(version)
            case m.ImageFailed(version, failure):
                del self._images[version]
                for number, submit in list(self._running.items()):
                    if submit.version == version:
                        self._end(number, m.FinishReason.ABORTED, failure)
                self._answer_pin(version, failure)
            case m.ReclaimImage(version):
                self._release(version)
            case m.PinAdapter(call, version):
                self._pins[version] = call
                self._want(version)
                if self._images[version]:
                    self._answer_pin(version)
            case m.UnpinAdapter(call, version):
                self._pins.pop(version, None)
                self.events.append(m.AdminResult(call))
            case m.EvictAdapter(call, version):
                self._evict(call, version)

    def step(self) -> None:
        """One token for each request that can have one."""
        self._steps += 1
        drawn = [n for n, submit in self._running.items() if self._is_ready(submit)]
        tokens = [(number, self._next_token(number)) for number in drawn]
        tokens += [
            (number, ECHO)
            for number, submit in self._running.items()
            if submit.token_ids[0] == FLOOD
            for _ in range(FLOOD_ROWS)
        ]
        if tokens:
            numbers, token_ids = zip(*tokens, strict=True)
            self.events.append(m.StepTokens(self._steps, list(numbers), list(token_ids)))
        for number in drawn:
            if self._sent[number] >= self._running[number].max_tokens:
                self._end(number, m.FinishReason.LENGTH)

    def status(self) -> m.Status:
        return m.Status(
            running=min(len(self._running), MAX_RUNNING),
            waiting=max(0, len(self._running) - MAX_RUNNING),
            pages_total=100,
            pages_free=100,
            step_times_ms={4: 2.0, 1: 1.0},
            steps=self._steps,
            max_adapters_in_step=3,
            max_adapters_beside_base_in_step=2,
        )

    def _submit(self, submit: m.Submit) -> None:
        self._running[submit.request] = submit
        self._sent[submit.request] = submit.generated_tokens
        match submit.token_ids[0]:
            case 3:  # CRASH
                print("the device fell off the bus", file=sys.stderr, flush=True)
                os._exit(7)
            case 4:  # HANG
                time.sleep(3600)
            case 7:  # FAIL
                failure = m.Failure("POOL_TOO_SMALL", "too small", {"pages": "5"})
                self._end(submit.request, m.FinishReason.ABORTED, failure)
            case 8:  # BABBLE
                self.events.append(m.StepTokens(1, [submit.request], []))
        if submit.version:
            self._want(submit.version)
        if submit.prompt_logprobs is not None:
            self._report_prompt(submit, submit.prompt_logprobs)

    def _report_prompt(self, submit: m.Submit, num_top: int) -> None:
        """One token a message; alternatives are 0, 1, 2, ..."""
        for index in range(1, len(submit.token_ids)):
            top = list(range(num_top)), [-1.0] * num_top
            logprobs = m.TokenLogprobs([-float(index)], [num_top], *top)
            self.events.append(m.PromptLogprobs(submit.request, index, logprobs))

    def _is_ready(self, submit: m.Submit) -> bool:
        has_image = not submit.version or self._images.get(submit.version) is not None
        return has_image and submit.token_ids[0] not in (HOLD, FLOOD)

    def _next_token(self, number: int) -> int:
        submit, position = self._running[number], self._sent[number]
        self._sent[number] += 1
        output: Sequence[int] = submit.token_ids
        if image := self._images.get(submit.version):
            content = Path(image.path).read_bytes()[image.offset :][: image.image_bytes]
            output = [image.rank, sum(content) % 256, *output]
        return output[position % len(output)]

    def _want(self, version: bytes) -> None:
        if version not in self._images:
            self._images[version] = None
            self.events.append(m.FetchImage(version))

    def _release(self, version: bytes) -> None:
        if self._images.pop(version, None):
            self.events.append(m.ResidencyChange([], [], [], [version]))
        self.events.append(m.ReleaseImage(version))

    def _evict(self, call: int, version: bytes) -> None:
        if version in self._pins:
            failure = m.Failure("ADAPTER_IN_USE", "pinned")
            self.events.append(m.AdminResult(call, failure))
        else:
            self._release(version)
            self.events.append(m.AdminResult(call))

    def _answer_pin(self, version: bytes, failure: m.Failure | None = None) -> None:
        if (call := self._pins.get(version)) is not None:
            self.events.append(m.AdminResult(call, failure))
            self._pins[version] = None

    def _end(self, number: int, reason: m.FinishReason, failure: m.Failure | None = None) -> None:
        if submit := self._running.pop(number, None):
            prompt_tokens = len(submit.token_ids) - submit.generated_tokens
            sent = self._sent[number]
            self.events.append(m.Finished(number, reason, prompt_tokens, sent, failure, 0.5, 0.25))


def main() -> None:
    arguments = EngineArguments.parse()
    channel = EngineChannel.from_arguments(arguments)
    beginning = os.environ.get(BEGINNING, "ready")
    if beginning == "die-at-start":
        sys.exit("no such device")
    if beginning == "never-ready":
        time.sleep(3600)
    engine = ScriptedEngine()
    engine.events.append(m.Started(100, MAX_RUNNING, STEP_TOKENS, arguments.config.max_rank, 512))
    heartbeat_s = 0.0
    while True:
        for command in channel.receive(STEP_S):
            if isinstance(command, m.Stop):
                return
            engine.handle(command)
        engine.step()
        if time.monotonic() > heartbeat_s + HEARTBEAT_S:
            heartbeat_s = time.monotonic()
            engine.events.append(engine.status())
        if engine.events:
            channel.send(engine.events)
            engine.events = []


if __name__ == "__main__":
    main()
