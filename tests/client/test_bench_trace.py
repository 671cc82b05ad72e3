import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorry.client.bench.lengths import LogNormal, Uniform, parse_lengths
from lorry.client.bench.trace import (
    NO_ADAPTER,
    Burst,
    TraceRequest,
    TraceSpec,
    make_trace,
    merged,
    until,
)
from lorry.client.bench.trace_file import read_trace, write_trace


def test_a_trace_is_the_same_every_time() -> None:
    spec = TraceSpec(requests=50, adapters=8)
    assert make_trace(spec) == make_trace(spec)
    assert make_trace(spec) != make_trace(TraceSpec(requests=50, adapters=8, seed=43))
    # That of the committed results, which quote its seed.
    assert make_trace(TraceSpec())[0] == TraceRequest(0.9004, 0, 110, 457)


def test_lengths_do_not_depend_on_the_number_of_adapters() -> None:
    few, many = (make_trace(TraceSpec(requests=50, adapters=n)) for n in (0, 1000))
    assert [r.prompt_tokens for r in few] == [r.prompt_tokens for r in many]
    assert [r.output_tokens for r in few] == [r.output_tokens for r in many]
    assert {r.adapter for r in few} == {NO_ADAPTER}


def test_popularity_follows_alpha() -> None:
    zipf, flat = (
        np.bincount(
            [r.adapter for r in make_trace(TraceSpec(requests=5000, adapters=100, alpha=a))]
        )
        for a in (1.0, 0.0)
    )
    assert 0.15 < zipf[0] / 5000 < 0.25  # 1 / H(100) is 0.193
    assert flat.max() < 100


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_arrivals_have_the_asked_rate_and_variation(cv: float) -> None:
    arrivals = [r.arrival_s for r in make_trace(TraceSpec(requests=20_000, rate=5.0, cv=cv))]
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_a_burst_has_its_factor_and_leaves_the_rest_as_it_was() -> None:
    bursts = (Burst(100, 50, 4.0), Burst(125, 50, 2.0))
    trace = make_trace(TraceSpec(requests=30_000, rate=50.0, bursts=bursts))
    counts = np.histogram([r.arrival_s for r in trace], [0, 100, 125, 150, 175, 200])[0]
    rates = counts / [100, 25, 25, 25, 25]
    assert rates == pytest.approx([50, 200, 400, 100, 50], rel=0.15)


def test_tenants_have_their_shares() -> None:
    trace = make_trace(TraceSpec(requests=4000, tenants={"a": 1.0, "b": 3.0}))
    assert sum(r.tenant == "b" for r in trace) == pytest.approx(3000, rel=0.05)


def test_traces_are_cut_and_merged_by_arrival() -> None:
    trace = make_trace(TraceSpec(requests=100))
    early = until(trace, 20.0)
    assert 0 < len(early) < 100
    late = [replace(request, arrival_s=request.arrival_s + 10.0) for request in early]
    both = merged(late, early)
    assert len(both) == 2 * len(early)
    assert both == sorted(both, key=lambda r: r.arrival_s)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("7", Uniform(7, 7)),
        ("8-512", Uniform(8, 512)),
        ("lognormal:100:0.5:400", LogNormal(100.0, 0.5, 400)),
    ],
)
def test_lengths_are_read_as_they_are_written(text: str, lengths: Uniform | LogNormal) -> None:
    assert parse_lengths(text) == lengths
    assert str(lengths) == text


def test_lognormal_lengths_have_their_median_and_bounds() -> None:
    drawn = LogNormal(100, 1.0, 300).draw(np.random.RandomState(0), 4000)
    assert np.median(drawn) == pytest.approx(100, rel=0.1)
    assert (drawn.min(), drawn.max()) >= (1, 300)
    assert drawn.max() == 300


@pytest.mark.parametrize("text", ["", "a", "9-8", "0", "1-2-3", "lognormal:1:2", "lognormal:9:1:8"])
def test_lengths_that_are_none_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"got {text!r}"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["1:2", "x:1:2", "-1:2:3", "1:0:3", "1:2:0"])
def test_bursts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a burst must"):
        Burst.parse(text)


@pytest.mark.parametrize(
    "fields",
    [{"requests": 0}, {"rate": -1.0}, {"cv": 0.0}, {"adapters": -1}, {"tenants": {"a": 0.0}}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_spec_that_is_none_is_named(fields) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        TraceSpec(**fields)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = make_trace(TraceSpec(requests=20, tenants={"a": 1.0, "b": 1.0}))
    write_trace(tmp_path / "trace", trace)
    assert read_trace(tmp_path / "trace") == trace


GOOD = {"arrival_s": 1, "adapter": 0, "prompt_tokens": 1, "output_tokens": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace:2: not JSON"),
        ("[]", "trace:2: must be an object"),
        (json.dumps(GOOD | {"prompt_tokens": 0}), "trace:2: prompt_tokens must be .* got 0"),
        (json.dumps(GOOD | {"adapter": 1.5}), "trace:2: adapter must be a whole number"),
        (json.dumps(GOOD | {"arrival_s": None}), "trace:2: arrival_s must be a number"),
        (json.dumps(GOOD | {"tenant": 1}), "trace:2: tenant must be a string"),
        (json.dumps(GOOD | {"arrival_s": 0}), "not in the order"),
    ],
)
def test_a_bad_trace_is_named_by_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_trace(path)
