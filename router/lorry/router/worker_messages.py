"""What is said on a worker's stream, between protobuf's types and the router's own."""

from dataclasses import dataclass

from lorry.router.generation import FinishReason, Logprobs, TokenLogprobs
from lorry.router.request import Request
from lorry.router.worker import WorkerStatus
from lorry.rpc.durations import to_duration, to_seconds
from lorry.rpc.errors import LorryError
from lorry.rpc.status import from_status
from lorry.v1 import common_pb2
from lorry.v1 import worker_service_pb2 as pb

FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A worker's last word on a request: a reason, an error, or neither if it was cancelled."""

    seq: int
    reason: FinishReason | None
    error: LorryError | None
    cached_tokens: int
    adapter_load_s: float
    prefill_s: float


def to_submit(seq: int, request: Request, now_s: float) -> pb.Submit:
    """All that a worker needs, with the tokens that the request has from workers that were lost."""
    generation = request.generation
    return pb.Submit(
        seq=seq,
        request_id=generation.request_id,
        tenant=generation.tenant,
        version=request.version,
        token_ids=[*request.prompt_ids, *request.output_ids],
        generated_tokens=len(request.output_ids),
        sampling=common_pb2.SamplingParams(
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
            presence_penalty=generation.presence_penalty,
            frequency_penalty=generation.frequency_penalty,
            logit_bias=generation.logit_bias,
            seed=request.seed,
        ),
        response=common_pb2.ResponseOptions(
            top_logprobs=generation.top_logprobs,
            prompt_logprobs=(
                generation.prompt_logprobs if request.awaits_prompt_logprobs else None
            ),
        ),
        max_tokens=request.max_tokens,
        min_tokens=generation.min_tokens,
        stop_token_ids=sorted(generation.stop_token_ids),
        remaining=to_duration(request.deadline_s - now_s),
    )


def to_status(status: pb.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        running=status.running,
        waiting=status.waiting,
        queued_prompt_tokens=status.queued_prompt_tokens,
        pages_total=status.pages_total,
        pages_free=status.pages_free,
        pages_cached=status.pages_cached,
        pages_adapter=status.pages_adapter,
        pages_adapter_idle=status.pages_adapter_idle,
        prefill_tokens_per_s=status.prefill_tokens_per_s,
        step_s=sorted((point.rows, point.ms / 1e3) for point in status.step_times),
        adapter_load_bytes_per_s=status.adapter_load_bytes_per_s,
    )


def to_logprobs(step: pb.StepOutput) -> list[TokenLogprobs] | None:
    """Of each row; None if no row has any."""
    if not step.logprobs:
        return None
    rows, first = list[TokenLogprobs](), 0
    top_counts = step.top_counts or [0] * len(step.logprobs)
    for logprob, count in zip(step.logprobs, top_counts, strict=True):
        top = slice(first, first + count)
        rows.append(TokenLogprobs(logprob, step.top_token_ids[top], step.top_logprobs[top]))
        first += count
    return rows


def to_ended(finished: pb.Finished) -> Ended:
    aborted = finished.reason == common_pb2.FINISH_REASON_ABORTED
    return Ended(
        seq=finished.seq,
        reason=FINISH_REASONS.get(finished.reason),
        error=from_status(finished.error) if aborted else None,
        cached_tokens=finished.usage.cached_tokens,
        adapter_load_s=to_seconds(finished.adapter_load),
        prefill_s=to_seconds(finished.prefill),
    )


def to_prompt_logprobs(rows: common_pb2.Logprobs) -> Logprobs:
    return Logprobs(list(rows.logprobs), list(rows.top_token_ids), list(rows.top_logprobs))
