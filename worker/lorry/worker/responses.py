"""What the worker tells routers, as protobuf."""

from lorry.rpc.durations import to_duration
from lorry.rpc.status import to_status
from lorry.v1 import common_pb2
from lorry.v1 import worker_service_pb2 as pb
from lorry.worker.streams import (
    PromptReport,
    RequestEnd,
    ResidencyUpdate,
    StepOutput,
    StreamEvent,
    WorkerState,
)


def to_response(event: StreamEvent) -> pb.AttachResponse:
    match event:
        case StepOutput():
            return pb.AttachResponse(step=to_step(event))
        case PromptReport():
            return pb.AttachResponse(prompt_logprobs=to_prompt_chunk(event))
        case WorkerState():
            return pb.AttachResponse(status=to_worker_status(event))
        case ResidencyUpdate():
            return pb.AttachResponse(residency=to_residency(event))


def to_step(output: StepOutput) -> pb.StepOutput:
    missing = [0] * (len(output.seqs) - len(output.logprobs)) if output.logprobs else []
    return pb.StepOutput(
        step=output.step,
        seqs=output.seqs,
        token_ids=output.token_ids,
        logprobs=[*output.logprobs, *missing],
        top_counts=[*output.top_counts, *missing] if output.top_token_ids else [],
        top_token_ids=output.top_token_ids,
        top_logprobs=output.top_logprobs,
        finished=[to_finished(end) for end in output.finished],
        submit_limit=output.submit_limit,
    )


def to_prompt_chunk(report: PromptReport) -> pb.PromptLogprobChunk:
    rows = report.logprobs
    return pb.PromptLogprobChunk(
        seq=report.seq,
        first_index=report.first_index,
        logprobs=common_pb2.Logprobs(
            logprobs=rows.logprobs,
            top_counts=rows.top_counts if rows.top_token_ids else [],
            top_token_ids=rows.top_token_ids,
            top_logprobs=rows.top_logprobs,
        ),
    )


def to_finished(end: RequestEnd) -> pb.Finished:
    return pb.Finished(
        seq=end.seq,
        reason=end.reason.value,  # type: ignore[arg-type]  # the numbers are the protocol's
        usage=common_pb2.Usage(
            prompt_tokens=end.prompt_tokens,
            completion_tokens=end.completion_tokens,
            cached_tokens=end.cached_tokens,
        ),
        error=to_status(end.error) if end.error is not None else None,
        adapter_load=to_duration(end.adapter_load_s),
        prefill=to_duration(end.prefill_s),
    )


def to_worker_status(state: WorkerState) -> pb.WorkerStatus:
    engine = state.engine
    return pb.WorkerStatus(
        running=engine.running,
        waiting=engine.waiting,
        queued_prompt_tokens=engine.queued_prompt_tokens,
        pages_total=engine.pages_total,
        pages_free=engine.pages_free,
        pages_kv=engine.pages_kv,
        pages_adapter=engine.pages_adapter,
        prefill_tokens_per_s=engine.prefill_tokens_per_s,
        step_times=[pb.StepTime(rows=r, ms=ms) for r, ms in sorted(engine.step_times_ms.items())],
        adapter_load_bytes_per_s=engine.adapter_load_bytes_per_s,
        draining=state.draining,
        max_adapters_in_step=engine.max_adapters_in_step,
        max_adapters_beside_base_in_step=engine.max_adapters_beside_base_in_step,
        pages_cached=engine.pages_cached,
        prefix_query_tokens=engine.prefix_query_tokens,
        prefix_hit_tokens=engine.prefix_hit_tokens,
        pages_adapter_idle=engine.pages_adapter_idle,
    )


def to_residency(update: ResidencyUpdate) -> pb.Residency:
    return pb.Residency(
        snapshot=update.snapshot,
        gpu_added=update.gpu_added,
        gpu_removed=update.gpu_removed,
        host_added=update.host_added,
        host_removed=update.host_removed,
    )
