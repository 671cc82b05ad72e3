"""`lorry bench`: send a trace to a router, open loop, and tell what came of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from lorry.client.commands.connection import DEFAULT, Connection
from lorry.client.console import make_console
from lorry.rpc.channel import read_token
from lorry.rpc.command import check_positive, extra

if TYPE_CHECKING:
    from lorry.client.bench.record import Slo

TRACE = Group.create_ordered("Trace")
Many = Annotated[tuple[str, ...], Parameter(negative="")]


@Parameter(name="*", group=TRACE)
@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Which requests come when."""

    trace: Path | None = None
    """File with the requests, a JSON object a line; the other options of this group draw one."""

    requests: int = 1000
    """Number of requests."""

    duration_s: float | None = None
    """Leave out what would arrive after this many seconds; default: send all."""

    rate: float = 2.0
    """Requests a second, on average."""

    cv: float = 1.0
    """Coefficient of variation of the gaps between arrivals; 1 is a Poisson process."""

    burst: Many = ()
    """START:DURATION:FACTOR: from second START on, for DURATION seconds, FACTOR times the rate.
    Bursts that overlap multiply."""

    adapters: int | None = None
    """Adapters that are asked for, 0 for the base model; default: all that the store lists."""

    adapter_names: str = ""
    """Name of adapter N, with {n} in place of N (from 0); default: as the store lists them."""

    alpha: float = 1.0
    """Popularity of adapters: N is asked for in proportion to (N+1)^-alpha; 0 is uniform."""

    prompt_tokens: str = "8-512"
    """Length of prompts: N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MOST."""

    output_tokens: str = "8-512"
    """Length of outputs, in the same forms."""

    tenant: Many = ()
    """NAME=SHARE: a tenant and its share of the requests. Repeat it for several."""

    seed: int = 42
    """Of the trace: the same seed and options draw the same one."""

    def shares(self) -> dict[str, float]:
        """Of the tenants; none if there is one tenant only."""
        return numbers("tenant", self.tenant)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How it is sent and judged."""

    slo_ttft_s: float | None = None
    """Seconds within which a request's first token must come, which the router is told; default:
    any time will do."""

    slo_tpot_s: float | None = None
    """Seconds that each further output token may take, on average; default: any."""

    tenant_token_file: Many = ()
    """NAME=FILE: file with the bearer token of a tenant; default: --token-file for all."""

    tenant_weight: Many = ()
    """NAME=WEIGHT: a tenant's fair share of service relative to the others; default: 1."""

    processes: int = 1
    """Processes that send; one sends some hundred requests or ten thousand tokens a second."""

    max_open: int = 4096
    """Requests that may be open at a time; more are sent late, but counted from when they were
    planned."""

    token_ids: str = "3-64"
    """LOW-HIGH: ids of the tokens that prompts are made of; the model must know them."""

    output: Path = Path("lorry-bench")
    """Directory for result.json, report.html, trace.jsonl and records.jsonl."""

    dry_run: Annotated[bool, Parameter(negative="")] = False
    """Show the trace, write trace.jsonl, and send nothing."""

    def __post_init__(self) -> None:
        check_positive(self, "slo_ttft_s", "slo_tpot_s", "processes", "max_open")

    def tokens(self) -> dict[str, str | None]:
        """Bearer tokens of the tenants that have one of their own."""
        files = pairs("tenant-token-file", self.tenant_token_file)
        return {tenant: read_token(Path(file)) for tenant, file in files.items()}

    def weights(self) -> dict[str, float]:
        return numbers("tenant-weight", self.tenant_weight)

    def slo(self) -> "Slo":
        from lorry.client.bench.record import Slo

        asked = {"ttft_s": self.slo_ttft_s, "tpot_s": self.slo_tpot_s}
        return Slo(**{name: value for name, value in asked.items() if value is not None})


ANY_TRACE, ANY_RUN = TraceOptions(), RunOptions()


async def bench(
    *,
    trace: TraceOptions = ANY_TRACE,
    run: RunOptions = ANY_RUN,
    connection: Connection = DEFAULT,
) -> None:
    """Send a trace of requests at their times and measure latencies, SLOs and fairness.

    An open loop: a request is sent at its time whatever became of the ones before, and all its
    latencies count from that time.
    """
    with extra("bench"):
        from lorry.client.bench.run import Run, run_summary
        from lorry.client.bench.trace_file import write_trace
        from lorry.client.bench.workload import adapter_names, plan, trace_summary

    console = make_console()
    sender = Run(connection, run, trace)
    planned = await plan(trace, sender.list_adapters)
    run.output.mkdir(parents=True, exist_ok=True)
    write_trace(run.output / "trace.jsonl", planned)
    console.print(trace_summary(planned))
    if not run.dry_run:
        names = await adapter_names(planned, trace.adapter_names, sender.list_adapters)
        result = await sender.send(planned, names, console)
        console.print("", run_summary(result), "", f"written to {run.output}/report.html")


def pairs(option: str, assignments: tuple[str, ...]) -> dict[str, str]:
    """Raises ValueError naming the option and what is not NAME=VALUE."""
    for assignment in assignments:
        if not all(assignment.partition("=")):
            raise ValueError(f"--{option} must be NAME=VALUE, got {assignment!r}")
    return dict(assignment.split("=", 1) for assignment in assignments)


def numbers(option: str, assignments: tuple[str, ...]) -> dict[str, float]:
    """The same where values are numbers above 0."""
    found = dict[str, float]()
    for name, text in pairs(option, assignments).items():
        try:
            found[name] = float(text)
        except ValueError as error:
            raise ValueError(f"--{option} must be NAME=NUMBER, got '{name}={text}'") from error
        if not found[name] > 0:
            raise ValueError(f"--{option} must be positive, got '{name}={text}'")
    return found
